"""Noise: the energy of rounding errors at a network's outputs, as a convex function of log-scales.

    N(z) = Σ_g c_g · r_g(z)² · S_g(z),   r_g = Σ_s max_i |v_si| e^{λ_i(z)},   S_g = Σ_i F_i e^{−2 λ_i(z)},

over groups g of numbers that share a step, c_g = 1 / (12 levels²); s runs over one side, or over those below and above zero. In
place of the maximum, the smooth problem has the power mean of exponent β with weights μ that sum to 1, which is at most the
maximum: its least value is a bound from below. All sums are products of matrices that are kept with vectors of exp(z).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Map = tuple[tuple[float, np.ndarray, bool], ...]
"""Log-scales of some numbers: exponents, ids into z with a 0 in front, and whether no id but 0 comes twice."""

LARGE = 2**16
"""Matrices of more numbers are kept in float32."""


def logs(amounts: Map, z: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """λ = Σ exponent · z[ids]."""
    total = np.zeros(shape)
    for exponent, ids, _ in amounts:
        total += exponent * z[ids]
    return total


def collect(amounts: Map, gradient: np.ndarray, into: np.ndarray) -> None:
    """The transpose of `logs`: add what a gradient on λ is on z."""
    for exponent, ids, is_distinct in amounts:
        if is_distinct:
            into[ids] += exponent * gradient
        else:
            into += exponent * np.bincount(ids.ravel(), np.broadcast_to(gradient, ids.shape).ravel(), minlength=len(into))


def small(matrix: np.ndarray) -> np.ndarray:
    """In float32 if it is large."""
    return matrix.astype(np.float32) if matrix.size > LARGE else matrix


@dataclass(slots=True, eq=False)
class Term:
    """Numbers v[b, i, j] of one tensor, whose log-scale is row[b, i] + column[b, j].

    Attributes:
        sides: ln |v| of shape (B, I, J), −inf for zeros; one array, or two for steps that are not symmetric.
        sensitivity: F, of the same shape.
        rows: how rows scale.
        columns: how columns scale.
        is_whole: do all numbers share a step? Otherwise those of each row (b, i) do.
        coefficient: 1 / (12 levels²).
    """

    sides: list[np.ndarray]
    sensitivity: np.ndarray
    rows: Map
    columns: Map
    is_whole: bool
    coefficient: float
    powers: list[np.ndarray] = field(default_factory=list)
    bases: list[np.ndarray] = field(default_factory=list)
    center: tuple[np.ndarray, np.ndarray] | None = None
    beta: float = 1.0

    def vectors(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-scales of rows and columns; steps of one row move with it, so that its own scale cancels."""
        batch, many, each = self.sensitivity.shape
        row = logs(self.rows, z, (batch, many)) if self.is_whole else np.zeros((batch, many))
        return row, logs(self.columns, z, (batch, each))

    def exact(self, z: np.ndarray) -> float:
        """N of this tensor."""
        row, column = self.vectors(z)
        ranges = sum(np.exp(self._most(side, row, column)) for side in self.sides)
        sums = np.exp(-2 * row) * self._times(self.sensitivity, np.exp(-2 * column))
        return float(self.coefficient * (ranges**2 * (sums.sum(keepdims=True) if self.is_whole else sums)).sum())

    def sharpen(self, z: np.ndarray, beta: float, loose: float | None) -> None:
        """Take the power mean of exponent β around z.

        Args:
            z: free log-scales, with a 0 in front.
            beta: the exponent.
            loose: the weights become what the last power mean says of z, but for this share, which all numbers have alike so
                that each can come back. None: all weights are 1, so that the mean is a sum, above the maximum.
        """
        row, column = self.vectors(z)
        powers, self.bases = [], []
        for place, side in enumerate(self.sides):
            most = self._most(side, row, column)
            most = np.where(np.isfinite(most), most, 0.0)
            power = side + row[:, :, None] + column[:, None, :] - most[..., None]
            np.exp(np.multiply(power, beta, out=power), out=power)
            if loose is not None and self.center is not None:
                power *= self._weights(self.powers[place], row - self.center[0], column - self.center[1], loose)
            powers.append(small(power))
            self.bases.append(most)
        self.powers, self.center, self.beta = powers, (row, column), beta

    def _weights(self, power: np.ndarray, row: np.ndarray, column: np.ndarray, loose: float) -> np.ndarray:
        """The share of every number in the last power mean, at log-scales that moved by so much."""
        share = power * np.exp(self.beta * row)[:, :, None]
        share *= np.exp(self.beta * column)[:, None, :]
        axes = (0, 1, 2) if self.is_whole else 2
        total = share.sum(axis=axes, keepdims=True)
        many = (power > 0).sum(axis=axes, keepdims=True).clip(min=1)
        share *= (1 - loose) / np.where(total > 0, total, 1.0)
        share += loose / many * (power > 0)
        return share

    def smooth(self, z: np.ndarray, gradient: np.ndarray) -> float:
        """N of this tensor with power means for maxima; adds its gradient."""
        assert self.center is not None
        row, column = self.vectors(z)
        up, along = (np.exp(self.beta * (now - then)) for now, then in zip((row, column), self.center, strict=True))
        down, across = np.exp(-2 * row), np.exp(-2 * column)
        sums = down * self._times(self.sensitivity, across)
        parts = [up * self._times(power, along) for power in self.powers]
        totals = [part.sum(keepdims=True) if self.is_whole else part for part in parts]
        safe = [np.where(total > 0, total, 1.0) for total in totals]
        ranges = [
            np.where(total > 0, np.exp(base) * total ** (1 / self.beta), 0.0)
            for total, base in zip(totals, self.bases, strict=True)
        ]
        whole = sum(ranges)
        joint = sums.sum(keepdims=True) if self.is_whole else sums
        steps = 2 * self.coefficient * whole * joint  # of N by r
        by_row = -2 * self.coefficient * whole**2 * sums if self.is_whole else np.zeros_like(sums)
        by_column = -2 * across * self._back(self.sensitivity, self.coefficient * whole**2 * down * np.ones_like(sums))
        for power, part, total, extent in zip(self.powers, parts, safe, ranges, strict=True):
            share = steps * extent / total
            if self.is_whole:
                by_row += share * part
            by_column += along * self._back(power, share * up)
        if self.is_whole:
            collect(self.rows, by_row, gradient)
        collect(self.columns, by_column, gradient)
        return float((self.coefficient * whole**2 * joint).sum())

    def _most(self, side: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """The largest logarithm of each row, or of all."""
        each = (side + column[:, None, :]).max(axis=2) + row
        return each.max(keepdims=True) if self.is_whole else each

    @staticmethod
    def _times(matrix: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Each matrix of a batch times its vector."""
        if 1 in matrix.shape[1:]:  # thousands of depthwise kernels
            return (matrix * column[:, None, :]).sum(axis=2)
        return product(matrix, column[:, :, None])[:, :, 0]

    @staticmethod
    def _back(matrix: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Each vector of a batch times its matrix."""
        if 1 in matrix.shape[1:]:
            return (matrix * row[:, :, None]).sum(axis=1)
        return product(row[:, None, :], matrix)[:, 0, :]


def product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Matrix products of a batch, in the coarser dtype of both, by PyTorch, whose threads can be limited."""
    dtype = np.float32 if np.float32 in (one.dtype, other.dtype) else np.float64
    return torch.bmm(*(torch.from_numpy(part.astype(dtype, copy=False)) for part in (one, other))).numpy().astype(np.float64)


class Noise:
    """The sum over tensors.

    Args:
        terms: one for each tensor.
        num_free: number of log-scales.
    """

    def __init__(self, terms: Sequence[Term], num_free: int) -> None:
        self.terms, self.num_free = list(terms), num_free

    def exact(self, z: np.ndarray) -> np.ndarray:
        """N of every tensor."""
        padded = np.concatenate([[0.0], z])
        return np.array([term.exact(padded) for term in self.terms])

    def sharpen(self, z: np.ndarray, beta: float, loose: float | None) -> None:
        """See `Term.sharpen`."""
        padded = np.concatenate([[0.0], z])
        for term in self.terms:
            term.sharpen(padded, beta, loose)

    def smooth(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        """ln N with power means for maxima, and its gradient."""
        padded, gradient = np.concatenate([[0.0], z]), np.zeros(self.num_free + 1)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            total = sum(term.smooth(padded, gradient) for term in self.terms)
            return (float(np.log(total)), gradient[1:] / total) if np.isfinite(total) else (np.inf, gradient[1:])
