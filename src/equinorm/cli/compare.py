"""`equinorm compare`: do two models put out the same, and what joins their weights?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from equinorm._deviation import LIMITS, coarsest, deviation
from equinorm._display import count, listed
from equinorm._errors import EquinormError, dtype_name
from equinorm.checkpoints.comparing import Apart, Difference
from equinorm.cli.folders import Folder, analysed
from equinorm.cli.loading import Loaded, ModelSource, is_folder
from equinorm.cli.options import MODELS, Debug, Inputs, Json, ModelB, Opaque, Result, Settings, Train, Trust, Weights, WeightsB
from equinorm.cli.pairs import load_pair
from equinorm.cli.streamed_comparison import streamed_difference, unlike_settings, why_not_loaded
from equinorm.cli.terminal import Steps, run
from equinorm.cli.weights import InputError
from equinorm.cli.wording import worded
from equinorm.joining.differences import Change
from equinorm.joining.equivalence import Equivalence, equivalence
from equinorm.reporting import words
from equinorm.reporting.tables import facts, table

_ROWS = 20
"""Tensors that are shown; the record has all."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Record of `equinorm compare`.

    `equivalent`, `joined_by`, `difference`, `tolerance` and `different` (its `changes`) are those of `equinorm.equivalence`.
    They are None where the networks have different tensors, so that nothing can join them; `note` says so. Else it says what
    the verdict does not. `same_weights` is whether nothing had to be joined and nothing differs.

    Folders that were compared in parts were not run: `inputs`, `deviation`, `limit` and `same_outputs` are None then, and
    `difference` is relative to the second, once the first is rescaled.
    """

    model_a: str
    model_b: str
    inputs: str | None = None
    deviation: float | None = None
    limit: float | None = None
    same_outputs: bool | None = None
    equivalent: bool | None = None
    same_weights: bool | None = None
    joined_by: tuple[str, ...] | None = None
    difference: float | None = None
    tolerance: float | None = None
    different: tuple[Change, ...] | tuple[Apart, ...] = ()
    num_scales: int | None = None
    largest_scale: float | None = None
    note: str = ""
    notes: tuple[str, ...] = ()


def compare(
    model_a: Annotated[str, typer.Argument(metavar="A", help=MODELS)],
    model_b: ModelB,
    weights: Weights = None,
    weights_b: WeightsB = None,
    settings: Settings = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    train: Train = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the outputs of two models, and tell what joins their weights: a rescaling, a permutation of channels, or both.

    Exit code 0 if the outputs are equal up to rounding, 1 if they differ, 2 if they could not be compared, for any reason.

    Of two checkpoints' FOLDERs the weights decide: they are read in parts, and loaded where no rescaling joins them.
    """

    def work(steps: Steps) -> Result:
        source = ModelSource(model_a, weights, settings or (), trust_remote_code, train=train)
        if is_folder(model_a) and is_folder(model_b) and not (weights or weights_b or settings or train):
            record = of_folders(source, model_b, inputs or (), opaque or (), steps)
            return record, shown(record), int(not record.equivalent)
        a, b, hint = load_pair(source, model_b, weights_b, inputs or (), steps)
        steps.say("comparing")
        record = comparison(a, b, opaque or (), hint)
        return record, shown(record), int(not record.same_outputs)

    run(work, json, debug)


def of_folders(source: ModelSource, other: str, inputs: Sequence[str], opaque: Sequence[str], steps: Steps) -> Comparison:
    """Compare the weights of two folders in parts; load both where that does not decide, if there is memory.

    Raises:
        EquinormError: if their models run different operations, or hold other tensors.
    """
    a, b = (analysed(name, steps, inputs, opaque, source.trust) for name in (source.name, other))
    found, notes = streamed_difference(a, b, steps)
    unlike = unlike_settings(a.checkpoint.folder, b.checkpoint.folder)
    record = _in_parts(a, b, found, (*notes, *unlike))
    if found.largest <= found.tolerance and not (record.equivalent and unlike):
        return record  # a little training leaves channels where they are
    note = why_not_loaded(a.checkpoint, b.checkpoint)
    if not note:
        try:
            first, second, _ = load_pair(source, other, None, inputs, steps)
            steps.say("looking for orders of channels and signs")
            loaded = comparison(first, second, opaque)
            if loaded.equivalent is not None:
                return replace(loaded, notes=(*loaded.notes, *unlike))
            note = loaded.note
        except EquinormError as error:
            note = worded(str(error))
    if record.equivalent:
        raise InputError(f"a rescaling joins the weights, but {unlike[0]}, and whether outputs agree was not computed: {note}.")
    missed = f"orders of channels and flips of sign were not looked for, and outputs not compared: {note}"
    return replace(record, notes=(*record.notes, missed))


def _in_parts(a: Folder, b: Folder, found: Difference, notes: tuple[str, ...]) -> Comparison:
    """The record of two folders whose weights were compared in parts, and not run."""
    largest = float(found.log_scales.abs().max()) if found.log_scales.numel() else 0.0
    is_near, is_joined = found.largest <= found.tolerance, not found.different
    return Comparison(
        model_a=a.loaded.title,
        model_b=b.loaded.title,
        equivalent=is_joined,
        same_weights=found.largest == 0 == largest,
        joined_by=("rescaling",) if is_joined and largest > found.tolerance else (),
        difference=found.largest,
        tolerance=found.tolerance,
        different=found.different,
        num_scales=found.log_scales.numel(),
        largest_scale=math.exp(largest),
        note="" if is_joined or not is_near else _tuned(found),
        notes=notes,
    )


def _tuned(found: Difference) -> str:
    """What the entries say that differ where no channel does by more than the tolerance."""
    entries, size = (sum(counts) for counts in zip(*((part.entries, part.size) for part in found.different), strict=True))
    tensors = count(len(found.different), "tensor")
    return f"{entries:,} of {size:,} entries in {tensors} differ by more than rounding, as after a little training."


def comparison(a: Loaded, b: Loaded, opaque: Sequence[str] = (), hint: str = "") -> Comparison:
    """Run both models on the inputs of the first, and decide what joins their weights.

    Args:
        a: one model.
        b: another.
        opaque: names of submodules that are not looked into.
        hint: what to note if the outputs differ.

    Raises:
        EquinormError: if one does not run, or their outputs have different shapes.
    """
    limit = LIMITS[coarsest(a.model, b.model)]
    try:
        apart = deviation(a.model, b.model, a.args, a.kwargs)
    except EquinormError as error:
        dtypes = [sorted(dtype_name(dtype) for dtype in {t.dtype for t in m.parameters()}) for m in (a.model, b.model)]
        if dtypes[0] == dtypes[1]:
            raise
        held = " and ".join(f"{side.name} holds {', '.join(found)}" for side, found in zip((a, b), dtypes, strict=True))
        raise InputError(f"{held}: they do not run on the same inputs. Name weights of one dtype. {error}") from error
    same = apart <= limit
    notes = (*a.notes, *b.notes, *([hint] if hint and not same else []))
    record = Comparison(a.title, b.title, a.inputs, apart, limit, same_outputs=same, notes=notes)
    try:
        found = equivalence(a.model, b.model, a.args, a.kwargs, opaque=opaque)
    except EquinormError as error:  # other architectures, dead ends of the solver: outputs are compared all the same
        return replace(record, note=worded(str(error)))
    return replace(
        record,
        equivalent=found.equivalent,
        same_weights=_are_same(found),
        joined_by=found.joined_by,
        difference=found.difference,
        tolerance=found.tolerance,
        different=found.changes,
        num_scales=found.log_scales.numel(),
        largest_scale=float(found.log_scales.abs().max().exp()) if found.log_scales.numel() else None,
        note=" ".join(found.notes),
    )


def _are_same(found: Equivalence) -> bool:
    """Does nothing differ, and did nothing have to be joined?"""
    return found.difference == 0 and not bool(found.log_scales.any()) and found.permutation is found.signs is None


def shown(record: Comparison) -> RenderableType:
    """What `equinorm compare` prints."""
    pairs = [("first", record.model_a), ("second", record.model_b)]
    if record.deviation is not None and record.limit is not None:
        outputs = "equal" if record.same_outputs else "different"
        outputs += f": deviation {words.deviation(record.deviation)}; limit {record.limit:g}"
        pairs += [("inputs", str(record.inputs)), ("outputs", outputs)]
    pairs += [("note", note) for note in record.notes]
    if record.equivalent is None or record.difference is None:
        pairs.append(("weights", f"not compared: {record.note}"))
        return facts(pairs)
    pairs.append(("weights", f"{_verdict(record)} by {record.difference:.1e}; tolerance {record.tolerance:g}"))
    if "rescaling" in (record.joined_by or ()) and record.largest_scale is not None:
        pairs.append(("scales", f"{record.num_scales:,}, the largest ×{record.largest_scale:.4g} or its inverse"))
    if record.note:
        pairs.append(("note", record.note))
    if not record.different:
        return facts(pairs)
    columns = [("tensor", False), ("difference", True), ("entries", True), ("most", False), ("first", True), ("second", True)]
    rows, total = [_row(change) for change in record.different[:_ROWS]], len(record.different)
    title = "Tensors that differ" + (f": the first {_ROWS} of {total}" if total > _ROWS else "")
    return Group(facts(pairs), Text(), table(title, columns[: len(rows[0])], rows))


def _verdict(record: Comparison) -> str:
    """What joins the weights, and of what the difference is told."""
    in_parts = record.deviation is None
    if not record.equivalent and in_parts and record.note:
        return "near, but not rescaling-equivalent: once rescaled they differ"
    if not record.equivalent:
        return f"not {'rescaling-equivalent: once rescaled' if in_parts else 'equivalent: brought together,'} they differ"
    joined = f"equivalent by {listed(record.joined_by or ())}"
    verdict = "rescaling-equivalent" if record.joined_by in ((), ("rescaling",)) else joined
    return f"{'the same' if record.same_weights else verdict}: {'once rescaled they' if in_parts else 'canonical forms'} differ"


def _row(change: Change | Apart) -> tuple[str, ...]:
    """A tensor that differs, in a table."""
    if isinstance(change, Apart):
        return change.tensor, f"{change.difference:.1e}"
    entries = f"{change.entries:,} of {change.size:,}" + (f", {change.where}" if change.where else "")
    most = f"[{', '.join(map(str, change.index))}]"
    return change.tensor, f"{change.difference:.1e}", entries, most, f"{change.first:.4g}", f"{change.second:.4g}"
