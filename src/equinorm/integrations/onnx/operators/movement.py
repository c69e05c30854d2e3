"""Operators that only move entries."""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from equinorm.integrations.onnx.operators.registry import NodeCall, operator


def numbers(values: Any) -> list[int]:
    """Integers of an array or of an attribute."""
    return [int(value) for value in np.asarray(values).reshape(-1)]


@operator("Reshape", "allowzero", settings=(1,))
def reshape(call: NodeCall, x: Tensor, shape: ndarray) -> Tensor:
    """Another shape; 0 keeps an axis, −1 is what remains."""
    sizes = numbers(shape)
    if not call.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(torch.Size(sizes))


@operator("Flatten", "axis")
def flatten(call: NodeCall, x: Tensor) -> Tensor:
    """Two axes: those before `axis`, and the others."""
    axis = call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    rows = int(np.prod(x.shape[:axis], dtype=np.int64))
    return x.reshape(rows, int(np.prod(x.shape[axis:], dtype=np.int64)))


@operator("Transpose", "perm")
def transpose(call: NodeCall, x: Tensor) -> Tensor:
    """Axes in another order; reversed by default."""
    return x.permute(call.get("perm") or [*reversed(range(x.dim()))])


def _axes(call: NodeCall, given: ndarray | None) -> list[int] | None:
    """Axes that an attribute names before version 13, an input from then on."""
    if call.opset < 13:
        call.need(given is None, "axes that are an input")
        return call.get("axes")
    call.need("axes" not in call.attributes, "axes that are an attribute")
    return None if given is None else numbers(given)


@operator("Squeeze", "axes", settings=(1,))
def squeeze(call: NodeCall, x: Tensor, axes: ndarray | None = None) -> Tensor:
    """Without these axes of size 1; without all of them by default."""
    chosen = _axes(call, axes)
    return x.squeeze() if chosen is None else x.squeeze(chosen)


@operator("Unsqueeze", "axes", settings=(1,))
def unsqueeze(call: NodeCall, x: Tensor, axes: ndarray | None = None) -> Tensor:
    """With new axes of size 1 at these places of the result."""
    chosen = _axes(call, axes) or []
    for axis in sorted(axis % (x.dim() + len(chosen)) for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Concat", "axis")
def concat(call: NodeCall, *parts: Tensor) -> Tensor:
    """Tensors one after another along an axis."""
    return torch.cat(parts, call.get("axis", 1))


@operator("Split", "axis split num_outputs", settings=(1,))
def split(call: NodeCall, x: Tensor, sizes: ndarray | None = None) -> list[Tensor]:
    """Parts along an axis: of these sizes, or as equal as can be with a smaller last one."""
    axis = call.get("axis", 0)
    given = call.get("split") if call.opset < 13 else sizes
    if given is not None:
        return [*x.split(numbers(given), axis)]
    count = call.get("num_outputs", call.outputs)
    size = -(-x.shape[axis] // count)
    widths = [size] * (count - 1) + [x.shape[axis] - size * (count - 1)]
    call.need(widths[-1] >= 0, "parts that are empty")
    return [*x.split(widths, axis)]


@operator("Slice", "starts ends axes", settings=(1, 2, 3, 4))
def cut(call: NodeCall, x: Tensor, *given: ndarray | None) -> Tensor:
    """From start to end in steps along some axes; backwards if a step is negative."""
    if call.opset < 10:
        starts, ends, axes, steps = call.get("starts"), call.get("ends"), call.get("axes"), None
    else:
        starts, ends, axes, steps = (*given, *[None] * (4 - len(given)))
    starts, ends = numbers(starts), numbers(ends)
    chosen = [*range(len(starts))] if axes is None else numbers(axes)
    for axis, start, end, step in zip(
        chosen, starts, ends, [1] * len(starts) if steps is None else numbers(steps), strict=True
    ):
        places = range(x.shape[axis])[slice(start, end if end >= -x.shape[axis] or step > 0 else None, step)]
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        elif step > 1 and len(places):
            x = x.narrow(axis, places.start, x.shape[axis] - places.start)
            x = x[(*[slice(None)] * (axis % x.dim()), slice(0, len(places) * step, step))]
        else:
            x = x.index_select(axis, torch.tensor([*places], dtype=torch.int64))
    return x


@operator("Gather", "axis")
def gather(call: NodeCall, x: Tensor, index: Tensor) -> Tensor:
    """Entries at an index of one axis; in place of the axis stand those of the index."""
    axis = call.get("axis", 0) % max(x.dim(), 1)
    rows = torch.where(index < 0, index + x.shape[axis], index).to(torch.int64)
    found = x.index_select(axis, rows.reshape(-1))
    return found.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


@operator("GatherElements", "axis")
def gather_elements(call: NodeCall, x: Tensor, index: Tensor) -> Tensor:
    """For each place the entry at an index along an axis."""
    axis = call.get("axis", 0)
    rows = torch.where(index < 0, index + x.shape[axis], index).to(torch.int64)
    return x.gather(axis, rows)


@operator("Expand", settings=(1,))
def expand(call: NodeCall, x: Tensor, shape: ndarray) -> Tensor:
    """Broadcast to a shape, in both directions."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(numbers(shape))))


@operator("Tile", settings=(1,))
def tile(call: NodeCall, x: Tensor, repeats: ndarray) -> Tensor:
    """Repeated along every axis."""
    call.need(call.opset >= 6, "an old definition")
    return x.repeat(numbers(repeats))


@operator("Pad", "mode pads value", settings=(1, 2, 3))
def pad(call: NodeCall, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    """Around: a constant, the reflection, or the edge repeated. Negative amounts cut."""
    mode = call.get("mode", "constant")
    amounts = numbers(call.get("pads") if call.opset < 11 else pads)
    fill = call.get("value", 0.0) if call.opset < 11 else 0.0 if value is None else np.asarray(value).item()
    chosen = [*range(x.dim())] if axes is None else [axis % x.dim() for axis in numbers(axes)]
    before, after = dict(zip(chosen, amounts, strict=False)), dict(zip(chosen, amounts[len(chosen) :], strict=True))
    pairs = [(before.get(axis, 0), after.get(axis, 0)) for axis in range(x.dim())]
    if mode == "constant":
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=fill)
    call.need(mode in ("reflect", "edge"), f"padding by mode {mode}")
    for axis, (low, high) in enumerate(pairs):
        if low or high:
            call.need(low >= 0 and high >= 0, "padding by a negative amount")
            places = np.pad(np.arange(x.shape[axis]), (low, high), mode)
            x = x.index_select(axis, torch.tensor(places.tolist(), dtype=torch.int64))
    return x


@operator("DepthToSpace", "blocksize mode")
def depth_to_space(call: NodeCall, x: Tensor) -> Tensor:
    """Channels to places in blocks; the order of channels is depth last (DCR) or depth first (CRD)."""
    batch, channels, height, width = x.shape
    size = call.get("blocksize")
    if call.get("mode", "DCR") == "DCR":
        x = x.reshape(batch, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(batch, channels // size**2, size, size, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // size**2, height * size, width * size)


@operator("SpaceToDepth", "blocksize")
def space_to_depth(call: NodeCall, x: Tensor) -> Tensor:
    """Places in blocks to channels."""
    batch, channels, height, width = x.shape
    size = call.get("blocksize")
    x = x.reshape(batch, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, channels * size**2, height // size, width // size)


@operator("Trilu", "upper", settings=(1,))
def triangle(call: NodeCall, x: Tensor, diagonal: ndarray | None = None) -> Tensor:
    """The upper or lower triangle of matrices."""
    offset = 0 if diagonal is None else int(diagonal)
    return torch.triu(x, offset) if call.get("upper", 1) else torch.tril(x, offset)
