"""`equinorm compare` on two checkpoints' folders: their weights, a component at a time."""

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from equinorm._errors import describe
from equinorm.checkpoints.comparing import CANONICAL, difference
from equinorm.cli.folders import Folder, Meter
from equinorm.cli.terminal import Steps
from equinorm.cli.weights import InputError
from equinorm.reporting.tables import facts, table


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor whose channels differ once scales are taken out, relatively by this much."""

    tensor: str
    difference: float


@dataclass(frozen=True, slots=True)
class StreamedComparison:
    """Record of `equinorm compare` on two folders; outputs are not computed.

    `same_weights` is whether every byte is the same; `difference` is relative, once the first is rescaled.
    """

    model_a: str
    model_b: str
    equivalent: bool
    difference: float
    tolerance: float
    different: tuple[TensorDifference, ...]
    num_scales: int
    largest_scale: float
    same_weights: bool
    dead: int
    notes: tuple[str, ...] = ()


def streamed_comparison(a: Folder, b: Folder, steps: Steps) -> StreamedComparison:
    """Decide whether a rescaling joins the weights of two folders.

    Raises:
        EquinormError: if their models run different operations, or hold other tensors.
    """
    if a.symmetries.fingerprint != b.symmetries.fingerprint:
        names = f"{a.checkpoint.folder} and {b.checkpoint.folder}"
        raise InputError(f"{names} run different operations: rescalings join networks of one architecture only.")
    task = a.task(CANONICAL)
    held, notes = task.held()
    meter = Meter(steps, "comparing", a.checkpoint.size + b.checkpoint.size)
    found = difference(task, b.checkpoint, held, meter.tick)
    if found.dead and found.different:
        notes.append(f"{found.dead:,} channels are dead: no weights tell their scales, which were taken for 1")
    return StreamedComparison(
        model_a=f"{a.checkpoint.folder} ({describe(a.loaded.model)})",
        model_b=f"{b.checkpoint.folder} ({describe(b.loaded.model)})",
        equivalent=found.largest <= found.tolerance,
        difference=found.largest,
        tolerance=found.tolerance,
        different=tuple(TensorDifference(*pair) for pair in found.different),
        num_scales=found.log_scales.numel(),
        largest_scale=float(found.log_scales.abs().max().exp()) if found.log_scales.numel() else 1.0,
        same_weights=found.largest == 0 and not bool(found.log_scales.any()),
        dead=found.dead,
        notes=tuple(notes),
    )


def shown_streamed(record: StreamedComparison) -> RenderableType:
    """What `equinorm compare` prints for two folders."""
    verdict = "rescaling-equivalent" if record.equivalent else "not rescaling-equivalent"
    verdict = "the same" if record.same_weights else verdict
    pairs = [
        ("first", record.model_a),
        ("second", record.model_b),
        ("weights", f"{verdict}: once rescaled they differ by {record.difference:.1e}; tolerance {record.tolerance:g}"),
    ]
    if record.equivalent:
        pairs.append(("scales", f"{record.num_scales:,}, the largest ×{record.largest_scale:.4g} or its inverse"))
    pairs += [("note", note) for note in record.notes]
    if not record.different:
        return facts(pairs)
    rows = [(row.tensor, f"{row.difference:.1e}") for row in record.different[:20]]
    return Group(facts(pairs), Text(), table("Tensors that differ", [("tensor", False), ("difference", True)], rows))
