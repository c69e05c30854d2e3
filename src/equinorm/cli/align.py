"""`equinorm align`: permute and rescale one network's weights so that they come near to another's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from equinorm._deviation import LIMITS
from equinorm._display import count
from equinorm._errors import dtype_name
from equinorm._scaling import HALVES
from equinorm.cli.exactness import WIDER, verified
from equinorm.cli.loading import ModelSource
from equinorm.cli.memory import check_room
from equinorm.cli.onnx_files import is_onnx
from equinorm.cli.options import (
    OF_PYTORCH,
    Debug,
    Force,
    Inputs,
    Json,
    ModelB,
    Opaque,
    Result,
    Settings,
    Train,
    Trust,
    Weights,
    WeightsB,
)
from equinorm.cli.pairs import load_pair
from equinorm.cli.terminal import Steps, run
from equinorm.cli.weights import InputError
from equinorm.cli.writing import check_fits, save_like, source_of
from equinorm.joining.alignment import align as aligned
from equinorm.reporting import words
from equinorm.reporting.tables import facts


@dataclass(frozen=True, slots=True)
class Aligning:
    """Record of `equinorm align`: distances are ‖a − b‖₂ / ‖b‖₂ over all parameters."""

    model_a: str
    model_b: str
    inputs: str
    distance_before: float
    distance_after: float
    families: int
    sweeps: int
    deviation: float
    limit: float
    output: str
    notes: tuple[str, ...] = ()


def align(
    model_a: Annotated[str, typer.Argument(metavar="A", help=OF_PYTORCH)],
    model_b: ModelB,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Write A's new weights to this .safetensors file, a FOLDER's to this folder."),
    ],
    weights: Weights = None,
    weights_b: WeightsB = None,
    settings: Settings = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    rescale: Annotated[
        bool | None,
        typer.Option("--rescale/--permute-only", help="Rescale too, or only permute. If neither is said, what comes nearer."),
    ] = None,
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="Round scales to powers of two, as half precision needs.")
    ] = False,
    starts: Annotated[int, typer.Option(min=1, help="From how many orders to start; the best result is taken.")] = 1,
    seed: Annotated[int, typer.Option(help="Of starts beyond the second, which are drawn at random.")] = 0,
    train: Train = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Permute and rescale the weights of A so that they come near to those of B. What is written computes what A does."""

    def work(steps: Steps) -> Result:
        for name in (model_a, model_b):
            if is_onnx(name):
                raise InputError(f"{name} is an ONNX file: weights are aligned of PyTorch's models only.")
        like = source_of(model_a, output, force)
        check_room(model_a, model_b)
        source = ModelSource(model_a, weights, settings or (), trust_remote_code, train=train)
        a, b, _ = load_pair(source, model_b, weights_b, inputs or (), steps)
        check_fits(a.model, like)
        steps.say("aligning")
        options = {"rescale": rescale, "power_of_two": power_of_two, "starts": starts, "seed": seed, "opaque": opaque or ()}
        found = aligned(a.model, b.model, a.args, a.kwargs, **options)
        instead = f"Use {WIDER}." if rescale is False else f"Use --permute-only, or {WIDER}."
        apart, dtype = verified("aligned", found.model, a.model, a, instead)
        is_still = rescale is None and not power_of_two and dtype in HALVES
        stays = f"scales stay as they are, since {dtype_name(dtype)} would round them: --power-of-two moves them too"
        steps.say("writing")
        left = save_like(like, found.model, output, force)
        record = Aligning(
            model_a=a.title,
            model_b=b.title,
            inputs=a.inputs,
            distance_before=found.distance_before,
            distance_after=found.distance_after,
            families=len(found.permutation),
            sweeps=found.sweeps,
            deviation=apart,
            limit=LIMITS[dtype],
            output=str(output),
            notes=(*a.notes, *b.notes, *left, *([stays] if is_still else [])),
        )
        return record, shown(record), 0

    run(work, json, debug)


def shown(record: Aligning) -> RenderableType:
    """What `equinorm align` prints."""
    distance = f"{record.distance_before:.4g} before, {record.distance_after:.4g} after, of the norm of B"
    sweeps = f"{count(record.sweeps, 'sweep')} over {count(record.families, 'family', 'families')}"
    pairs = [
        ("first", record.model_a),
        ("second", record.model_b),
        ("inputs", record.inputs),
        ("distance", distance),
        ("matched", sweeps),
        ("deviation", f"{words.deviation(record.deviation)} from A; limit {record.limit:g}"),
        ("written", record.output),
    ]
    return facts(pairs, record.notes)
