"""Entry point of the `equinorm` command, outside of the package: an interrupt while PyTorch is imported is one, too."""

import json
import os
import signal
import sys

PACKAGES = ("rich", "typer", "matplotlib", "safetensors")
"""What the command line needs beside the library: the extra `cli`."""


def main() -> None:
    """Import the command line and run it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as in the background of a shell
        signal.signal(signal.SIGINT, _leave)
    try:
        from equinorm.cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in PACKAGES:
            raise
        _refuse(
            type(error).__name__, f"the command line needs {missing}, which is not installed: pip install 'equinorm[cli]'.", 2
        )
        sys.exit(2)
    signal.signal(signal.SIGINT, before)
    app.main()


def _leave(number: int, frame: object) -> None:
    """End at once: an exception would be taken for a failure by what is being imported."""
    _refuse("KeyboardInterrupt", "interrupted; no file is half-written.", 130)
    os._exit(130)


def _refuse(kind: str, message: str, code: int) -> None:
    if "--json" in sys.argv:
        error = {"kind": kind, "message": message, "exit_code": code}
        os.write(1, (json.dumps({"error": error}, indent=2) + "\n").encode())
    else:
        os.write(2, f"error: {message}\n".encode())


if __name__ == "__main__":
    main()
