"""Operators along axes: sums, means, maxima, norms, sorting."""

from collections.abc import Callable

import torch
from numpy import ndarray
from torch import Tensor

from equinorm.integrations.onnx.operators.movement import numbers
from equinorm.integrations.onnx.operators.registry import NodeCall, operator

REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
}

_SINCE = {"ReduceSum": 13}
"""Version from which axes are an input; 18 for the others."""


def _reduction(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduced(call: NodeCall, x: Tensor, axes: ndarray | None = None) -> Tensor:
        is_input = call.opset >= _SINCE.get(name, 18)
        call.need(axes is None or is_input, "axes that are an input")
        call.need(x.is_floating_point() or name in ("ReduceMax", "ReduceMin", "ReduceSum"), "a reduction of integers")
        chosen = (None if axes is None else numbers(axes)) if is_input else call.get("axes")
        if not chosen:
            if call.get("noop_with_empty_axes", 0):
                call.need(name in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), "a reduction over no axis")
                return x
            chosen = [*range(x.dim())]
        return function(x, chosen, bool(call.get("keepdims", 1)))

    return reduced


for _name, _function in REDUCTIONS.items():
    operator(_name, "axes keepdims noop_with_empty_axes", settings=(1,))(_reduction(_name, _function))


@operator("ReduceProd", "axes keepdims noop_with_empty_axes", settings=(1,))
def product(call: NodeCall, x: Tensor, axes: ndarray | None = None) -> Tensor:
    """The product along one axis."""
    chosen = call.get("axes") if call.opset < 18 else None if axes is None else numbers(axes)
    call.need(chosen is not None and len(chosen) == 1, "a product along several axes")
    (axis,) = chosen or ()
    return x.prod(axis, bool(call.get("keepdims", 1)))


@operator("ArgMax ArgMin", "axis keepdims select_last_index")
def place(call: NodeCall, x: Tensor) -> Tensor:
    """Where the largest or smallest entry along an axis is, the first of equals."""
    call.need(not call.get("select_last_index", 0), "the last of equal entries")
    function = torch.argmax if call.operator == "ArgMax" else torch.argmin
    return function(x, call.get("axis", 0), bool(call.get("keepdims", 1)))


@operator("TopK", "axis largest sorted k", settings=(1,))
def largest(call: NodeCall, x: Tensor, count: ndarray | None = None) -> list[Tensor]:
    """The largest or smallest entries along an axis, and where they are."""
    wanted = call.get("k") if count is None else numbers(count)[0]
    call.need(wanted is not None, "a number of entries that data decide")
    call.need(bool(call.get("sorted", 1)), "entries in an order that is not said")
    axis = call.get("axis", -1)
    ordered = torch.sort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True)  # the first of equals comes first
    return [part.narrow(axis, 0, int(wanted or 0)) for part in ordered]


@operator("CumSum", "exclusive reverse", settings=(1,))
def running_sum(call: NodeCall, x: Tensor, axis: ndarray) -> Tensor:
    """Sums of the entries up to each along an axis."""
    call.need(not call.get("exclusive", 0) and not call.get("reverse", 0), "sums without the entry itself, or from the end")
    return x.cumsum(numbers(axis)[0], dtype=x.dtype)


@operator("Softmax LogSoftmax", "axis")
def softmax(call: NodeCall, x: Tensor) -> Tensor:
    """Along one axis; before version 13 along this and all later ones together."""
    function = torch.softmax if call.operator == "Softmax" else torch.log_softmax
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % max(x.dim(), 1)
    return function(x.flatten(axis), -1).reshape(x.shape) if axis < x.dim() - 1 else function(x, -1)
