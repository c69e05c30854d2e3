"""`equinorm compare`: do two models put out the same, and what joins their weights?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from equinorm._deviation import deviation
from equinorm._display import listed
from equinorm._errors import EquinormError, describe, describe_inputs
from equinorm.cli.exactness import LIMITS, coarsest
from equinorm.cli.folders import analysed, is_folder
from equinorm.cli.loading import Loaded, Source
from equinorm.cli.options import MODELS, Debug, Inputs, Json, Opaque, Result, Settings, Train, Trust, Weights
from equinorm.cli.pairs import load_pair
from equinorm.cli.streamed_comparison import shown_streamed, streamed_comparison
from equinorm.cli.terminal import Steps, run
from equinorm.cli.weights import InputError, dtype_name
from equinorm.cli.wording import worded
from equinorm.joining.differences import Change
from equinorm.joining.equivalence import equivalence
from equinorm.reporting import words
from equinorm.reporting.tables import facts, table


@dataclass(frozen=True, slots=True)
class Comparison:
    """Record of `equinorm compare`.

    `equivalent`, `joined_by`, `difference`, `tolerance` and `different` (its `changes`) are those of `equinorm.equivalence`.
    They are None where the networks have different tensors, so that nothing can join them; `note` says so. Else it says what
    the verdict does not.
    """

    model_a: str
    model_b: str
    inputs: str
    deviation: float
    limit: float
    same_outputs: bool
    equivalent: bool | None
    joined_by: tuple[str, ...] | None
    difference: float | None
    tolerance: float | None
    different: tuple[Change, ...]
    num_scales: int | None
    largest_scale: float | None
    note: str
    notes: tuple[str, ...] = ()


def compare(
    model_a: Annotated[str, typer.Argument(metavar="A", help=MODELS)],
    model_b: Annotated[str, typer.Argument(metavar="B", help="Another one, or a file of weights for A.")],
    weights: Weights = None,
    weights_b: Annotated[Path | None, typer.Option(help="Load these weights into B.")] = None,
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

    Of two checkpoints' FOLDERs the weights alone are compared, in parts.
    """

    def work(steps: Steps) -> Result:
        if is_folder(model_a) and is_folder(model_b) and not (weights or weights_b or settings or train):
            first, other = (analysed(n, steps, inputs or (), opaque or (), trust_remote_code) for n in (model_a, model_b))
            streamed = streamed_comparison(first, other, steps)
            return streamed, shown_streamed(streamed), int(not streamed.equivalent)
        source = Source(model_a, weights, settings or (), trust_remote_code, train=train)
        a, b, hint = load_pair(source, model_b, weights_b, inputs or (), steps)
        steps.say("comparing")
        record = comparison(a, b, opaque or (), hint)
        return record, shown(record), int(not record.same_outputs)

    run(work, json, debug)


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
    found, note = None, ""
    try:
        found = equivalence(a.model, b.model, a.args, a.kwargs, opaque=opaque)
    except EquinormError as error:  # other architectures, dead ends of the solver: outputs are compared all the same
        note = worded(str(error))
    scales = found.log_scales.abs().max() if found is not None and found.log_scales.numel() else None
    return Comparison(
        model_a=f"{a.name} ({describe(a.model)})",
        model_b=f"{b.name} ({describe(b.model)})",
        inputs=describe_inputs(a.args, a.kwargs),
        deviation=apart,
        limit=limit,
        same_outputs=apart <= limit,
        equivalent=None if found is None else found.equivalent,
        joined_by=None if found is None else found.joined_by,
        difference=None if found is None else found.difference,
        tolerance=None if found is None else found.tolerance,
        different=() if found is None else found.changes,
        num_scales=None if found is None else found.log_scales.numel(),
        largest_scale=None if scales is None else float(scales.exp()),
        note=note if found is None else " ".join(found.notes),
        notes=(*a.notes, *b.notes, *([hint] if hint and not apart <= limit else [])),
    )


def shown(record: Comparison) -> RenderableType:
    """What `equinorm compare` prints."""
    outputs = "equal" if record.same_outputs else "different"
    pairs = [
        ("first", record.model_a),
        ("second", record.model_b),
        ("inputs", record.inputs),
        ("outputs", f"{outputs}: deviation {words.deviation(record.deviation)}; limit {record.limit:g}"),
        *(("note", note) for note in record.notes),
    ]
    if record.equivalent is None or record.difference is None:
        pairs.append(("weights", f"not compared: {record.note}"))
        return facts(pairs)
    verdict = (
        "rescaling-equivalent: canonical forms differ" if record.equivalent else "not equivalent: brought together, they differ"
    )
    if record.joined_by and record.joined_by != ("rescaling",):
        verdict = f"equivalent by {listed(record.joined_by)}: canonical forms differ"
    pairs.append(("weights", f"{verdict} by {record.difference:.1e}; tolerance {record.tolerance:g}"))
    if "rescaling" in (record.joined_by or ()) and record.largest_scale is not None:
        pairs.append(("scales", f"{record.num_scales:,}, the largest ×{record.largest_scale:.4g} or its inverse"))
    if record.note:
        pairs.append(("note", record.note))
    if not record.different:
        return facts(pairs)
    columns = [("tensor", False), ("difference", True), ("entries", True), ("most", False), ("first", True), ("second", True)]
    return Group(facts(pairs), Text(), table("Tensors that differ", columns, [_row(change) for change in record.different]))


def _row(change: Change) -> tuple[str, ...]:
    """A tensor that differs, in a table."""
    entries = f"{change.entries:,} of {change.size:,}" + (f", {change.where}" if change.where else "")
    most = f"[{', '.join(map(str, change.index))}]"
    return change.tensor, f"{change.difference:.1e}", entries, most, f"{change.first:.4g}", f"{change.second:.4g}"
