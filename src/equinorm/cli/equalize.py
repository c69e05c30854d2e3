"""`equinorm equalize`: write the rescaling-equivalent weights that lose least when they are rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from equinorm._display import count
from equinorm._errors import EqualizeError, dtype_name
from equinorm.cli.calibration import Batch, Samples
from equinorm.cli.equalized_files import VERIFIED, destination
from equinorm.cli.exactness import VERIFYING, remedy, verified
from equinorm.cli.loading import Loaded, ModelSource, load
from equinorm.cli.memory import check_room
from equinorm.cli.onnx_files import is_onnx, names_of, preparing_notes
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
from equinorm.cli.weights import InputError
from equinorm.cli.writing import check_fits
from equinorm.modules.copying import duplicate
from equinorm.modules.exported import takes_one_size
from equinorm.quantization.bias_correction import correct_
from equinorm.quantization.equalization import Equalization
from equinorm.quantization.equalize import equalize_
from equinorm.quantization.freeing import settle_
from equinorm.quantization.prepare import prepare
from equinorm.quantization.scheme import Scheme
from equinorm.reporting.tables import facts, table
from equinorm.reporting.words import deviation as in_words

AT_ONCE = 16
"""Samples in one run of a model whose inputs nobody has said."""


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
        loaded, batches = _loaded(source, inputs or (), calibration, batch)
        check_fits(loaded.model, to.like)
        steps.say("finding symmetries")
        hidden = opaque or ()
        if output.suffix == ".pt2":
            network, preparation = prepare(loaded.model, loaded.args, loaded.kwargs, fold=fold, free=freed, opaque=hidden)
            original, notes = loaded.model, [*loaded.notes, *preparing_notes(preparation)]
        else:
            network, original, notes = loaded.model, duplicate(loaded.model, VERIFYING), [*loaded.notes]
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
        if found.symmetries.num_free and not bool(found.log_scales.any()):
            notes.append("no scale moved: rounded for real, all that were tried lose as much or more")
        notes += _of_biases(found, bias_correction)
        if batches is None:
            notes.append(_without_data(loaded))
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


def _loaded(
    source: ModelSource, inputs: Sequence[str], calibration: Path | None, size: int | None
) -> tuple[Loaded, list[Batch] | None]:
    """The model with inputs, which calibration data tell where no option does, and these data in batches."""
    if calibration is None:
        return load(source, inputs), None
    samples, names = Samples(calibration), ()
    if inputs:
        loaded = load(source, inputs)
        names = getattr(loaded.model, "inputs", ()) if is_onnx(source.name) else ()  # but for those that are fixed
        samples = samples.placed(names) if names else samples
        at_once = _samples(loaded) or 1
    else:
        if is_onnx(source.name):
            names = names_of(source.name)
            samples = samples.placed(names)
        at_once = size or _exported_for(source) or (1 if names else AT_ONCE)
        loaded = load(source, samples.shapes(at_once, names))
    if takes_one_size(loaded.model) and samples.count % (size or at_once):
        samples = samples.whole(size or at_once)
    batches = [_typed(batch, loaded, calibration, names) for batch in samples.batches(size or at_once)]
    return _on_data(loaded, batches[0]), batches


def _exported_for(source: ModelSource) -> int:
    """How many samples a graph was exported for, if it takes no other number; else 0."""
    if not source.name.endswith(".pt2"):
        return 0
    loaded = load(source, ())
    return _samples(loaded) if takes_one_size(loaded.model) else 0


def _samples(loaded: Loaded) -> int:
    """How many the example has, along the first axis of its first tensor; 0 where it has none."""
    first = next((part for part in (*loaded.args, *loaded.kwargs.values()) if isinstance(part, torch.Tensor)), None)
    return len(first) if first is not None and first.dim() else 0


def _typed(batch: Batch, loaded: Loaded, path: Path, names: Sequence[str]) -> Batch:
    """A batch in the dtypes that the model takes: numpy's floats have 64 bits.

    Raises:
        InputError: if it holds integers where the model takes floats, or the other way round.
    """

    def typed(key: Any, value: torch.Tensor) -> torch.Tensor:
        known = loaded.kwargs.get(key) if isinstance(key, str) else loaded.args[key] if key < len(loaded.args) else None
        if not isinstance(known, torch.Tensor) or known.dtype == value.dtype:
            return value
        if known.is_floating_point() != value.is_floating_point():
            name = names[key] if isinstance(key, int) and names else key
            raise InputError(
                f"{path} holds {dtype_name(value.dtype)} for input {name!r}, which takes {dtype_name(known.dtype)}."
            )
        return value.to(known.dtype)

    if isinstance(batch, dict):
        return {key: typed(key, value) for key, value in batch.items()}
    return tuple(typed(place, value) for place, value in enumerate(batch))


def _on_data(loaded: Loaded, batch: Batch) -> Loaded:
    """The same with data as the example, by which the function is verified, where they fit and hold numbers only."""
    args, kwargs = ((), dict(batch)) if isinstance(batch, dict) else (batch, {})

    def form(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list:
        parts = [*enumerate(args), *kwargs.items()]
        return [(key, value.shape, value.dtype) for key, value in parts if isinstance(value, torch.Tensor)]

    fits = form(args, kwargs) == form(loaded.args, loaded.kwargs) and len(loaded.args) == len(args)
    is_finite = all(bool(value.isfinite().all()) for value in (*args, *kwargs.values()))
    return replace(loaded, args=tuple(args), kwargs=kwargs) if fits and is_finite else loaded


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
    examples = [loaded, *(_on_data(loaded, batch) for batch in batches[1:VERIFIED])]
    return max(verified("equalized", model, original, example, cure)[0] for example in examples)


def _without_data(loaded: Loaded) -> str:
    """What the scales rest on where nobody gave data, in a sentence."""
    given = [value for value in (*loaded.args, *loaded.kwargs.values()) if isinstance(value, torch.Tensor)]
    whole = [value for value in given if not value.is_floating_point()]
    stay = f", but for {count(len(whole), 'input')} of integers, the same in all samples" if whole else ""
    return f"calibrated on random inputs{stay}: --calibration FILE takes samples of real data"


def _of_biases(found: Equalization, are_asked_for: bool) -> list[str]:
    """What was done to biases, in sentences; the facts say which cannot be corrected."""
    if not are_asked_for:
        return []
    if not found.corrections:
        return [f"no bias is corrected: {'that would help nothing' if found.biases else 'no layer has one of its own'}"]
    return [
        f"biases of {count(len(found.corrections), 'layer')} corrected: outputs in float differ, by what makes up for rounding"
    ]
