"""`equinorm canonical`: write the weights that all permuted and rescaled copies of a network share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from equinorm._deviation import LIMITS
from equinorm._display import count
from equinorm.cli.exactness import VERIFYING, remedy, verified
from equinorm.cli.loading import ModelSource, load
from equinorm.cli.memory import check_room
from equinorm.cli.onnx_files import is_onnx
from equinorm.cli.options import OF_PYTORCH, Debug, Force, Inputs, Json, Opaque, Result, Settings, Train, Trust, Weights
from equinorm.cli.terminal import Steps, run
from equinorm.cli.weights import InputError
from equinorm.cli.writing import check_fits, save_like, source_of
from equinorm.joining.canonical import canonical_
from equinorm.modules.copying import duplicate
from equinorm.reporting import words
from equinorm.reporting.tables import facts


@dataclass(frozen=True, slots=True)
class Canonicalizing:
    """Record of `equinorm canonical`."""

    model: str
    inputs: str
    num_scales: int
    families_moved: int
    signs_flipped: int
    ties: int
    power_of_two: bool
    deviation: float
    limit: float
    output: str
    notes: tuple[str, ...] = ()


def canonical(
    model: Annotated[str, typer.Argument(help=OF_PYTORCH)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Write to this .safetensors file, of a FOLDER to this folder.")
    ],
    weights: Weights = None,
    settings: Settings = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="Round scales to powers of two: permuted copies give the same file, bitwise.")
    ] = False,
    train: Train = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a network's canonical weights: balanced, and channels sorted by an order that permutations cannot change.

    Copies of a network that were permuted and rescaled give the same weights. The deviation of outputs is verified first.
    """

    def work(steps: Steps) -> Result:
        if is_onnx(model):
            raise InputError(f"{model} is an ONNX file: canonical weights are written of PyTorch's models only.")
        like = source_of(model, output, force)
        check_room(model)
        steps.say(f"loading {model}")
        loaded = load(ModelSource(model, weights, settings or (), trust_remote_code, train=train), inputs or ())
        check_fits(loaded.model, like)
        original = duplicate(loaded.model, VERIFYING)
        steps.say("balancing and sorting")
        found = canonical_(loaded.model, loaded.args, loaded.kwargs, power_of_two=power_of_two, opaque=opaque or ())
        apart, dtype = verified("canonical", loaded.model, original, loaded, remedy(power_of_two))
        steps.say("writing")
        left = save_like(like, loaded.model, output, force)
        record = Canonicalizing(
            model=loaded.title,
            inputs=loaded.inputs,
            num_scales=len(found.log_scales),
            families_moved=len(found.permutation),
            signs_flipped=found.num_flipped,
            ties=found.ties,
            power_of_two=power_of_two,
            deviation=apart,
            limit=LIMITS[dtype],
            output=str(output),
            notes=(*loaded.notes, *left),
        )
        return record, shown(record), 0

    run(work, json, debug)


def shown(record: Canonicalizing) -> RenderableType:
    """What `equinorm canonical` prints."""
    rounded = ", rounded to powers of two" if record.power_of_two else ""
    pairs = [
        ("model", record.model),
        ("inputs", record.inputs),
        ("scales", f"{record.num_scales:,} balanced{rounded}"),
        ("signs", f"{record.signs_flipped:,} flipped"),
        ("channels", f"{count(record.families_moved, 'family', 'families')} in another order"),
    ]
    if record.ties:
        pairs.append(("ties", f"{count(record.ties, 'channel')} that weights do not tell from others, in any order"))
    pairs.append(("deviation", f"{words.deviation(record.deviation)}; limit {record.limit:g}"))
    return facts([*pairs, ("written", record.output)], record.notes)
