"""Entry point of the `equinorm` command, outside of the package: an interrupt while PyTorch is imported is one, too."""

import importlib.util
import json
import os
import signal
import sys

NEEDED = ("matplotlib", "rich", "safetensors", "typer")
"""What the command line needs beside the library; the extra `cli` installs it."""


def main() -> None:
    """Import the command line and run it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(part for part in (", ".join(missing[:-1]), missing[-1]) if part)
        needs = f"the command line needs {names}, which the library alone does not."
        _end("ModuleNotFoundError", f"{needs} Run pip install 'equinorm[cli]'.", 2)
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as in the background of a shell
        signal.signal(signal.SIGINT, _leave)
    from equinorm.cli import app

    signal.signal(signal.SIGINT, before)
    app.main()


def _leave(number: int, frame: object) -> None:
    """End at once: an exception would be taken for a failure by what is being imported."""
    _end("KeyboardInterrupt", "interrupted; no file is half-written.", 130)


def _end(kind: str, message: str, code: int) -> None:
    """Print an error, as JSON with --json, and leave."""
    if "--json" in sys.argv:
        error = {"kind": kind, "message": message, "exit_code": code}
        os.write(1, (json.dumps({"error": error}, indent=2) + "\n").encode())
    else:
        os.write(2, f"error: {message}\n".encode())
    os._exit(code)


if __name__ == "__main__":
    main()
