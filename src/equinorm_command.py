"""Entry point of the `equinorm` command, outside of the package: an interrupt while PyTorch is imported is one, too."""

import json
import os
import signal
import sys


def main() -> None:
    """Import the command line and run it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as in the background of a shell
        signal.signal(signal.SIGINT, _leave)
    from equinorm.cli import app

    signal.signal(signal.SIGINT, before)
    app.main()


def _leave(number: int, frame: object) -> None:
    """End at once: an exception would be taken for a failure by what is being imported."""
    message = "interrupted; no file is half-written."
    if "--json" in sys.argv:
        error = {"kind": "KeyboardInterrupt", "message": message, "exit_code": 130}
        os.write(1, (json.dumps({"error": error}, indent=2) + "\n").encode())
    else:
        os.write(2, f"error: {message}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    main()
