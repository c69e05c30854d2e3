"""`equinorm train`: train a network with several methods and compare them."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from equinorm._display import count
from equinorm.cli.options import Debug, Force, Json, Result
from equinorm.cli.terminal import Steps, run
from equinorm.cli.wording import forced
from equinorm.experiments.config import DEFAULTS, METHODS, ExperimentError, Sweep, convert
from equinorm.experiments.figures import overview_png
from equinorm.experiments.presets import PRESETS, preset
from equinorm.experiments.protocol import Cell, MethodComparison, Report, compare
from equinorm.experiments.results import Results
from equinorm.experiments.series import experiments
from equinorm.experiments.workers import Here, Place, Pool
from equinorm.reporting.files import check_target, write_atomically
from equinorm.reporting.tables import facts, table

PICTURE = Path("equinorm-train.png")
"""Replaced without asking: every sweep writes it, unless told another place."""

SHARED = [name for name in DEFAULTS if name not in ("method", "depth", "batch", "lr", "seed", "held_out")]
"""Settings that all runs of a sweep share; the others have options of their own."""


def train(
    preset: Annotated[str, typer.Option(help=f"Of {', '.join(PRESETS)}; or a .json or .yaml file.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Folder of the images, for every preset but digits.")] = None,
    methods: Annotated[str | None, typer.Option(help=f"Of {', '.join(METHODS)}; 'bn enorm:c=1.2,clip=1' with options.")] = None,
    depths: Annotated[str | None, typer.Option(help="Square layers of the fully connected network, such as 1,9,15.")] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes, such as 16,64,256.")] = None,
    lrs: Annotated[str | None, typer.Option(help="Where the search for learning rates starts, such as 0.02,0.1,0.5.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Final runs of each method.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of final runs.")] = None,
    select_epochs: Annotated[int | None, typer.Option(help="Of runs that choose the learning rate; 0: --lrs says it.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=f"Of all runs, as clip=1: {', '.join(SHARED)}.")] = None,
    results: Annotated[Path | None, typer.Option(help="Append results to this .jsonl file, and repeat none in it.")] = None,
    picture: Annotated[Path, typer.Option(help="Where to write the picture: .png.")] = PICTURE,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a network with several methods and compare them.

    Learning rates are chosen on held-out training images. Without arguments: deep networks on scikit-learn's digits.
    """

    def work(steps: Steps) -> Result:
        lists = {"methods": methods, "depths": depths, "batches": batches, "lrs": lrs}
        numbers = {"seeds": seeds, "select_epochs": select_epochs}
        shared = [*(settings or []), *([f"epochs={epochs}"] if epochs is not None else [])]
        asked = sweep(preset, {**lists, **numbers}, shared)
        check_target(picture, (".png",), force or picture == PICTURE)
        record, content = run_sweep(asked, data, results, workers, device, steps.count)
        write_atomically([(picture, content)], True)
        record = replace(record, picture=str(picture))
        return record, shown(record), 0

    run(work, json, debug, forced)


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
    if not all(isinstance(count, int) and count >= 1 for count in (result.seeds, result.base.epochs)):
        raise ExperimentError("seeds and epochs must be at least 1.")
    if not isinstance(result.select_epochs, int) or result.select_epochs < 0:
        raise ExperimentError("--select-epochs must be at least 1, or 0 to take the first of --lrs.")
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


def run_sweep(
    asked: Sweep, folder: Path | None, results: Path | None, workers: int | None, device: str, report: Report
) -> tuple[MethodComparison, bytes]:
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
    place = Place(folder, device, kept.unfinished)
    pool = Pool(workers, place) if workers > 1 else Here(place)
    try:
        cells, runs, repeated = compare(asked, kept, pool, report)
    finally:
        pool.stop()
    chosen = [replace(cell.run, seed=seed) for cell in cells for seed in range(asked.seeds)]
    content = overview_png(experiments(kept.by_run[run] for run in chosen)[0])
    return MethodComparison(asked, cells, runs, repeated, str(results) if results else None), content


def shown(record: MethodComparison) -> RenderableType:
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
            ("results", record.results),
            ("picture", record.picture),
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
    rates = "from held-out images" if record.sweep.select_epochs else "as given"
    title = f"Final weights after {count(base.epochs, 'epoch')}, {count(record.sweep.seeds, 'seed')}; learning rates {rates}"
    return Group(head, Text(), table(title, columns, rows))


def _remark(cell: Cell) -> str:
    parts = [f"{cell.diverged} diverged"] if cell.diverged else []
    return ", ".join([*parts, *(["learning rate at the end of the grid"] if cell.edge else [])])
