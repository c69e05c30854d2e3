"""The terminal: results on stdout, progress and errors on stderr, exit codes."""

import contextlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from equinorm._errors import EquinormError
from equinorm._models import first_line
from equinorm._records import as_json

REFUSED, INTERRUPTED, UNEXPECTED = 2, 130, 1
_WIDTH = 140
"""Width of text that does not go to a terminal."""


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


def run(work: Callable[[Steps], tuple[Any, RenderableType, int]], json_only: bool, debug: bool) -> None:
    """Do the work of a command, then print its record.

    Args:
        work: returns the record, what to print for it, and the exit code.
        json_only: print the record as JSON instead. What the model's own code prints goes to stderr either way.
        debug: let errors through with their tracebacks, and show warnings.

    Raises:
        typer.Exit: with the exit code, if it is not 0.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), _steps() as steps:
            if not debug:
                warnings.simplefilter("ignore")
                logging.disable(logging.CRITICAL)  # the exporter's own accounts of what it could not do
            record, text, code = work(steps)
    except (Exception, KeyboardInterrupt) as error:
        if debug or isinstance(error, typer.Exit):
            raise
        raise typer.Exit(_explain(error)) from None
    finally:
        logging.disable(logging.NOTSET)
    if json_only:
        sys.stdout.write(json.dumps(as_json(record), indent=2, allow_nan=False) + "\n")
    else:
        console = Console(highlight=False)
        if console.is_terminal:
            console.print(text)
        else:
            lines = console.render_lines(text, console.options.update(width=_WIDTH), pad=False)
            sys.stdout.write("".join("".join(part.text for part in line).rstrip() + "\n" for line in lines))
    if code:
        raise typer.Exit(code)


def _explain(error: BaseException) -> int:
    """Say on stderr what went wrong; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        text, code = "interrupted; no file is half-written.", INTERRUPTED
    elif isinstance(error, EquinormError):
        text, code = str(error), REFUSED
    elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        text, code = "out of memory. Use a smaller input.", REFUSED
    else:
        text = f"unexpected {type(error).__name__}: {first_line(error)}. Run again with --debug to see where."
        code = UNEXPECTED
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), text))
    return code


@contextlib.contextmanager
def _steps() -> Iterator[Steps]:
    console = Console(stderr=True)
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
