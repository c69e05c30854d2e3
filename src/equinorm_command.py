"""Entry point of the `equinorm` command, outside of the package: an interrupt while PyTorch is imported is one, too.

What lists the commands, or says the version, does not import it.
"""

import ast
import importlib
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

NEEDED = ("matplotlib", "rich", "safetensors", "typer")
"""What the command line needs beside the library; the extra `cli` installs it."""

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C, as shells have it."""

COMMANDS = ("inspect", "balance", "equalize", "apply", "compare", "align", "canonical", "demo", "train", "figures")
"""Each stands in a file of its name in `equinorm.cli`."""

LIGHT = ([], ["--help"], ["--version"])
"""Arguments for which the docstrings of the commands are enough."""


def main() -> None:
    """Import what the arguments need and run it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(part for part in (", ".join(missing[:-1]), missing[-1]) if part)
        needs = f"the command line needs {names}, which the library alone does not."
        _end("ModuleNotFoundError", f"{needs} Run pip install 'equinorm[cli]'.", 2)
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as in the background of a shell
        signal.signal(signal.SIGINT, _leave)
    if sys.argv[1:] in LIGHT and (described := _all_described()):
        run(assembled(described))
        return
    app = application()
    signal.signal(signal.SIGINT, before)
    run(app)


def application() -> Any:
    """The command line with its commands, imported by their names."""
    commands = [getattr(importlib.import_module(f"equinorm.cli.{name}"), name) for name in COMMANDS]
    return assembled(commands, importlib.import_module("equinorm.cli.terminal").Commands)


def assembled(commands: Iterable[Callable[..., None]], group: Any = None) -> Any:
    """The typer application of some functions, which are called as its commands are.

    Args:
        commands: the functions.
        group: the class of what holds them; None for typer's own.
    """
    import typer

    app = typer.Typer(
        cls=group,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Find, solve and apply the rescaling symmetries of PyTorch networks.",
    )

    def say_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"equinorm {metadata.version('equinorm')}")
            raise typer.Exit

    @app.callback()
    def _options(
        version: Annotated[
            bool, typer.Option("--version", callback=say_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass

    for command in commands:
        app.command()(command)
    return app


def run(app: Callable[[], Any]) -> None:
    """Call an application, whatever its streams are."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the command
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show ℓ shows a question mark
            stream.reconfigure(errors="replace")
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _all_described() -> list[Callable[[], None]]:
    """The commands; none in an archive, or where they are installed without sources."""
    try:
        return [*map(_described, COMMANDS)]
    except OSError:
        return []


def _described(name: str) -> Callable[[], None]:
    """What has the name and the docstring of a command, and nothing else of it: its file is read, not imported."""
    (folder,) = importlib.util.find_spec("equinorm").submodule_search_locations  # pyright: ignore
    tree = ast.parse((Path(folder) / "cli" / f"{name}.py").read_text("utf-8"))
    (own,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)

    def command() -> None:
        pass

    command.__name__, command.__doc__ = name, ast.get_docstring(own)
    return command


def _leave(number: int, frame: object) -> None:
    """End at once: an exception would be taken for a failure by what is being imported."""
    _end("KeyboardInterrupt", "interrupted; no file is half-written.", INTERRUPTED)


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
