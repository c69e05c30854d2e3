"""`equinorm figures`: pictures of what `equinorm train` has recorded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from equinorm.cli.options import Debug, Force, Json, Result
from equinorm.cli.terminal import Steps, run
from equinorm.cli.wording import forced
from equinorm.experiments.config import ExperimentError
from equinorm.experiments.figures import pictures
from equinorm.experiments.results import read
from equinorm.experiments.series import experiments
from equinorm.reporting.files import make_folder, write_atomically
from equinorm.reporting.tables import facts


@dataclass(frozen=True, slots=True)
class Figures:
    """Record of `equinorm figures`.

    Attributes:
        results: the file that was read.
        runs: how many runs it holds.
        experiments: titles of the experiments found.
        pictures: the files that were written.
    """

    results: str
    runs: int
    experiments: tuple[str, ...]
    pictures: tuple[str, ...]


def figures(
    results: Annotated[Path, typer.Argument(help="What equinorm train --results wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("figures"),
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw accuracy by depth and batch size, learning curves, learning rates, norms, imbalance and weights."""

    def work(steps: Steps) -> Result:
        record, drawn = draw_all(results, output, steps.say)
        make_folder(output)
        write_atomically(drawn, force)
        return record, shown(record), 0

    run(work, json, debug, forced)


def draw_all(path: Path, folder: Path, say: Callable[[str], None]) -> tuple[Figures, list[tuple[Path, bytes]]]:
    """Every picture of a file of results, and where it belongs."""
    found = read(path)
    parts = experiments(found)
    if not parts:
        raise ExperimentError(f"{path} holds no final runs yet, only searches for learning rates. Let equinorm train finish.")
    drawn = []
    for part in parts:
        say(f"drawing {part.title}")
        drawn += [(folder / f"{part.name}-{name}.png", content) for name, content in pictures(part).items()]
    titles = tuple(part.title for part in parts)
    return Figures(str(path), len(found), titles, tuple(str(file) for file, _ in drawn)), drawn


def shown(record: Figures) -> RenderableType:
    """What `equinorm figures` prints."""
    pairs = [("results", f"{record.results}, {record.runs:,} runs")]
    return facts([*pairs, *(("experiment", title) for title in record.experiments), *(("written", p) for p in record.pictures)])
