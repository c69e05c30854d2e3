"""`equinorm equalize`: write the rescaling-equivalent weights that lose least when they are rounded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from equinorm._display import count
from equinorm._errors import EqualizeError
from equinorm.cli.calibrated import load_calibrated, on_data
from equinorm.cli.calibration import Batch
from equinorm.cli.equalized_files import VERIFIED, destination
from equinorm.cli.exactness import VERIFYING, remedy, verified
from equinorm.cli.loading import Loaded, ModelSource
from equinorm.cli.memory import check_room
from equinorm.cli.onnx_files import preparing_notes
from equinorm.cli.options import (
    LOADED,
    Debug,
    Force,
    Inputs,
    Json,
    Opaque,
    PowerOfTwo,
    Report,
    Result,
    Settings,
    Trust,
    Weights,
)
from equinorm.cli.terminal import Steps, run
from equinorm.cli.writing import check_fits
from equinorm.modules.copying import duplicate
from equinorm.quantization.bias_correction import correct_
from equinorm.quantization.equalization import Equalization
from equinorm.quantization.equalize import equalize_
from equinorm.quantization.freeing import settle_
from equinorm.quantization.prepare import prepare
from equinorm.quantization.scheme import Scheme
from equinorm.reporting.tables import facts, table
from equinorm.reporting.words import deviation as in_words


@dataclass(frozen=True, slots=True)
class Equalizing:
    """Record of `equinorm equalize`: what `Equalization.to_dict` holds, and what was verified and written."""

    model: str
    inputs: str
    equalization: dict[str, Any]
    deviation: float
    output: str
    report: str | None = None
    notes: tuple[str, ...] = ()


def equalize(
    model: Annotated[str, typer.Argument(help=LOADED)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Write to this file: .onnx of an ONNX file; else .safetensors (the model's own weights) or .pt2 (a copy with "
            "batch normalization folded and bounds set free, exported). Of a FOLDER: to this folder.",
        ),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Inputs of tens of samples, .npz, .npy, .safetensors or .pt: the first axis counts samples."),
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            help="What will be rounded: w8a8, w8a8-tensor, w8 (weights only), w4g32 (blocks of 32 inputs); or by which tool: "
            "onnxruntime, xnnpack, x86, as they are or with -tensor or -channel."
        ),
    ] = "w8a8",
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in one run of the model.")] = None,
    weights: Weights = None,
    settings: Settings = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    largest: Annotated[
        float, typer.Option(min=1, help="No free scale is larger than this, or smaller than its inverse.")
    ] = 1e8,
    power_of_two: PowerOfTwo = False,
    bias_correction: Annotated[
        bool,
        typer.Option(
            "--bias-correction",
            help="Also add to biases what rounding shifts on average: outputs in float differ, by what makes up for it.",
        ),
    ] = False,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Fold batch normalization into the layers beside it (.onnx, .pt2).")
    ] = True,
    free: Annotated[
        bool,
        typer.Option("--free/--no-free", help="Give ReLU6 and other bounds one number for each channel (.onnx, .pt2)."),
    ] = True,
    free_only: Annotated[
        list[str] | None,
        typer.Option(help="Give only these bounds one number for each channel, by name, such as 'features.1.*'. Repeatable."),
    ] = None,
    report: Report = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the rescaling-equivalent weights that lose least when a quantizer rounds them.

    The file holds a float network that computes what it did, which is verified first. Quantize it with any tool.
    """

    def work(steps: Steps) -> Result:
        meant, freed = Scheme.parse(scheme), free_only if free_only and free else free
        to = destination(model, output, report, force)
        check_room(model)
        steps.say(f"loading {model}")
        source = ModelSource(model, weights, settings or (), trust_remote_code, fold=fold, free=freed)
        loaded, batches = load_calibrated(source, inputs or (), calibration, batch)
        check_fits(loaded.model, to.like)
        steps.say("finding symmetries")
        hidden, is_graph = opaque or (), output.suffix == ".pt2"
        network, original, notes = _prepared(loaded, fold, freed, hidden) if is_graph else _as_it_is(loaded)
        found = equalize_(
            *(network, loaded.args, loaded.kwargs),
            scheme=meant,
            largest=largest,
            power_of_two=power_of_two,
            bias_correction=bias_correction,
            opaque=hidden,
            calibration=batches,
            progress=lambda text, done, total: steps.count(done, total, text),
        )
        settle_(found.model)
        if not found.symmetries.num_free and not found.corrections:
            raise EqualizeError(f"nothing in {model} can be rescaled, and nothing was written. `equinorm inspect` says why.")
        apart = _verified(found, original, loaded, batches or [], power_of_two)
        steps.say("writing")
        notes += [*_still(found), *_of_biases(found, bias_correction), *([_without_data(loaded)] if batches is None else [])]
        notes += to.write(found, loaded, batches or [], original.state_dict().keys())
        record = Equalizing(
            model=loaded.title,
            inputs=loaded.inputs,
            equalization=found.to_dict(),
            deviation=apart,
            output=str(output),
            report=str(report) if report else None,
            notes=tuple(notes),
        )
        return record, shown(record, found), 0

    run(work, json, debug)


def shown(record: Equalizing, found: Equalization) -> RenderableType:
    """What `equinorm equalize` prints: facts, and the tensors whose rounding costs most."""
    pairs = [("model", record.model), ("inputs", record.inputs), *found.facts, ("deviation", in_words(record.deviation))]
    head = facts([*pairs, ("written", record.output), ("report", record.report)], record.notes)
    costly = sorted(zip(found.tensors, found.table, strict=True), key=lambda pair: pair[0].before)[:8]
    columns = [("costliest before", False), ("", False), ("before, dB", True), ("after, dB", True)]
    return Group(head, Text(), table("Signal over the noise of one tensor", columns, [row for _, row in costly]))


def _prepared(
    loaded: Loaded, fold: bool, free: bool | list[str], opaque: Sequence[str]
) -> tuple[torch.nn.Module, torch.nn.Module, list[str]]:
    """A copy in the form in which quantizers round it, the model to compare it with, and what was done."""
    copy, preparation = prepare(loaded.model, loaded.args, loaded.kwargs, fold=fold, free=free, opaque=opaque)
    return copy, loaded.model, [*loaded.notes, *preparing_notes(preparation)]


def _as_it_is(loaded: Loaded) -> tuple[torch.nn.Module, torch.nn.Module, list[str]]:
    """The model, whose own weights will be written, a copy to compare it with, and what is known of it."""
    return loaded.model, duplicate(loaded.model, VERIFYING), [*loaded.notes]


def _verified(
    found: Equalization, original: torch.nn.Module, loaded: Loaded, batches: Sequence[Batch], power_of_two: bool
) -> float:
    """The largest deviation of outputs on the example and further batches, but for what was added to biases.

    Raises:
        InexactError: if it is more than rounding.
    """
    model, cure = found.model, f"{remedy(power_of_two)} A smaller --largest helps, too."
    if found.corrections:
        model = duplicate(model, VERIFYING)
        correct_(model, {name: -shift for name, shift in found.corrections.items()}, found.biases)
    examples = [loaded, *(on_data(loaded, batch) for batch in batches[1:VERIFIED])]
    return max(verified("equalized", model, original, example, cure)[0] for example in examples)


def _without_data(loaded: Loaded) -> str:
    """What the scales rest on where nobody gave data, in a sentence."""
    given = [value for value in (*loaded.args, *loaded.kwargs.values()) if isinstance(value, torch.Tensor)]
    whole = [value for value in given if not value.is_floating_point()]
    stay = f", but for {count(len(whole), 'input')} of integers, the same in all samples" if whole else ""
    return f"calibrated on random inputs{stay}: --calibration FILE takes samples of real data"


def _still(found: Equalization) -> list[str]:
    """That scales which can move did not, in a sentence."""
    is_still = bool(found.symmetries.num_free) and not bool(found.log_scales.any())
    return ["no scale moved: rounded for real, all that were tried lose as much or more"] if is_still else []


def _of_biases(found: Equalization, are_asked_for: bool) -> list[str]:
    """What was done to biases, in sentences; the facts say which cannot be corrected."""
    if not are_asked_for:
        return []
    if not found.corrections:
        return [f"no bias is corrected: {'that would help nothing' if found.biases else 'no layer has one of its own'}"]
    return [
        f"biases of {count(len(found.corrections), 'layer')} corrected: outputs in float differ, by what makes up for rounding"
    ]
