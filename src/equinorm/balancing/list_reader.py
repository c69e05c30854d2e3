"""Energies of tensors that scales tell apart along one axis only, read together: networks have hundreds of them.

A vector is raised to its power. For p = ∞ larger tensors are read too: the largest and the smallest entries along the memory as
it lies, and then the larger magnitude of these for each channel, of all tensors at once.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm import native
from equinorm._class_ids import slices_at_once
from equinorm._memory import STRIP, forget, has_memory, is_dense, memory_order
from equinorm.balancing.layout import TensorLayout
from equinorm.balancing.norm import Norm

SUMS = {torch.float64: torch.float64}
"""Dtypes of sums that kernels of a dtype come with, other than float32."""

FEW = 1 << 14
"""Entries of a tensor that may stand in a list as they are."""

SHRUNK = 16
"""By so much larger tensors must shrink where they are read along their memory."""


Extremes = tuple[Tensor, Tensor]
"""The largest and the smallest entries of a tensor's channels: one of each, or a run of as many for all."""


def is_list(layout: TensorLayout, tensor: Tensor, norm: Norm) -> bool:
    """Is it one, as biases and gains are, or as good as one, since its largest entries are?"""
    if not layout.is_matrix or len(layout.along) != 1 or layout.scaling.offset or tensor.device.type != "cpu":
        return False
    if norm.is_max:
        return len(layout.axes) == 1 and tensor.numel() > 0 and has_memory(tensor) and is_dense(tensor)
    return tensor.dim() == len(layout.scaling.shape) == 1 and fits_float64(tensor, norm)


def fits_float64(tensor: Tensor, norm: Norm) -> bool:
    """Do |w|^p fit float64 as they are?"""
    return tensor.dtype != torch.float64 and (norm.is_max or norm.p <= 4)


def ends_of(layout: TensorLayout, tensor: Tensor, norm: Norm, compile: bool) -> Extremes:
    """What `energies_of_lists` takes of a tensor that `is_list`, read by compiled kernels where these can."""
    return _extremes(layout.view(tensor), layout.axes[0], compile) if norm.is_max else (tensor.detach(), tensor.detach())


def energies_of_lists(ends: Sequence[Extremes], sizes: Sequence[int], norm: Norm) -> Tensor:
    """|w|^p of each channel (the largest |w| for p = ∞), one tensor after the other.

    Args:
        ends: of at least one tensor.
        sizes: channels of each.
        norm: whose energies these are, in float64; p = ∞ keeps to the dtype of the tensors, or float32.
    """
    if norm.is_max:
        return torch.cat([_magnitudes(ends[here], sizes[here]) for here in slices_at_once([len(high) for high, _ in ends])])
    magnitudes = torch.cat([vector for vector, _ in ends]).to(torch.float64).abs_()
    return magnitudes if norm.p == 1 else magnitudes.pow_(norm.p)


def _magnitudes(ends: Sequence[Extremes], sizes: Sequence[int]) -> Tensor:
    """The largest magnitude of each channel, of which there are `sizes` for each pair of ends."""
    high, low = (torch.cat(own) for own in zip(*ends, strict=True))
    magnitudes = torch.maximum(high, low.neg_())
    magnitudes = magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32))
    runs = [len(high) // size for (high, _), size in zip(ends, sizes, strict=True)]
    if max(runs) == 1:
        return magnitudes
    lengths = np.repeat(runs, sizes)
    return torch.from_numpy(np.maximum.reduceat(magnitudes.numpy(), np.cumsum(lengths) - lengths))


def _extremes(weight: Tensor, axis: int, compile: bool) -> Extremes:
    """Those of the channels along an axis."""
    if not weight.is_contiguous():
        order = memory_order(weight)
        weight, axis = weight.permute(order), order.index(axis)
    size, run = weight.size(axis), math.prod(weight.shape[axis + 1 :])
    rows = weight.numel() // (size * run)
    if rows >= SHRUNK or (rows > 1 and weight.numel() <= FEW):
        return _of_columns(weight.view(rows, size * run), compile)
    if rows > 1:
        return weight.view(rows, size, run).amax((0, 2)), weight.view(rows, size, run).amin((0, 2))
    if run == 1 or weight.numel() <= FEW:
        return weight.view(-1), weight.view(-1)
    ends = [_ends(strip, 1) for strip in _strips(weight.view(size, run))]
    return torch.cat([high for high, _ in ends]), torch.cat([low for _, low in ends])


def _of_columns(matrix: Tensor, compile: bool) -> Extremes:
    """Those of each column."""
    kernels = native.kernels_for(matrix.dtype, SUMS.get(matrix.dtype, torch.float32)) if compile else None
    if kernels is not None:
        largest = kernels.largest(matrix)
        forget(matrix)
        return largest, largest
    ends = [_ends(strip, 0) for strip in _strips(matrix)]
    if len(ends) == 1:
        return ends[0]
    return torch.stack([high for high, _ in ends]).amax(0), torch.stack([low for _, low in ends]).amin(0)


def _ends(matrix: Tensor, axis: int) -> Extremes:
    """The largest and the smallest entries along an axis; numpy finds them in half of the time."""
    if matrix.dtype not in (torch.float32, torch.float64):
        return matrix.amax(axis), matrix.amin(axis)
    array = matrix.numpy()
    return torch.from_numpy(np.maximum.reduce(array, axis)), torch.from_numpy(np.minimum.reduce(array, axis))


def _strips(matrix: Tensor) -> Iterator[Tensor]:
    """Rows that fit the cache: the second reading finds them there."""
    for strip in matrix.split(max(1, STRIP // matrix.size(1))):
        yield strip
        forget(strip)
