"""`equinorm inspect`: which channels can be rescaled, and why the others cannot."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from equinorm._display import count
from equinorm._symmetries import Symmetries, symmetries
from equinorm.balancing.options import BalanceOptions
from equinorm.checkpoints.solving import components_of, size_of
from equinorm.cli.folders import Folder, analysed
from equinorm.cli.loading import Loaded, ModelSource, is_folder, load
from equinorm.cli.options import Debug, Inputs, Json, Model, Opaque, Result, Settings, Train, Trust, Weights
from equinorm.cli.terminal import Steps, run
from equinorm.cli.wording import worded
from equinorm.reporting.tables import facts, table
from equinorm.reporting.words import in_bytes, percent

PREPARED = ("aten.batch_norm", "aten.clamp", "aten.hardtanh", "aten.relu6")
"""Operations that `equinorm equalize` may fold, or set free, before it looks."""

MANY = 20
"""Rows above which those of layers that differ in their number alone become one."""

LAYER = re.compile(r"(?<=[^\d.]\.)\d+(?=\.|$)")
"""A layer's number in a name, or an expert's; not what a layer's own list numbers."""


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """Free classes of one axis: how many, and how many tensors move with any of them."""

    tensor: str
    axis: int
    classes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class PinRow:
    """Channels that cannot scale and the operation and source line that say so."""

    tensor: str
    axis: int
    channels: int
    operation: str
    detail: str
    source: str
    code: str
    module: str


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor: how many of its entries a free class moves."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    role: str
    entries: int
    moving: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """Record of `equinorm inspect`; `moving` and `parameters` count entries of parameters, `notes` are about the weights."""

    model: str
    inputs: str
    num_free: int
    parameters: int
    moving: int
    coverage: float
    families: tuple[FamilyRow, ...]
    pins: tuple[PinRow, ...]
    tensors: tuple[TensorRow, ...]
    seconds_export: float
    seconds_labels: float
    notes: tuple[str, ...] = ()


def inspect(
    model: Model,
    weights: Weights = None,
    settings: Settings = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    train: Train = None,
    device: Annotated[str, typer.Option(help="cpu; or meta, where a model has shapes and no numbers.")] = "cpu",
    trust_remote_code: Trust = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which channels can be rescaled, and why the others cannot."""

    def work(steps: Steps) -> Result:
        if is_folder(model) and weights is None and not settings and device == "cpu" and not train:
            record = of_folder(analysed(model, steps, inputs or (), opaque or (), trust_remote_code))
            return record, shown(record), 0
        steps.say(f"loading {model}")
        loaded = load(ModelSource(model, weights, settings or (), trust_remote_code, device, train), inputs or ())
        steps.say("finding symmetries")
        record = inspection(loaded, symmetries(loaded.model, loaded.args, loaded.kwargs, opaque=opaque or ()))
        return record, shown(record), 0

    run(work, json, debug)


def of_folder(folder: Folder) -> Inspection:
    """The record of a checkpoint's folder, whose weights are not read."""
    checkpoint, task = folder.checkpoint, folder.task(BalanceOptions())
    held, why = task.held()
    sizes = [size_of(part, checkpoint) for part in components_of(task, held)]
    files = count(len(checkpoint.files), "file")
    notes = [f"{files} of {in_bytes(checkpoint.size)}; no weights were read"]
    if sizes:
        notes.append(f"{count(len(sizes), 'component')}, to be solved one by one; the largest is {in_bytes(max(sizes))}")
    if folder.conversion.converted:
        one = "tensor of the files is part of another in the model, or holds several"
        many = "tensors of the files are parts of others in the model, or hold several"
        notes.append(count(folder.conversion.converted, one, many))
    return inspection(replace(folder.loaded, notes=(*notes, *why, *folder.notes)), folder.symmetries)


def inspection(loaded: Loaded, symmetries: Symmetries) -> Inspection:
    """The record of a model's symmetries."""
    tensors = tuple(
        TensorRow(
            s.names, s.shape, s.kind, s.role if s.kind == "parameter" else "buffer", s.numel, round(s.numel * s.moving_share)
        )
        for s in symmetries.scalings
    )
    parameters = [row for row in tensors if row.kind == "parameter"]
    starts = [family.ids.start for family in symmetries.families]
    moved = np.zeros(len(starts) + 1, int)  # how many tensors each family moves
    for scaling in symmetries.scalings:
        moved[np.unique(np.searchsorted(starts, scaling.free().numpy(), side="right"))] += 1
    families = tuple(
        FamilyRow(f.tensor, f.axis, len(f.ids), int(n)) for f, n in zip(symmetries.families, moved[1:], strict=True)
    )
    pins = tuple(
        PinRow(pin.tensor, pin.axis, pin.channels, r.operation, worded(r.detail), r.source, r.code, r.module)
        for pin in symmetries.pins
        for r in (pin.reason,)
    )
    return Inspection(
        model=loaded.title,
        inputs=loaded.inputs,
        num_free=symmetries.num_free,
        parameters=sum(row.entries for row in parameters),
        moving=sum(row.moving for row in parameters),
        coverage=symmetries.coverage,
        families=families,
        pins=pins,
        tensors=tensors,
        seconds_export=symmetries.seconds[0],
        seconds_labels=symmetries.seconds[1],
        notes=(*loaded.notes, *_of_preparing(pins, loaded.model.training)),
    )


def _of_preparing(pins: Sequence[PinRow], trains: bool) -> list[str]:
    """What moves more, in a sentence, where normalization in evaluation mode or bounds pin channels."""
    held = 0 if trains else sum(pin.channels for pin in pins if pin.operation.rstrip("_") in PREPARED)
    if not held:
        return []
    return [f"batch normalization and bounds pin {count(held, 'channel')}: `equinorm equalize` folds and frees what it can"]


def shown(record: Inspection) -> RenderableType:
    """What `equinorm inspect` prints."""
    share = percent(record.moving, record.parameters)
    head = facts(
        [
            ("model", record.model),
            ("inputs", record.inputs),
            ("free classes", f"{record.num_free:,} in {count(len(record.families), 'family', 'families')}"),
            ("coverage", f"{share}: free classes move {record.moving:,} of {record.parameters:,} parameters"),
            ("time", f"{record.seconds_export:.2f} s to export the model, {record.seconds_labels:.2f} s to find its classes"),
        ],
        record.notes,
    )
    free = _free(record) if record.families else Text("No free class: every channel is pinned.\n")
    return Group(head, Text(), free, _coverage(record), _pinned(record) if record.pins else Text("Nothing is pinned."))


def _free(record: Inspection) -> RenderableType:
    """The families of free classes."""
    return table(
        "Free scale classes",
        [("family", False), ("classes", True), ("tensors moved", True)],
        _joined([((f"{row.tensor}[{row.axis}]",), (row.classes, row.tensors)) for row in record.families]),
        ("total", f"{record.num_free:,}", ""),
    )


def _coverage(record: Inspection) -> RenderableType:
    """How many entries of weights and of biases move."""

    def line(label: str, tensors: int, entries: int, moving: int) -> tuple[str, ...]:
        return label, f"{tensors:,}", f"{entries:,}", f"{moving:,}", percent(moving, entries)

    lines = []
    for role, label in (("weight", "weights"), ("bias", "biases")):
        chosen = [row for row in record.tensors if row.role == role]
        lines.append(line(label, len(chosen), sum(row.entries for row in chosen), sum(row.moving for row in chosen)))
    number = sum(row.kind == "parameter" for row in record.tensors)
    columns = [("", False), ("tensors", True), ("entries", True), ("moving", True), ("share", True)]
    return table("Coverage", columns, lines, line("parameters", number, record.parameters, record.moving))


def _pinned(record: Inspection) -> RenderableType:
    """What cannot scale, and which operation says so."""
    return table(
        "Pinned channels",
        [("axis", False), ("channels", True), ("reason", False), ("source line", False), ("module", False)],
        [(axis, channels, *words) for axis, *words, channels in _joined([_of_pin(pin) for pin in record.pins])],
        ("total", f"{sum(pin.channels for pin in record.pins):,}", "", "", ""),
    )


def _of_pin(pin: PinRow) -> tuple[tuple[str, ...], tuple[int]]:
    """Texts and number of a row of the table of pins."""
    reason = pin.operation + (f": {pin.detail}" if pin.detail else "")
    source = pin.source + (f"  {pin.code}" if pin.code else "")
    return (f"{pin.tensor}[{pin.axis}]", reason, source, pin.module), (pin.channels,)


def _joined(rows: Sequence[tuple[tuple[str, ...], tuple[int, ...]]]) -> list[tuple[str, ...]]:
    """Rows of texts and numbers as texts: where they are many, those whose texts differ in a layer's number alone are one.

    >>> _joined([((f"layers.{layer}.up[0]",), (8, 2)) for layer in range(30)])
    [('layers.*.up[0] × 30', '240', '60')]
    """
    found: dict[tuple[str, ...], list[tuple[tuple[str, ...], tuple[int, ...]]]] = {}
    for texts, numbers in rows:
        key = tuple(text if " " in text else LAYER.sub("*", text) for text in texts) if len(rows) > MANY else texts
        found.setdefault(key, []).append((texts, numbers))
    joined = []
    for key, same in found.items():
        first, *others = same[0][0] if len(same) == 1 else (f"{key[0]} × {len(same)}", *key[1:])
        sums = (sum(column) for column in zip(*(numbers for _, numbers in same), strict=True))
        joined.append((first, *others, *(f"{number:,}" for number in sums)))
    return joined
