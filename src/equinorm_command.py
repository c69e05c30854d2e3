"""Entry point of the `equinorm` command, outside of the package: an interrupt while PyTorch is imported is one, too.

What lists the commands, explains one, or says the version, does not import it: the docstrings and options of commands are read
from their files, of which only the statements that these need are run.
"""

import ast
import functools
import importlib
import importlib.util
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

NEEDED = ("matplotlib", "rich", "safetensors", "typer")
"""What the command line needs beside the library; the extra `cli` installs it."""

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C, as shells have it."""

COMMANDS = ("inspect", "balance", "equalize", "apply", "compare", "align", "canonical", "demo", "train", "figures")
"""Each stands in a file of its name in `equinorm.cli`."""

LIGHT = ([], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS))
"""Arguments for which the docstrings of the commands and their options are enough."""

TABLE = 100
"""Columns that the table of every command's options takes; where a terminal has fewer it would cut off their names."""


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
    if sys.argv[1:] in LIGHT and (commands := described([name for name in COMMANDS if name in sys.argv] or COMMANDS)):
        run(assembled(commands))
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
    from typer.core import TyperCommand

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            if shutil.get_terminal_size().columns < TABLE:
                self.rich_markup_mode = None
            super().format_help(ctx, formatter)

    app = typer.Typer(
        cls=group,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Find, solve and apply the rescaling symmetries of PyTorch networks.",
    )

    def say_version(wanted: bool) -> None:
        if wanted:
            from importlib import metadata  # takes longer than all else that is imported before Ctrl-C is listened to

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
        app.command(cls=Command)(command)
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


def described(names: Iterable[str]) -> list[Callable[..., None]]:
    """Commands that have a name, a docstring and options, and do nothing.

    None in an archive, or where they are installed without sources.
    """
    found: list[Callable[..., None]] = []
    try:
        for name in names:
            command: Any = _statements(f"equinorm.cli.{name}")[name]
            command.body = command.body[:1]  # the docstring
            found.append(_defined(f"equinorm.cli.{name}", name))
        return found
    except OSError:
        return []


@functools.cache
def _defined(module: str, name: str) -> Any:
    """What a name stands for in a module of the package, by the statements alone that define it: others import PyTorch."""
    statements, needed, waiting = _statements(module), set(), [name]
    while waiting:
        if (used := waiting.pop()) in statements and used not in needed:
            needed.add(used)
            waiting += [node.id for node in ast.walk(statements[used]) if isinstance(node, ast.Name)]
    values: dict[str, Any] = {"__name__": module}
    for bound, statement in statements.items():
        if bound not in needed or bound in values:
            continue
        if isinstance(statement, ast.ImportFrom) and (source := statement.module or "").startswith("equinorm."):
            original = next(alias.name for alias in statement.names if bound in (alias.name, alias.asname))
            values[bound] = _defined(source, original)
        else:
            exec(compile(ast.Module([statement], []), module, "exec"), values)
    return values[name]


@functools.cache
def _statements(module: str) -> dict[str, ast.stmt]:
    """The statements of a module by the names that they bind; its file is read, not imported."""
    (folder,) = importlib.util.find_spec("equinorm").submodule_search_locations  # pyright: ignore
    path = Path(folder, *module.split(".")[1:]).with_suffix(".py")
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.asname or alias.name for alias in node.names]
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        found |= dict.fromkeys(names, node)
    return found


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
