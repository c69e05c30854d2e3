"""One pass over a weight: its energies times factors, along both of its sides.

Two ways: strips of the weight that fit the cache, by PyTorch's operations, for whatever can be streamed; and compiled kernels,
where they know how the weight lies in memory.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm import native
from equinorm._memory import has_memory
from equinorm.balancing.dense_blocks import LEAST, DenseMatrix, dense, runs_of_kinds, stretches
from equinorm.balancing.energy_reader import Reading
from equinorm.balancing.layout import TensorLayout
from equinorm.balancing.norm import Norm

KEPT = 8
"""Energies summed over kernels are kept in float32 where they take so many times less memory than the weight."""


FEW = 8
"""Columns that are multiplied one by one."""


class StripPass:
    """Reads a strip at a time.

    Args:
        layout: of the weight, a matrix of two sides that `Reading.has_strips`.
        tensor: the weight.
        norm: one whose powers are cheap.
        loops: mask of entries that do not count; None for all.

    Attributes:
        keeps: are energies in float32 kept after they were read once?
    """

    def __init__(self, layout: TensorLayout, tensor: Tensor, norm: Norm, loops: Tensor | None) -> None:
        self._readings = {dtype: Reading(layout, tensor, norm, dtype) for dtype in (torch.float32, torch.float64)}
        self._tensor, self._loops = tensor, loops
        self.keeps = are_kept(layout, tensor)
        self._kept: list[tuple[slice, slice, Tensor]] | None = None

    def products(self, factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Energies times the factors of the other side, for both sides.

        Args:
            factors: of rows and of columns, shapes (channels, groups).
            dtype: of the sums, float32 or float64.

        Returns:
            float64 on the CPU, shapes (channels, groups of the other side).
        """
        slow, device = self._readings[dtype].slow_side, self._tensor.device
        along, across = (factors[place].to(device, dtype) for place in (slow, 1 - slow))
        loops = None if self._loops is None else (self._loops if slow == 0 else self._loops.T).to(device)
        sums = torch.zeros(len(along), across.size(1), device=device, dtype=torch.float64)
        total = torch.zeros(len(across), along.size(1), device=device, dtype=torch.float64)
        for here, there, strip in self._strips(dtype):
            strip = strip if loops is None else strip.masked_fill(loops[here, there], 0.0)
            sums[here] += _product(strip, across[there])
            total[there] += _product(strip.T, along[here])
        found = [sums.cpu(), total.cpu()]
        return found if slow == 0 else found[::-1]

    def _strips(self, dtype: torch.dtype) -> Iterable[tuple[slice, slice, Tensor]]:
        """Energies, from the weight or from what was kept of it."""
        if not self.keeps or dtype != torch.float32:
            return self._readings[dtype].strips()
        if self._kept is None:
            self._kept = list(self._readings[dtype].strips())
        return self._kept


@dataclass(frozen=True, slots=True)
class GroupMatrix:
    """Channels of one group on each side, as a matrix in memory.

    Attributes:
        picks: places of rows and of columns.
        groups: of these.
        matrix: where their weights lie.
    """

    picks: tuple[slice, slice]
    groups: tuple[int, int]
    matrix: DenseMatrix


class CompiledPass:
    """Reads all at once by compiled kernels.

    Args:
        pieces: that make up the weight.
        tensor: the weight, of a dtype that the kernels know.
        norm: p = 1 or 2.
    """

    def __init__(self, pieces: Sequence[GroupMatrix], tensor: Tensor, norm: Norm) -> None:
        self._pieces, self._tensor, self._p = pieces, tensor, int(norm.p)

    def products(self, factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """As in `StripPass`."""
        kernels = native.kernels_for(self._tensor.dtype, dtype)
        assert kernels is not None
        found = [factors[i].new_zeros(len(factors[i]), factors[1 - i].size(1)) for i in (0, 1)]
        for piece in self._pieces:
            matrix, own = piece.matrix, zip(piece.picks, piece.groups, factors, strict=True)
            spread = [line.spread(f[p, g].to(dtype)) for line, (p, g, f) in zip(matrix.lines, own, strict=True)]
            sums = [torch.empty(len(factor), dtype=dtype) for factor in spread]
            rows, columns = (0, 1) if matrix.lines[0].is_row else (1, 0)
            first = self._tensor.data_ptr() + matrix.first * self._tensor.element_size()
            pairs = (spread[rows].contiguous(), spread[columns].contiguous()), (sums[rows], sums[columns])
            kernels.sums(self._p, first, matrix.shape, matrix.pitch, *pairs)
            for side, (line, total) in enumerate(zip(matrix.lines, sums, strict=True)):
                found[side][piece.picks[side], piece.groups[1 - side]] += line.fold(total.double())
        return found


def compiled_pass(layout: TensorLayout, tensor: Tensor, norm: Norm, groups: Sequence[Tensor]) -> CompiledPass | None:
    """The pass by compiled kernels; None where they do not know the weight, or where reading it once is enough.

    Args:
        layout: of the weight, a matrix of two sides.
        tensor: the weight.
        norm: one whose powers are cheap.
        groups: number of the group of each channel, by side.
    """
    is_known = has_memory(tensor) and tensor.device.type in native.DEVICES and tensor.dtype in native.TYPES
    if not is_known or are_kept(layout, tensor):
        return None
    rows, columns = (runs_of_kinds(own, most) for own, most in zip(groups, stretches(layout, tensor), strict=True))
    if len(rows) * len(columns) > max(1, tensor.numel() // LEAST):
        return None
    pieces: list[GroupMatrix] = []
    for picks in itertools.product(rows, columns):
        matrix = dense(layout, picks, tensor)
        if matrix is None:
            return None
        first, second = (int(own[pick.start]) for own, pick in zip(groups, picks, strict=True))
        pieces.append(GroupMatrix(picks, (first, second), matrix))
    return CompiledPass(pieces, tensor, norm)


def are_kept(layout: TensorLayout, tensor: Tensor) -> bool:
    """Do energies take little memory beside the weight?"""
    entries = math.prod(layout.scaling.shape[axis] for axis in layout.axes)
    return entries * 4 * KEPT <= tensor.numel() * tensor.element_size()


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix @ columns; a few columns as vectors, one after the other, which is up to twenty times faster."""
    if columns.size(1) > FEW:
        return matrix @ columns
    return torch.stack([torch.mv(matrix, column) for column in columns.T.contiguous()], 1)
