"""Rescaling recorded once: all scales come from one gather, and are multiplied in where tensors lie in memory.

A tensor is looked at as a matrix over its memory whose rows share one scale and whose columns share another, so that every
product runs along the memory, a strip that fits the cache at a time.
"""

import ctypes
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm import native
from equinorm._blocks import STRIP
from equinorm._rescale import LN2, unit_of_powers_of_two
from equinorm._scaling import Scaling
from equinorm.native import kernels

_FEW = 4096
"""Entries of a tensor for which a scale each costs nothing."""


_Scales = tuple[Tensor | None, Tensor | None]
"""Of a matrix's rows, as a column vector, and of its columns; None where they are 1."""


@dataclass(frozen=True, slots=True, eq=False)
class _Matrix:
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

    def find(self, scales: Tensor) -> _Scales:
        """Its own among all scales."""
        rows = None if self.by_row is None else scales[self.by_row, None]
        return rows, None if self.by_column is None else scales[self.by_column]

    def multiply_(self, tensor: Tensor, scales: _Scales) -> None:
        """tensor ← rows · tensor · columns."""
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
                strip.mul_(rows[first : first + self.strip])
            if columns is not None:
                strip.mul_(columns)


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """A tensor that moves, and the parts of it that move otherwise.

    Attributes:
        index: of its scaling.
        tensor: tensor ← Σ parts · s^power + (tensor − Σ parts) · s^exponent.
        exponent: of the scales.
        parts: tensors with their own powers, which move likewise.
        offset: of a weight: tensor + offset moves.
    """

    index: int
    tensor: Tensor
    exponent: int
    parts: tuple[tuple[Tensor, int], ...] = ()
    offset: float = 0.0

    @property
    def is_square(self) -> bool:
        """Is it an average of squares of sums, with parts that may cancel?"""
        return self.exponent == -2 and bool(self.parts)

    @property
    def exponents(self) -> tuple[int, ...]:
        """All powers of the scales that it needs."""
        return (self.exponent, *(power for _, power in self.parts))


class Mover:
    """Multiplies tensors by powers of their scales, in place.

    Args:
        scalings: how they move; tensors refer to them by index.
        tensors: by name. What belongs to them may lie in memory as they do, or otherwise, which takes longer.
        device: of the tensors.
        dtype: of the scales.
        power_of_two: round every scale to a power of two.
        compiled: dtypes of the tensors that compiled kernels shall move.
    """

    def __init__(
        self,
        scalings: Sequence[Scaling],
        tensors: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        power_of_two: bool,
        compiled: Iterable[torch.dtype] = (),
    ) -> None:
        self._kernels = {name: found for name in {*compiled} if (found := kernels(name, dtype)) is not None}
        self._factors = [[(exponent, ids.to(device)) for exponent, ids in scaling.factors] for scaling in scalings]
        self._unit = unit_of_powers_of_two(scalings) if power_of_two else None
        vectors = _Vectors()
        self._matrices = [_matrix(scaling, tensors[scaling.name], vectors) for scaling in scalings]
        ids, exponents = vectors.joined()
        distinct, which = torch.unique(exponents, return_inverse=True)
        self._places = (ids * len(distinct) + which).to(device)  # in a table of classes by exponents
        self._distinct = distinct.to(device, dtype)
        self._z = torch.zeros(1, device=device, dtype=dtype)
        longest = max((max(matrix.shape) for matrix in self._matrices if matrix is not None), default=1) if self._kernels else 1
        self._ones = torch.ones(longest, device=device, dtype=dtype)
        self._recorded_of: Sequence[Move] | None = None
        self._recorded: dict[torch.dtype, ctypes.Array] = {}
        self._others: list[Move] = []
        self._powers: dict[int, Tensor] = {}
        self._scales: dict[int, list[_Scales | None]] = {}

    def aim(self, z: Tensor, exponents: Iterable[int]) -> None:
        """Take the log-scales of classes 0..num_free, and the exponents with which they will be used."""
        self._z = z if self._unit is None else torch.round(z / self._unit) * self._unit
        for exponent in {*exponents}:
            if exponent not in self._powers:
                powers = self._powers[exponent] = self._z.new_empty(self._places.size(1))
                self._scales[exponent] = [matrix and matrix.find(powers) for matrix in self._matrices]
            table = self._exp_(self._z[:, None] * (self._distinct * exponent)).view(-1)
            found = torch.index_select(table, 0, self._places[0], out=self._powers[exponent])
            for places in self._places[1:]:
                found.mul_(table[places])

    def move_(self, moves: Sequence[Move]) -> None:
        """Move tensors and their parts; the list may be kept until the next time, and must not change until then."""
        if self._kernels:
            if moves is not self._recorded_of:
                self._record(moves)
            for dtype, records in self._recorded.items():
                self._kernels[dtype].scale_(records)
            moves = self._others
        for move in moves:
            if move.offset:
                for scale in self._broadcast(move.index, move.exponent):
                    move.tensor.mul_(scale).add_((scale - 1) * move.offset)
                continue
            for part, _ in move.parts:
                move.tensor.sub_(part)
            if move.is_square:
                move.tensor.clamp_(min=0)
            self._multiply_(move.index, move.tensor, move.exponent)
            for part, power in move.parts:
                self._multiply_(move.index, part, power)
            least = self._least(move) if move.is_square else None
            for part, _ in move.parts:
                move.tensor.add_(part)
            if least is not None:
                torch.maximum(move.tensor, least, out=move.tensor)

    def _record(self, moves: Sequence[Move]) -> None:
        """Tell apart what the compiled kernels move."""
        found: dict[torch.dtype, list[native.Move]] = {}
        self._others = []
        for move in moves:
            if self._is_native(move):
                found.setdefault(move.tensor.dtype, []).append(self._recorded_move(move))
            else:
                self._others.append(move)
        self._recorded = {dtype: native.array(native.Move, records) for dtype, records in found.items()}
        self._recorded_of = moves

    def _is_native(self, move: Move) -> bool:
        """Does a compiled kernel know this?"""
        matrix, parts = self._matrices[move.index], [part for part, _ in move.parts]
        if move.tensor.dtype not in self._kernels or matrix is None or len(parts) > 1 or move.is_square or move.offset:
            return False
        return all(tensor.stride() == matrix.strides and tensor.dtype == move.tensor.dtype for tensor in (move.tensor, *parts))

    def _recorded_move(self, move: Move) -> native.Move:
        """The same in one pass."""
        matrix = self._matrices[move.index]
        assert matrix is not None
        scales = [scale for power in move.exponents for scale in self._lines(move.index, power)]
        pointers = [scale.data_ptr() for scale in scales]
        part = move.parts[0][0].data_ptr() if move.parts else None
        return native.Move(move.tensor.data_ptr(), part, *matrix.shape, *pointers)

    def _lines(self, index: int, exponent: int) -> tuple[Tensor, Tensor]:
        """Scales of rows and columns, also where they are 1."""
        rows, columns = self._scales[exponent][index] or (None, None)
        return self._ones if rows is None else rows, self._ones if columns is None else columns

    def _least(self, move: Move) -> Tensor:
        """Averages of (g + λw)² where gradients and decay cancel are smaller than the parts' rounding; they stay above 0."""
        squares = sum((part for part, power in move.parts if power == 2), move.tensor)
        return squares * torch.finfo(squares.dtype).eps

    def _multiply_(self, index: int, tensor: Tensor, exponent: int) -> None:
        """tensor ← tensor · s^exponent."""
        if exponent == 0:
            return
        matrix, scales = self._matrices[index], self._scales[exponent][index]
        if matrix is not None and scales is not None and matrix.strides == tensor.stride():
            matrix.multiply_(tensor, scales)
            return
        for scale in self._broadcast(index, exponent):
            tensor.mul_(scale)

    def _broadcast(self, index: int, exponent: int) -> Iterator[Tensor]:
        """The factors of one scaling, which broadcast to its tensor."""
        for own, ids in self._factors[index]:
            yield self._exp_(self._z[ids] * (own * exponent))

    def _exp_(self, logs: Tensor) -> Tensor:
        if self._unit is None:
            return logs.exp_()
        return torch.ldexp(torch.ones_like(logs), torch.round(logs / LN2), out=logs)


class _Vectors:
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


def _matrix(scaling: Scaling, tensor: Tensor, vectors: _Vectors) -> _Matrix | None:
    """Where to cut the axes, as they lie in memory, into rows and columns; None if no cut tells the factors apart, or if that
    took nearly as many scales as the tensor has entries.
    """
    order = native.memory_order(tensor)
    if not native.is_dense(tensor):
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
    return _Matrix(tensor.stride(), axes, (rows, columns), places[0], places[1], strip)


def _side(ids: Tensor, cut: int) -> int | None:
    """0 if scales vary along axes before the cut only, 1 if behind it only, None if both."""
    varies = [size > 1 and step > 0 for size, step in zip(ids.shape, ids.stride(), strict=True)]
    return None if any(varies[:cut]) and any(varies[cut:]) else int(any(varies[cut:]))


def _line(ids: Tensor, cut: int, side: int) -> Tensor:
    """The ids along one side."""
    for axis in reversed(range(cut) if side else range(cut, ids.dim())):
        ids = ids.select(axis, 0)
    return ids.flatten()
