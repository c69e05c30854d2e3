"""How far the outputs of two models are apart."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equinorm._arguments import check_keywords, positional
from equinorm._errors import EquivalenceError, check_module, describe, does_not_run
from equinorm.modules.running import by_default, on_cpu, undisturbed, without_cache

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest relative deviation of outputs that counts as exact, by the coarsest dtype of the parameters. In double and single
precision real scales round every weight once; in half precision only powers of two are applied; ten roundings are allowed."""


@on_cpu()
def deviation(model_a: nn.Module, model_b: nn.Module, args: tuple | Tensor, kwargs: Mapping[str, Any] | None = None) -> float:
    """Largest relative output difference: max over output tensors of ‖a − b‖_∞ / ‖b‖_∞ (0 where both vanish).

    Both models run as they are (training or evaluation mode) on the same random numbers; their buffers are restored.

    Args:
        model_a: one model.
        model_b: the model to compare it with.
        args: positional inputs of both.
        kwargs: keyword inputs of both.

    Returns:
        The deviation; 0.0 means bitwise equal values, inf that only one of them is finite.

    Raises:
        EquivalenceError: if the outputs differ in structure or shape or hold no numbers, if the inputs are no tuple, or a model
            is no module.

    >>> import torch, equinorm
    >>> net = torch.nn.Linear(3, 2)
    >>> equinorm.deviation(net, net, (torch.randn(5, 3),))
    0.0
    """
    for model in (model_a, model_b):
        check_model(model)
    args = positional(args, EquivalenceError)
    check_keywords(kwargs, EquivalenceError)
    outputs = [_run(model, args, dict(kwargs or {})) for model in (model_a, model_b)]
    (flat_a, spec_a), (flat_b, spec_b) = (pytree.tree_flatten(output) for output in outputs)
    if spec_a != spec_b:
        names = f"{describe(model_a)} and {describe(model_b)}"
        raise EquivalenceError(f"{names} return different structures: {spec_a} and {spec_b}.")
    worst = 0.0
    for number, (a, b) in enumerate(zip(flat_a, flat_b, strict=True)):
        try:
            worst = max(worst, _apart(a, b, number))
        except EquivalenceError:
            raise
        except Exception as error:
            kinds = " and ".join(dict.fromkeys(f"a {type(output).__name__}" for output in (a, b)))
            raise EquivalenceError(
                f"output {number}, {kinds}, cannot be compared: {type(error).__name__}: {error}. Compare models that return "
                "tensors with numbers in them, or wrap them so that they do."
            ) from error
    return worst


def check_model(model: Any) -> None:
    """Refuse what is no module, and say how to make one of it; also modules without numbers."""
    check_module(model, EquivalenceError, "a model to compare")
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise EquivalenceError(
            f"{empty} of {describe(model)} is on the meta device and holds no numbers. Load the weights first."
        )


def _apart(a: Any, b: Any, number: int) -> float:
    """How far two outputs are apart: tensors and arrays by their numbers, others by whether they are equal."""
    a, b = (torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in (a, b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if bool(a == b) else math.inf
    if a.shape != b.shape:
        raise EquivalenceError(f"output {number} has shape {tuple(a.shape)} in one model, {tuple(b.shape)} in the other.")
    a, b = (x.dequantize() if x.is_quantized else x.to_dense() if x.layout != torch.strided else x for x in (a, b))
    return difference(a, b)


def difference(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """‖a − b‖_∞ / ‖b‖_∞ of equal shapes, inf where non-numbers differ; `floor` measures what is smaller throughout."""
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to("cpu", wide), b.to("cpu", wide)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    apart = (a - b)[~same].abs()
    if not bool(apart.isfinite().all()):
        return float("inf")
    scale = max(float(b[b.isfinite()].abs().max()), floor)
    return float(apart.max() / scale) if scale > 0 else float("inf")


def _run(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    kwargs = without_cache(model, args, kwargs)
    with undisturbed(model):
        try:
            copies = pytree.tree_map_only(Tensor, lambda value: value.clone(), (args, kwargs))
            with by_default():
                return model(*copies[0], **copies[1])
        except Exception as error:
            raise EquivalenceError(does_not_run(model, args, kwargs, error)) from error


def coarsest(*models: nn.Module) -> torch.dtype:
    """The floating dtype of least precision among the models' parameters."""
    dtypes = {tensor.dtype for model in models for tensor in model.parameters() if tensor.dtype in LIMITS}
    return max(dtypes, key=lambda dtype: LIMITS[dtype], default=torch.float32)
