"""Operators that sum products: matrix products and convolutions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from equinorm.integrations.onnx.operators.registry import NodeCall, operator

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def window(
    call: NodeCall, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and after each axis, of a window that slides over these sizes."""
    mode = call.get("auto_pad", "NOTSET") or "NOTSET"
    if mode == "NOTSET":
        pads = call.get("pads") or [0] * (2 * len(kernel))
        return [*zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)]
    if mode == "VALID":
        return [(0, 0)] * len(kernel)
    call.need(mode in ("SAME_UPPER", "SAME_LOWER"), f"padding by mode {mode}")
    found = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if mode == "SAME_UPPER" else (more, less))
    return found


def symmetric(x: Tensor, pads: Sequence[tuple[int, int]], fill: float = 0.0) -> tuple[Tensor, list[int]]:
    """A tensor and padding that is alike on both sides: where it was not, the tensor is padded already."""
    if all(before == after for before, after in pads):
        return x, [before for before, _ in pads]
    return F.pad(x, [amount for pair in reversed(pads) for amount in pair], value=fill), [0] * len(pads)


@operator("MatMul", weights=(0, 1))
def matmul(call: NodeCall, left: Tensor, right: Tensor) -> Tensor:
    """A matrix product with broadcast batch axes."""
    return torch.matmul(left, right)


@operator("Gemm", "alpha beta transA transB", weights=(0, 1, 2))
def gemm(call: NodeCall, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """α·A·B + β·C."""
    call.need(call.opset >= 7, "an old definition")
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    left = left.t() if call.get("transA", 0) else left
    if alpha == beta == 1 and call.get("transB", 0) and (bias is None or (bias.dim() == 1 and len(bias) == len(right))):
        return F.linear(left, right, bias)
    result = F.linear(left, right) if call.get("transB", 0) else torch.matmul(left, right)
    result = result if alpha == 1 else result * alpha
    if bias is None or beta == 0:
        return result
    return result + (bias if beta == 1 else bias * beta)


@operator("Conv", "auto_pad dilations group kernel_shape pads strides", weights=(1, 2))
def convolution(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution over one to three axes."""
    kernel = list(weight.shape[2:])
    call.need(1 <= len(kernel) <= 3, f"a convolution over {len(kernel)} axes")
    strides, dilations = (call.get(name) or [1] * len(kernel) for name in ("strides", "dilations"))
    x, padding = symmetric(x, window(call, x.shape[2:], kernel, strides, dilations))
    return CONVOLUTIONS[len(kernel) - 1](x, weight, bias, strides, padding, dilations, call.get("group", 1))


@operator("ConvTranspose", "auto_pad dilations group kernel_shape output_padding output_shape pads strides", weights=(1, 2))
def transposed_convolution(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed convolution: all of what it reaches, then cut by the padding."""
    kernel = list(weight.shape[2:])
    rank = len(kernel)
    call.need(1 <= rank <= 3, f"a convolution over {rank} axes")
    strides, dilations = (call.get(name) or [1] * rank for name in ("strides", "dilations"))
    more = call.get("output_padding") or [0] * rank
    mode, wanted = call.get("auto_pad", "NOTSET") or "NOTSET", call.get("output_shape")
    call.need(wanted is None and mode in ("NOTSET", "VALID"), "padding that follows from the output's shape")
    pads = (call.get("pads") if mode == "NOTSET" else None) or [0] * (2 * rank)
    pairs = [*zip(pads[:rank], pads[rank:], strict=True)]
    function = TRANSPOSED[rank - 1]
    fits = all(amount < max(step, gap) for amount, step, gap in zip(more, strides, dilations, strict=True))
    if all(before == after for before, after in pairs) and fits:
        return function(x, weight, bias, strides, pads[:rank], more, call.get("group", 1), dilations)
    call.need(not any(more), "further output beside uneven padding")
    whole = function(x, weight, bias, strides, 0, 0, call.get("group", 1), dilations)
    for axis, (before, after) in enumerate(pairs, 2):
        whole = whole.narrow(axis, before, whole.shape[axis] - before - after)
    return whole


@operator("Einsum", "equation")
def einsum(call: NodeCall, *parts: Tensor) -> Tensor:
    """Sums of products over named axes."""
    return torch.einsum(call.get("equation"), *parts)
