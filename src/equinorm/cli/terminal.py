"""The terminal: results on stdout, progress and errors on stderr, exit codes."""

import contextlib
import json
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text
from typer.core import TyperGroup

from equinorm._errors import EquinormError, first_line
from equinorm.cli.wording import worded
from equinorm.reporting.records import as_json

FAILED = 2
"""The exit code of an error; 1 is the verdict of a command that did what it was asked to."""

_WIDEST = 100_000
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
"""Control characters, as Python writes them."""


class _Console(Console):
    """Shows control characters instead of sending them: names of tensors come from files, and could drive the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(segment.text.translate(_CONTROLS), segment.style)


class Steps:
    """What is being done, as one line on stderr; silent unless that is a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def say(self, text: str) -> None:
        """Begin the next step."""
        self._progress.reset(self._task, total=None, description=text)

    def count(self, done: float, total: float, text: str) -> None:
        """So much of a total is done."""
        self._progress.update(self._task, description=text, total=total, completed=done)

    def solving(self, tol: float) -> Callable[[int, float], None]:
        """What the solver calls after every cycle; the bar is log ρ on its way to log tol."""
        first: list[float] = []

        def report(cycle: int, residual: float) -> None:
            first.append(residual)
            way = math.log(first[0] / tol) if first[0] > tol > 0 else 0.0
            done = math.log(first[0] / residual) / way if way and residual > 0 else float(not way or residual == 0)
            text = f"balancing: cycle {cycle}, residual {residual:.1e}"
            self._progress.update(self._task, description=text, total=1.0, completed=min(max(done, 0.0), 1.0))

        return report


class Commands(TyperGroup):
    """Commands whose wrong use is JSON, too, with --json."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a command; wrong use is an error like any other."""
        given = list(sys.argv[1:] if args is None else args)
        if "--json" not in given or not standalone_mode:
            return super().main(args, *rest, standalone_mode=standalone_mode, **options)
        try:
            sys.exit(super().main(given, *rest, standalone_mode=False, **options))
        except Exception as error:
            if not hasattr(error, "format_message"):  # of what typer raises for the user
                raise
            said: Any = error
            fail(type(error).__name__, said.format_message(), said.exit_code, True)
            sys.exit(said.exit_code)


def run(
    work: Callable[[Steps], tuple[Any, RenderableType, int]],
    json_only: bool,
    debug: bool,
    words: Callable[[str], str] = worded,
) -> None:
    """Do the work of a command, then print its record.

    Args:
        work: returns the record, what to print for it, and the exit code.
        json_only: print the record, or the error, as JSON instead. What the model's own code prints goes to stderr either way.
        debug: show tracebacks and warnings.
        words: turns what errors of the library say into what the user has typed.

    Raises:
        typer.Exit: with the exit code, if it is not 0.
    """
    try:
        with warnings.catch_warnings(), _quiet_stdout(), _steps() as steps:
            if not debug:
                warnings.simplefilter("ignore")
                logging.disable(logging.CRITICAL)  # the exporter's own accounts of what it could not do
            record, text, code = work(steps)
        written = _json(as_json(record)) if json_only else _plain(text)
    except typer.Exit:
        raise
    except BaseException as error:  # also what ends a program: the exit code is the command's to choose
        if debug:
            traceback.print_exc()
            if (cause := getattr(error, "cause", None)) is not None:
                traceback.print_exception(cause)  # what the exporter said, of hundreds of lines
        message, code = _explain(error, words)
        fail(type(error).__name__, message, code, json_only)
    else:
        _print(written)
    finally:
        logging.disable(logging.NOTSET)
    if code:
        raise typer.Exit(code)


def fail(kind: str, message: str, code: int, json_only: bool) -> None:
    """Print an error: one line on stderr, or one JSON object on stdout."""
    if json_only:
        _print(_json({"error": {"kind": kind, "message": message, "exit_code": code}}))
    else:
        _Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def _plain(text: RenderableType) -> str | RenderableType:
    """Tables as text that is as wide as they are, unless they go to a terminal: names stay whole for other programs."""
    console = _Console(highlight=False)
    if console.is_terminal:
        return text
    lines = console.render_lines(text, console.options.update(width=_WIDEST), pad=False)
    return "".join("".join(part.text for part in line).rstrip() + "\n" for line in lines)


def _print(text: str | RenderableType) -> None:
    """Write to stdout. Whoever reads it may have seen enough, as `head` has, which is no failure; a full disk is one."""
    try:
        if isinstance(text, str):
            sys.stdout.write(text)
        else:
            _Console(highlight=False).print(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        if not isinstance(error, BrokenPipeError):
            fail(type(error).__name__, f"cannot print the result: {error.strerror}.", FAILED, False)
            raise typer.Exit(FAILED) from None


def _explain(error: BaseException, words: Callable[[str], str]) -> tuple[str, int]:
    """What went wrong, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; no file is half-written.", 128 + signal.SIGINT
    if isinstance(error, EquinormError):
        return words(str(error)), FAILED
    if isinstance(error, MemoryError) or any(part in str(error).lower() for part in _NO_MEMORY):
        return "out of memory. Use a smaller input.", FAILED
    if isinstance(error, SystemExit):
        return f"the model's own code ends the program (code {error.code}). Run again with --debug to see where.", FAILED
    text = f"unexpected {type(error).__name__}: {first_line(error)}. Run again with --debug to see where."
    return text, FAILED


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Whatever prints, Python or a program that it starts, prints to stderr: stdout is for the result."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        kept = None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


@contextlib.contextmanager
def _steps() -> Iterator[Steps]:
    console = _Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24), TimeElapsedColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        yield Steps(progress)
