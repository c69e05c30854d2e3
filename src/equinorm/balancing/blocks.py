"""Blocks of energies, as the solver sees them: a matrix between two sides, or a list of terms.

A block is a matrix of energies between an out-axis and an in-axis (linear layers, convolutions), or a list of terms (grouped
convolutions, monomials). Every side of a block belongs to one family of channels, or to the ground, whose log-scale is 0.
Energies are kept here, or read from the weights each time (`streamed`, `sharded`).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from equinorm._memory import STRIP
from equinorm.balancing.norm import Norm
from equinorm.balancing.sides import Side


class AnyBlock(ABC):
    """What the solver needs of a block, however its energies are held.

    Attributes:
        tensor: index of the scaling that it comes from.
        sides: who moves the energies.
    """

    tensor: int
    sides: tuple[Side, ...]

    @property
    def is_matrix(self) -> bool:
        """Is it a matrix, not a list of terms?"""
        return True

    @property
    def is_empty(self) -> bool:
        """Has it no entries?"""
        return not all(side.ids.numel() for side in self.sides)

    @abstractmethod
    def log_energies(self, side: int, z: Tensor, norm: Norm) -> Tensor:
        """Logarithm of the energy of each channel (of each term) along one side, at log-scales z."""

    def log_total(self, z: Tensor, norm: Norm) -> float:
        """Logarithm of the block's whole energy."""
        return log_sum(self.log_energies(0, z, norm))

    @abstractmethod
    def hits(self, place: int, ready: Tensor) -> Tensor:
        """Which channels along one side of a matrix a nonzero energy joins to a channel of the other that is ready."""

    @abstractmethod
    def without(self, dead: Tensor) -> "AnyBlock":
        """The same block with no energy where a dead class takes part; `dead` is a mask over 0..num_free."""


@dataclass(eq=False)
class Block(AnyBlock):
    """Energies E with their sides: a matrix with two sides (rows, columns), or a list of terms with any number of them.

    Attributes:
        tensor: index of the scaling that it comes from.
        energies: float64 or float32, (rows, columns) or (terms,).
        offsets: natural logarithms to add to the log-energies, one tensor for each side, or one for all terms.
        sides: who moves them.
    """

    tensor: int
    energies: Tensor
    offsets: tuple[Tensor, ...]
    sides: tuple[Side, ...]
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def is_matrix(self) -> bool:
        """Is it a matrix, not a list of terms?"""
        return self.energies.dim() == 2

    def log_energies(self, side: int, z: Tensor, norm: Norm) -> Tensor:
        """Logarithm of the energy of each channel (of each term) along one side, at log-scales z.

        The product with the matrix is kept: it stays valid while the other side has moved as a whole at most.
        """
        q = norm.q
        if not self.is_matrix:
            total = self.energies.double().log() + self.offsets[0]
            for part in self.sides:
                total = total + q * part.exponent * z[part.ids]
            return total
        own, other = self.sides[side], self.sides[1 - side]
        there = z[other.ids]
        if side in self._kept:
            before, base = self._kept[side]
            if torch.equal(there, before):
                return base + q * own.exponent * z[own.ids]
            shift = there - before
            if float(shift.max() - shift.min()) <= 1e-15 * max(1.0, float(shift.abs().max())):
                return base + q * (other.exponent * shift[0] + own.exponent * z[own.ids])
        logs = q * other.exponent * there + self.offsets[1 - side]
        top = logs.max()
        factors = torch.exp(logs - top).to(self.energies.dtype)
        matrix = self.energies if side == 0 else self.energies.T
        sums = _largest(matrix, factors) if norm.is_max else matrix @ factors
        base = sums.double().log() + top + self.offsets[side]
        self._kept[side] = (there.clone(), base)
        return base + q * own.exponent * z[own.ids]

    def log_total(self, z: Tensor, norm: Norm) -> float:
        """Logarithm of the block's whole energy."""
        side = next(iter(self._kept), 0)
        logs = self.log_energies(side, z, norm)
        return float(logs.max()) if norm.is_max else log_sum(logs)

    def hits(self, place: int, ready: Tensor) -> Tensor:
        """Which channels along one side of a matrix a nonzero energy joins to a channel of the other that is ready."""
        matrix = self.energies if place == 0 else self.energies.T
        return matrix @ ready.to(matrix.dtype) > 0

    def without(self, dead: Tensor) -> "Block":
        """The same block with no energy where a dead class takes part; `dead` is a mask over 0..num_free."""
        energies = self.energies
        for axis, side in enumerate(self.sides):
            mask = dead[side.ids]
            if bool(mask.any()):
                place = axis if self.is_matrix else 0
                energies = energies.masked_fill(mask.reshape([-1 if i == place else 1 for i in range(energies.dim())]), 0.0)
        return self if energies is self.energies else replace(self, energies=energies, _kept={})


def log_sum(logs: Tensor) -> float:
    """Logarithm of the sum of these energies."""
    return float(logs.logsumexp(0)) if logs.numel() else -math.inf


def _largest(matrix: Tensor, factors: Tensor) -> Tensor:
    """max_j matrix[i, j] · factors[j], a strip that fits the cache at a time, along the rows as they lie in memory."""
    by_row = matrix.stride(1) == 1 or matrix.stride(0) != 1
    memory, factors, best = (matrix, factors, None) if by_row else (matrix.T, factors[:, None], matrix.new_zeros(len(matrix)))
    strip = max(1, STRIP // max(matrix.shape))
    room = memory.new_empty(min(strip, len(memory)), memory.shape[1])  # fresh pages cost more than products
    if best is None:
        return torch.cat([torch.mul(rows, factors, out=room[: len(rows)]).amax(1) for rows in memory.split(strip)])
    for rows, own in zip(memory.split(strip), factors.split(strip), strict=True):
        torch.maximum(best, torch.mul(rows, own, out=room[: len(rows)]).amax(0), out=best)
    return best
