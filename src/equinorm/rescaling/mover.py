"""Rescaling recorded once: all scales come from one gather, and are multiplied in where tensors lie in memory.

A tensor is looked at as a matrix over its memory whose rows share one scale and whose columns share another, so that every
product runs along the memory, a strip that fits the cache at a time.
"""

import ctypes
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm import native
from equinorm._errors import RescaleError
from equinorm._scaling import Scaling
from equinorm.native import Compute, kernels_for
from equinorm.rescaling.bounds import room
from equinorm.rescaling.journal import Journal
from equinorm.rescaling.memory_matrix import Scales, Vectors, matrix_of
from equinorm.rescaling.powers_of_two import LN2, unit_of_powers_of_two

LONG = 2.0
"""Log-scale of a step from which on it is looked whether a state would overflow."""


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """A tensor that moves, and the parts of it that move otherwise.

    Attributes:
        index: of its scaling.
        tensor: tensor ← Σ parts · s^power + (tensor − Σ parts) · s^exponent.
        exponent: of the scales.
        parts: tensors with their own powers, which move likewise.
        offset: of a weight: tensor + offset moves.
        averaged: axis along which it is an average; its scales are those of any one entry.
    """

    index: int
    tensor: Tensor
    exponent: int
    parts: tuple[tuple[Tensor, int], ...] = ()
    offset: float = 0.0
    averaged: int | None = None

    @property
    def is_square(self) -> bool:
        """Is it an average of squares of sums, with parts that may cancel?"""
        return self.exponent == -2 and bool(self.parts)

    @property
    def exponents(self) -> tuple[int, ...]:
        """All powers of the scales that it needs."""
        return (self.exponent, *(power for _, power in self.parts))


@dataclass(frozen=True, slots=True, eq=False)
class _KernelMoves:
    """Moves as the compiled kernels take them, by dtype; the same moves; the tensors that these write; and the others."""

    arrays: dict[torch.dtype, ctypes.Array]
    known: dict[torch.dtype, list[Move]]
    written: list[Tensor]
    others: list[Move]


_Step = tuple[str, int, int]
"""One operation of a move: its kind, its place among the factors or tensors, the power of the scales."""


class Mover:
    """Multiplies tensors by powers of their scales, in place.

    Args:
        scalings: how they move; tensors refer to them by index.
        tensors: by name. What belongs to them may lie in memory as they do, or otherwise, which takes longer.
        compute: where the tensors are, the dtype of the scales, and what compiled kernels shall move.
        power_of_two: round every scale to a power of two.
    """

    def __init__(
        self, scalings: Sequence[Scaling], tensors: Mapping[str, Tensor], compute: Compute, power_of_two: bool
    ) -> None:
        device, dtype = compute.device, compute.dtype
        self._kernels = {name: found for name in compute.native if (found := kernels_for(name, dtype)) is not None}
        self._factors = [[(exponent, ids.to(device)) for exponent, ids in scaling.factors] for scaling in scalings]
        self._unit = unit_of_powers_of_two(scalings) if power_of_two else None
        vectors = Vectors()
        self._matrices = [matrix_of(scaling, tensors[scaling.name], vectors) for scaling in scalings]
        ids, exponents = vectors.joined()
        by_factor = (torch.tensor([abs(exponent) for exponent, _ in factors]) for factors in self._factors if factors)
        sums = [exponents.abs().sum(0), *by_factor]
        self._names = [scaling.name for scaling in scalings]
        self._steepest = max((float(found.max()) for found in sums if found.numel()), default=1.0)
        distinct, which = torch.unique(exponents, return_inverse=True)
        self._places = (ids * len(distinct) + which).to(device)  # in a table of classes by exponents
        self._distinct = distinct.to(device, dtype)
        self._z = torch.zeros(1, device=device, dtype=dtype)
        longest = max((max(matrix.shape) for matrix in self._matrices if matrix is not None), default=1) if self._kernels else 1
        self._ones = torch.ones(longest, device=device, dtype=dtype)
        self._spare = math.inf  # by how much, as a logarithm, entries may grow until it is looked again; less after a cut
        self._journal = Journal()  # of the operation that runs
        self._recorded_of: Sequence[Move] = ()
        self.forget()
        self._powers: dict[int, Tensor] = {}
        self._scales: dict[int, list[Scales | None]] = {}

    def set_log_scales(self, z: Tensor, exponents: Iterable[int]) -> None:
        """Take the log-scales of classes 0..num_free, and the exponents with which they will be used."""
        self._z = z if self._unit is None else torch.round(z / self._unit) * self._unit
        wanted = {*exponents}
        for exponent in sorted(wanted, reverse=True):
            if exponent not in self._powers:
                powers = self._powers[exponent] = self._z.new_empty(self._places.size(1))
                self._scales[exponent] = [matrix and matrix.find(powers) for matrix in self._matrices]
            if exponent < 0 and -exponent in wanted:
                torch.reciprocal(self._powers[-exponent], out=self._powers[exponent])
                continue
            table = self._exp_(self._z[:, None] * (self._distinct * exponent)).view(-1)
            found = torch.index_select(table, 0, self._places[0], out=self._powers[exponent])
            for places in self._places[1:]:
                found.mul_(table[places])

    def cut(self, z: Tensor, exponents: Iterable[int], moves: Sequence[Move]) -> Tensor:
        """Log-scales with which every power of every scale stays finite and above zero: longer steps are cut.

        On a CPU long steps are halved until nothing that moves overflows. After one that was cut, short steps are looked at too
        once they have used half of the room that was seen last. Elsewhere looking would cost a synchronisation.
        """
        steepest = self._steepest * max(map(abs, exponents), default=1)
        limit = -0.9 * math.log(torch.finfo(z.dtype).tiny) / max(steepest, 1e-30)
        if z.device.type != "cpu":
            return z.clamp(-limit, limit)
        longest = float(torch.linalg.vector_norm(z, math.inf))
        if longest <= min(LONG, limit) and longest * steepest <= self._spare:
            self._spare -= longest * steepest
            return z
        z = z.clamp(-limit, limit)
        for _ in range(8):
            least = min((self._room(z, move) for move in moves), default=math.inf)
            if least >= 0:
                self._spare = least / 2 if self._spare < math.inf else math.inf
                return z
            z, self._spare = z / 2, 0.0
        return torch.zeros_like(z)

    def _room(self, z: Tensor, move: Move) -> float:
        """The least logarithm by which something that moves stays below overflow."""
        tensors, factors = (move.tensor, *(part for part, _ in move.parts)), self._factors[move.index]
        pairs = zip(tensors, move.exponents, strict=True)
        return min(room(tensor, [z[ids] * (exponent * power) for exponent, ids in factors]) for tensor, power in pairs)

    def move_(self, lasting: Sequence[Move], passing: Sequence[Move] = ()) -> None:
        """Move tensors and their parts.

        Args:
            lasting: kept until the next time, when the same list need not be looked at again.
            passing: not kept.

        Raises:
            RescaleError: if an operation fails; what had moved is put back then, to within rounding.
        """
        if torch.compiler.is_compiling():
            for one, step in [(move, step) for move in (*lasting, *passing) for step in self._steps(move)]:
                self._do(one, step)
            return
        done, begun, now = list[Move](), list[_Step](), None
        self._journal.clear()
        try:
            rest = [*lasting, *passing]
            if self._kernels:
                if lasting is not self._recorded_of:
                    self._recorded_of, self._recorded = lasting, self._record(lasting)
                rest = [*self._move_natively_(self._recorded, done), *self._move_natively_(self._record(passing), done)]
            for move in rest:
                now, begun = move, []
                for step in self._steps(move):
                    self._journal.clear()
                    self._do(move, step)
                    begun.append(step)
                done.append(move)
        except BaseException as error:
            outcome = self._put_back(done, now, begun)
            if not isinstance(error, Exception):
                raise
            what = "it" if now is None else self._names[now.index]
            raise RescaleError(f"moving {what} failed: {type(error).__name__}: {error}. {outcome}") from error
        self._journal.clear()  # it would keep gradients alive

    def _steps(self, move: Move) -> Sequence[_Step]:
        """The operations of one move."""
        if move.offset:
            return [("offset", place, move.exponent) for place in range(len(self._factors[move.index]))]
        if not move.parts:
            return (("scale", 0, move.exponent),)
        tensors = (move.tensor, *(part for part, _ in move.parts))
        scaled = [("scale", place, power) for place, power in zip(range(len(tensors)), move.exponents, strict=True) if power]
        return [("take", 0, 0), *scaled, ("join", 0, 0)]

    def _do(self, move: Move, step: _Step, is_back: bool = False) -> None:
        """Do one operation, or take it back."""
        kind, place, power = step
        if kind == "offset":
            scale = self._broadcast(move, -power if is_back else power)[place]
            self._journal.write(move.tensor, "mul_", scale)
            self._journal.write(move.tensor, "add_", (scale - 1) * move.offset)
        elif kind == "scale":
            tensor = move.parts[place - 1][0] if place else move.tensor
            if is_back:
                for scale in self._broadcast(move, -power):
                    tensor.mul_(scale)
            else:
                self._multiply_(move, tensor, power)
        elif (kind == "take") != is_back:
            for part, _ in move.parts:
                self._journal.write(move.tensor, "sub_", part)
            if move.is_square:
                move.tensor.clamp_(min=0)
        else:
            least = self._least(move) if move.is_square else None
            for part, _ in move.parts:
                self._journal.write(move.tensor, "add_", part)
            if least is not None:
                torch.maximum(move.tensor, least, out=move.tensor)

    def _put_back(self, done: Sequence[Move], now: Move | None, begun: Sequence[_Step]) -> str:
        """Take back what was done, last first; says how well that went."""
        steps = [(move, step) for move in done for step in self._steps(move)]
        steps += [(now, step) for step in begun if now is not None]
        lost: dict[str, None] = {}
        if not self._journal.take_back() and now is not None:
            lost[self._names[now.index]] = None
        for move, step in reversed(steps):
            try:
                self._do(move, step, is_back=True)
            except Exception:
                lost[self._names[move.index]] = None
        if lost:
            return f"What belongs to these could not be put back, load a checkpoint: {', '.join(lost)}."
        return "What had moved was put back, to within rounding."

    def forget(self) -> None:
        """Keep no moves."""
        self._recorded_of, self._recorded = (), _KernelMoves({}, {}, [], [])

    def _record(self, moves: Sequence[Move]) -> _KernelMoves:
        """Tell apart what the compiled kernels move."""
        found: dict[torch.dtype, list[native.Move]] = {}
        written: list[Tensor] = []
        known: dict[torch.dtype, list[Move]] = {}
        others: list[Move] = []
        for move in moves:
            if self._is_native(move):
                found.setdefault(move.tensor.dtype, []).append(self._recorded_move(move))
                known.setdefault(move.tensor.dtype, []).append(move)
                written += [move.tensor, *(part for part, _ in move.parts)]
            else:
                others.append(move)
        arrays = {dtype: native.array(native.Move, records) for dtype, records in found.items()}
        return _KernelMoves(arrays, known, written, others)

    def _move_natively_(self, recorded: _KernelMoves, done: list[Move]) -> list[Move]:
        """Run the kernels; returns what is left to do."""
        for dtype, records in recorded.arrays.items():
            self._kernels[dtype].scale_(records)
            done += recorded.known[dtype]
        torch.autograd.graph.increment_version(recorded.written)
        return recorded.others

    def _is_native(self, move: Move) -> bool:
        """Does a compiled kernel know this?"""
        matrix, parts = self._matrices[move.index], [part for part, _ in move.parts]
        if move.tensor.dtype not in self._kernels or matrix is None or len(parts) > 1:
            return False
        if move.is_square or move.offset or move.averaged is not None:
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

    def _multiply_(self, move: Move, tensor: Tensor, exponent: int) -> None:
        """tensor ← tensor · s^exponent."""
        matrix, scales = self._matrices[move.index], self._scales[exponent][move.index]
        if matrix is not None and scales is not None and matrix.strides == tensor.stride() and move.averaged is None:
            matrix.multiply_(tensor, scales, self._journal.write)
            return
        for scale in self._broadcast(move, exponent):
            self._journal.write(tensor, "mul_", scale)

    def _broadcast(self, move: Move, exponent: int) -> list[Tensor]:
        """The factors of one scaling, which broadcast to its tensor."""
        factors = self._factors[move.index]
        if move.averaged is not None:
            factors = [(power, ids.narrow(move.averaged, 0, 1)) for power, ids in factors]
        return [self._exp_(self._z[ids] * (power * exponent)) for power, ids in factors]

    def _exp_(self, logs: Tensor) -> Tensor:
        if self._unit is None:
            return logs.exp_()
        return torch.ldexp(torch.ones_like(logs), torch.round(logs / LN2), out=logs)
