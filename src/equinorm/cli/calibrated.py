"""Models of the command line with calibration data: their batches, and inputs that these tell."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from equinorm._errors import dtype_name
from equinorm.cli.calibration import Batch, Samples
from equinorm.cli.loading import Loaded, ModelSource, load
from equinorm.cli.onnx_files import is_onnx, names_of
from equinorm.cli.weights import InputError
from equinorm.modules.exported import takes_one_size

AT_ONCE = 16
"""Samples in one run of a model whose inputs nobody has said."""


def load_calibrated(
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
    return on_data(loaded, batches[0]), batches


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


def on_data(loaded: Loaded, batch: Batch) -> Loaded:
    """The same with data as the example, by which the function is verified, where they fit and hold numbers only."""
    args, kwargs = ((), dict(batch)) if isinstance(batch, dict) else (batch, {})

    def form(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list:
        parts = [*enumerate(args), *kwargs.items()]
        return [(key, value.shape, value.dtype) for key, value in parts if isinstance(value, torch.Tensor)]

    fits = form(args, kwargs) == form(loaded.args, loaded.kwargs) and len(loaded.args) == len(args)
    is_finite = all(bool(value.isfinite().all()) for value in (*args, *kwargs.values()))
    return replace(loaded, args=tuple(args), kwargs=kwargs) if fits and is_finite else loaded
