"""What `equinorm train` and `equinorm figures` do."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from equinorm.experiments.config import DEFAULTS, ExperimentError, Sweep, convert
from equinorm.experiments.figures import overview_png, pictures
from equinorm.experiments.presets import preset
from equinorm.experiments.protocol import Cell, Comparison, Report, compare
from equinorm.experiments.results import Results, read
from equinorm.experiments.series import experiments
from equinorm.experiments.workers import Here, Pool
from equinorm.reporting.tables import facts, table

SHARED = [name for name in DEFAULTS if name not in ("method", "depth", "batch", "lr", "seed", "held_out")]
"""Settings that all runs of a sweep share; the others have options of their own."""


def sweep(name: str, options: Mapping[str, Any], settings: list[str]) -> Sweep:
    """A preset with changes.

    Args:
        name: of the preset.
        options: lists separated by commas or numbers, by field of `Sweep`; None where the preset's stays.
        settings: "field=value" for fields of `Run` that all runs share.

    Raises:
        ExperimentError: for a preset, an option or a value that does not exist.
    """
    result = preset(name)
    base = result.base
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in SHARED:
            raise ExperimentError(f"--set {setting}: {key!r} is no setting that all runs share. Those are {', '.join(SHARED)}.")
        base = replace(base, **{key: convert(key, value)})
    changes: dict[str, Any] = {"base": base}
    kinds = {"methods": str, "depths": int, "batches": int, "lrs": float}
    for key, value in options.items():
        if value is None:
            continue
        changes[key] = _list(key, value, kinds[key]) if key in kinds else value
    result = replace(result, **changes)
    if not all(isinstance(count, int) and count >= 1 for count in (result.seeds, result.select_epochs, result.base.epochs)):
        raise ExperimentError("seeds and epochs must be at least 1.")
    return result


def _list(key: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Values separated by spaces, or by commas where they hold none."""
    parts = text.split() if " " in text or ":" in text else text.split(",")
    try:
        values = tuple(kind(part) for part in parts if part)
    except ValueError:
        values = ()
    if not values:
        example = "bn,enorm" if kind is str else "1,2,5"
        raise ExperimentError(f"--{key} {text!r}: write values such as {example}.")
    return values


def run(
    asked: Sweep, folder: Path | None, results: Path | None, workers: int | None, device: str, report: Report
) -> tuple[Comparison, bytes]:
    """Run a sweep in so many processes (by default one for each core, or one on a GPU); returns its record and picture."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise ExperimentError(f"--device {device}: there are cpu, cuda and one of several, such as cuda:1.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ExperimentError("there is no CUDA device. Leave out --device.")
    if workers is not None and workers < 1:
        raise ExperimentError(f"--workers must be at least 1, not {workers}.")
    if workers is None:
        workers = 1 if device != "cpu" else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if results is not None and results.suffix != ".jsonl":
        raise ExperimentError(f"results are lines of JSON: name a .jsonl file instead of {results}.")
    kept = Results(results)
    kept.check_writable()
    pool = Pool(workers, folder, device) if workers > 1 else Here(folder, device)
    try:
        cells, runs, repeated = compare(asked, kept, pool, report)
    finally:
        pool.stop()
    chosen = [replace(cell.run, seed=seed) for cell in cells for seed in range(asked.seeds)]
    content = overview_png(experiments(kept.by_run[run] for run in chosen)[0])
    return Comparison(asked, cells, runs, repeated, str(results) if results else None), content


def summary(record: Comparison) -> RenderableType:
    """What `equinorm train` prints."""
    base = record.sweep.base
    head = facts(
        [
            ("data", base.data),
            ("network", base.network + (f", width {base.width}" if base.network == "fc" else "")),
            (
                "runs",
                f"{record.runs:,}, of which {record.repeated:,} were made before" if record.repeated else f"{record.runs:,}",
            ),
            *([("results", record.results)] if record.results else []),
            *([("picture", record.picture)] if record.picture else []),
        ]
    )
    fc = base.network == "fc"
    columns = [
        ("method", False),
        *([("hidden layers", True)] if fc else []),
        ("batch", True),
        ("learning rate", True),
        ("test accuracy", True),
    ]
    columns += [("± std", True), ("seconds", True), ("", False)]
    rows = [
        (
            cell.label,
            *([str(cell.run.hidden_layers)] if fc else []),
            str(cell.run.batch),
            f"{cell.run.lr:g}",
            f"{cell.mean:.2%}",
            "" if cell.deviation is None else f"{100 * cell.deviation:.2f}",
            f"{cell.seconds:.1f}",
            _remark(cell),
        )
        for cell in record.cells
    ]
    title = f"Final weights after {base.epochs} epochs, {record.sweep.seeds} seeds; learning rates from held-out images"
    return Group(head, Text(), table(title, columns, rows))


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


def figures(path: Path, folder: Path, say: Callable[[str], None]) -> tuple[Figures, list[tuple[Path, bytes]]]:
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


def drawn(record: Figures) -> RenderableType:
    """What `equinorm figures` prints."""
    pairs = [("results", f"{record.results}, {record.runs:,} runs")]
    return facts([*pairs, *(("experiment", title) for title in record.experiments), *(("written", p) for p in record.pictures)])


def _remark(cell: Cell) -> str:
    parts = [f"{cell.diverged} diverged"] if cell.diverged else []
    return ", ".join([*parts, *(["learning rate at the end of the grid"] if cell.edge else [])])
