"""Operators on windows of each channel's map."""

import torch
from torch import Tensor
from torch.nn import functional as F

from equinorm.integrations.onnx.operators.contraction import symmetric, window
from equinorm.integrations.onnx.operators.registry import NodeCall, operator

MAXIMA = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@operator("MaxPool", "auto_pad ceil_mode dilations kernel_shape pads storage_order strides")
def max_pool(call: NodeCall, x: Tensor) -> Tensor:
    """The largest entry of each window."""
    kernel = call.get("kernel_shape")
    call.need(call.read == 1, "returns the places of its maxima")
    call.need(1 <= len(kernel) <= 3, f"pooling over {len(kernel)} axes")
    strides, dilations = (call.get(name) or [1] * len(kernel) for name in ("strides", "dilations"))
    pads = window(call, x.shape[2:], kernel, strides, dilations)
    x, padding = symmetric(x, pads, float("-inf"))
    if any(2 * amount > width for amount, width in zip(padding, kernel, strict=True)):  # more than PyTorch pads by itself
        x, padding = F.pad(x, [a for a in reversed(padding) for _ in (0, 1)], value=float("-inf")), [0] * len(kernel)
    return MAXIMA[len(kernel) - 1](x, kernel, strides, padding, dilations, bool(call.get("ceil_mode", 0)))


@operator("AveragePool", "auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides")
def average_pool(call: NodeCall, x: Tensor) -> Tensor:
    """The mean of each window, with or without what pads it."""
    kernel = call.get("kernel_shape")
    rank = len(kernel)
    call.need(1 <= rank <= 3, f"pooling over {rank} axes")
    call.need(set(call.get("dilations") or [1]) == {1}, "a window with gaps")
    strides, counts = call.get("strides") or [1] * rank, bool(call.get("count_include_pad", 0))
    pads, ceil = window(call, x.shape[2:], kernel, strides, [1] * rank), bool(call.get("ceil_mode", 0))
    even = all(before == after and 2 * before <= width for (before, after), width in zip(pads, kernel, strict=True))
    call.need(even or (counts and not ceil), "uneven padding that does not count")
    x, padding = symmetric(x, pads) if even else (F.pad(x, [a for pair in reversed(pads) for a in pair]), [0] * rank)
    if rank == 1:
        return F.avg_pool1d(x, kernel, strides, padding, ceil, counts)
    return (F.avg_pool2d if rank == 2 else F.avg_pool3d)(x, kernel, strides, padding, ceil, counts)


@operator("GlobalAveragePool")
def global_average_pool(call: NodeCall, x: Tensor) -> Tensor:
    """The mean of each map."""
    return x.mean([*range(2, x.dim())], keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(call: NodeCall, x: Tensor) -> Tensor:
    """The largest entry of each map."""
    return torch.amax(x, [*range(2, x.dim())], keepdim=True)
