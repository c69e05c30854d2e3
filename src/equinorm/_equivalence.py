"""Functional equivalence: how far two models' outputs are apart, and whether a rescaling joins their weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equinorm._errors import EquivalenceError, describe, describe_inputs


def deviation(
    model_a: nn.Module, model_b: nn.Module, args: tuple | Tensor, kwargs: Mapping[str, Any] | None = None
) -> float:
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
        EquivalenceError: if the outputs differ in structure or shape.

    >>> import torch, equinorm
    >>> net = torch.nn.Linear(3, 2)
    >>> equinorm.deviation(net, net, (torch.randn(5, 3),))
    0.0
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    outputs = [_run(model, args, dict(kwargs or {})) for model in (model_a, model_b)]
    (flat_a, spec_a), (flat_b, spec_b) = (pytree.tree_flatten(output) for output in outputs)
    if spec_a != spec_b:
        raise EquivalenceError(f"{describe(model_a)} and {describe(model_b)} return different structures: {spec_a} and {spec_b}.")
    worst = 0.0
    for number, (a, b) in enumerate(zip(flat_a, flat_b, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            worst = max(worst, 0.0 if a == b else float("inf"))
            continue
        if a.shape != b.shape:
            raise EquivalenceError(f"output {number} has shape {tuple(a.shape)} in one model and {tuple(b.shape)} in the other.")
        worst = max(worst, _difference(a, b))
    return worst


def _difference(a: Tensor, b: Tensor) -> float:
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to("cpu", wide), b.to("cpu", wide)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    apart = (a - b)[~same].abs()
    if not bool(apart.isfinite().all()):
        return float("inf")
    scale = b[b.isfinite()].abs().max()
    return float(apart.max() / scale) if scale > 0 else float("inf")


def _run(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    with torch.no_grad(), torch.random.fork_rng(), _restored_buffers(model):
        torch.manual_seed(0)
        try:
            copies = pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
            return model(*copies[0], **copies[1])
        except Exception as error:
            raise EquivalenceError(
                f"{describe(model)} does not run on inputs {describe_inputs(args, kwargs)}: {type(error).__name__}: {error}"
            ) from error


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
