"""Tensors as matrices over their memory, whose rows share one scale each and whose columns share another.

Every product then runs along the memory, a strip that fits the cache at a time. The scales of all matrices lie end to end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._memory import STRIP, is_dense, memory_order
from equinorm._scaling import Scaling

_FEW = 4096
"""Entries of a tensor for which a scale each costs nothing."""


Scales = tuple[Tensor | None, Tensor | None]
"""Of a matrix's rows, as a column vector, and of its columns; None where they are 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """How a tensor is a matrix, and where its scales are among all scales.

    Attributes:
        strides: of the tensor.
        order: its axes as they lie in memory, from the slowest; None for a matrix that lies so already.
        shape: rows and columns.
        by_row: places of the rows' scales; None if there are none.
        by_column: likewise.
        strip: rows that fit the cache.
    """

    strides: tuple[int, ...]
    order: tuple[int, ...] | None
    shape: tuple[int, int]
    by_row: slice | None
    by_column: slice | None
    strip: int

    def find(self, scales: Tensor) -> Scales:
        """Its own among all scales."""
        rows = None if self.by_row is None else scales[self.by_row, None]
        return rows, None if self.by_column is None else scales[self.by_column]

    def multiply_(self, tensor: Tensor, scales: Scales, write: Callable[[Tensor, str, Tensor], None]) -> None:
        """tensor ← rows · tensor · columns, where write(memory, "mul_", scale) multiplies a part of it."""
        rows, columns = scales
        memory = tensor if self.order is None else tensor.permute(self.order)
        if torch.compiler.is_compiling():  # one pass, as one expression
            moved = memory.view(self.shape)
            moved = moved if rows is None else moved * rows
            moved = moved if columns is None else moved * columns
            memory.copy_(moved.view(memory.shape))
            return
        matrix = memory.view(self.shape)
        for first in range(0, self.shape[0], self.strip):
            strip = matrix[first : first + self.strip] if self.strip < self.shape[0] else matrix
            if rows is not None:
                write(strip, "mul_", rows[first : first + self.strip])
            if columns is not None:
                write(strip, "mul_", columns)


class Vectors:
    """Vectors of scales, end to end; each is the product of some factors."""

    def __init__(self) -> None:
        self._size = 0
        self._parts: list[list[tuple[float, Tensor]]] = []

    def add(self, factors: list[tuple[float, Tensor]]) -> slice | None:
        """Place of a vector among all; None for no factors."""
        if not factors:
            return None
        first = self._size
        self._size += len(factors[0][1])
        self._parts.append(factors)
        return slice(first, self._size)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Ids and exponents of shape (most factors, entries); a missing factor is the pinned class 0."""
        most = max((len(factors) for factors in self._parts), default=1)
        ids = torch.zeros(most, self._size, dtype=torch.long)
        exponents = torch.zeros(most, self._size, dtype=torch.float64)
        first = 0
        for factors in self._parts:
            last = first + len(factors[0][1])
            for row, (exponent, part) in enumerate(factors):
                ids[row, first:last], exponents[row, first:last] = part, exponent
            first = last
        return ids, exponents


def matrix_of(scaling: Scaling, tensor: Tensor, vectors: Vectors) -> Matrix | None:
    """Where to cut the axes, as they lie in memory, into rows and columns; None if no cut tells the factors apart, or if that
    took nearly as many scales as the tensor has entries.
    """
    order = memory_order(tensor)
    if not is_dense(tensor) or not tensor.numel():
        return None
    sizes = [tensor.size(axis) for axis in order]
    factors = [(exponent, ids.expand(scaling.shape).permute(order)) for exponent, ids in scaling.factors]
    shapes = {cut: (math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(len(sizes) + 1)}
    sides = {cut: [_side(ids, cut) for _, ids in factors] for cut in shapes}
    costs = {cut: sum(shapes[cut][s] for s in {*found} if s is not None) for cut, found in sides.items() if None not in found}
    cost, cut = min([(cost, cut) for cut, cost in costs.items()], default=(tensor.numel() + _FEW, 0))
    if cost > max(tensor.numel() // 4, _FEW):
        return None
    rows, columns = shapes[cut]
    places = [
        vectors.add([(e, _line(ids, cut, side)) for (e, ids), own in zip(factors, sides[cut], strict=True) if own == side])
        for side in (0, 1)
    ]
    strip = max(1, STRIP // columns) if tensor.device.type == "cpu" else rows
    axes = None if order == [0, 1] else tuple(order)
    return Matrix(tensor.stride(), axes, (rows, columns), places[0], places[1], strip)


def _side(ids: Tensor, cut: int) -> int | None:
    """0 if scales vary along axes before the cut only, 1 if behind it only, None if both."""
    varies = [size > 1 and step > 0 for size, step in zip(ids.shape, ids.stride(), strict=True)]
    return None if any(varies[:cut]) and any(varies[cut:]) else int(any(varies[cut:]))


def _line(ids: Tensor, cut: int, side: int) -> Tensor:
    """The ids along one side."""
    for axis in reversed(range(cut) if side else range(cut, ids.dim())):
        ids = ids.select(axis, 0)
    return ids.flatten()
