"""Families of channels: the order in which they are swept, and the small problem of one scalar for each.

Slow modes of block coordinate descent are one scalar for each family. That problem has as many variables as there are
families, and is solved by sweeps and then Newton steps.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from equinorm.balancing.norm import Norm
from equinorm.balancing.sides import GROUND, Side

DISPARATE = 1.0
"""Imbalance of a family, as a logarithm, from which on Newton's method has a long way to go."""


@dataclass(frozen=True, eq=False)
class FamilyStructure:
    """How blocks join families: what a solver needs to know before it reads a number.

    Attributes:
        blocks: the sides of each block of energies.
        count: number of families.
        norm: of the energies.
    """

    blocks: Sequence[Sequence[Side]]
    count: int
    norm: Norm

    @cached_property
    def exponents(self) -> Tensor:
        """By which each block's energy scales with one scalar for each family: float64, (blocks, families)."""
        found = torch.zeros(len(self.blocks), self.count, dtype=torch.float64)
        for row, own in enumerate(map(_by_family, self.blocks)):
            for family, exponent in own.items():
                found[row, family] = self.norm.q * exponent
        return found

    @property
    def is_chained(self) -> bool:
        """Does some block join families, so that one scalar for each is a problem of its own?"""
        return any(sum(exponent != 0 for exponent in _by_family(sides).values()) > 1 for sides in self.blocks)

    @cached_property
    def steps(self) -> list[float]:
        """By what log(out / in) is multiplied for the coordinate step of a family, so that the objective never increases.

        With a and b the largest sums of positive and of negative exponents by which a family enters one term:
        1 / (2p · max(a, b)), at least for a and b of 1, and 1 / (a + b) for p = ∞.
        """
        up, down = [0.0] * self.count, [0.0] * self.count
        for sides in self.blocks:
            for family in {side.family for side in sides} - {GROUND}:
                exponents = [side.exponent for side in sides if side.family == family]
                up[family] = max(up[family], sum(e for e in exponents if e > 0))
                down[family] = max(down[family], -sum(e for e in exponents if e < 0))
        if self.norm.is_max:
            return [1.0 / (a + b) if a + b else 0.0 for a, b in zip(up, down, strict=True)]
        return [1.0 / (2 * self.norm.p * max(1.0, a, b)) for a, b in zip(up, down, strict=True)]

    @cached_property
    def neighbours(self) -> list[set[int]]:
        """The families that share a block with each family."""
        found: list[set[int]] = [set() for _ in range(self.count)]
        for sides in self.blocks:
            families = {side.family for side in sides} - {GROUND}
            for family in families:
                found[family] |= families - {family}
        return found

    @cached_property
    def colours(self) -> list[int]:
        """A colour for each family so that no block joins two of one colour: two where that is possible, else few."""
        neighbours = self.neighbours
        colour: dict[int, int] = {}
        for start in range(self.count):
            queue = deque([start])
            while queue:
                family = queue.popleft()
                if family not in colour:
                    taken = {colour[other] for other in neighbours[family] if other in colour}
                    colour[family] = next(shade for shade in range(self.count) if shade not in taken)
                    queue += sorted(neighbours[family])
        return [colour[family] for family in range(self.count)]

    def order(self, method: str) -> list[int]:
        """Families in the order of a sweep: by colour where two colours do; as they were made for Algorithm 1."""
        families = list(range(self.count))
        is_by_colour = method == "two-level" and max(self.colours, default=0) < 2
        return sorted(families, key=self.colours.__getitem__) if is_by_colour else families


def _by_family(sides: Sequence[Side]) -> dict[int, float]:
    """The exponent by which each family's scalar moves a block."""
    found: dict[int, float] = {}
    for side in sides:
        if side.family != GROUND:
            found[side.family] = found.get(side.family, 0.0) + side.exponent
    return found


def minimise_families(logs: Tensor, exponents: Tensor) -> Tensor:
    """Minimise Σ_b exp(logs[b] + exponents[b]·t) over t; shapes (blocks,) and (blocks, families).

    Sweeps of coordinate steps bring disparate terms together, then Newton's method with backtracking finishes.
    """
    L, A = logs.numpy(), exponents.numpy()
    t = np.zeros(A.shape[1])
    free = np.flatnonzero((A > 0).any(0) & (A < 0).any(0))
    if not len(free):
        return torch.from_numpy(t)
    if _imbalance(L, A[:, free]) > DISPARATE:
        _coordinate_sweeps(L, A, t, free, 8, DISPARATE)
    _newton(L, A[:, free], t, free)
    return torch.from_numpy(t)


def _imbalance(L: np.ndarray, A: np.ndarray) -> float:
    """Largest |log(out / in)| of a family, not counting those that little enters or leaves."""
    weights = np.exp(L - L.max())
    into, out = weights @ np.maximum(A, 0), weights @ np.maximum(-A, 0)
    low = 1e-300
    return float(np.abs(np.log((out + low) / (into + low))).max())


def _coordinate_sweeps(L: np.ndarray, A: np.ndarray, t: np.ndarray, free: np.ndarray, most: int, tol: float) -> None:
    """One family after the other, until none moves by more than `tol`."""
    columns = [(f, np.flatnonzero(A[:, f])) for f in free]
    columns = [(f, rows, A[rows, f]) for f, rows in columns]
    for _ in range(most):
        moved = 0.0
        for f, rows, a in columns:
            terms = L[rows] + A[rows] @ t + np.log(np.abs(a))
            step = (np.logaddexp.reduce(terms[a < 0]) - np.logaddexp.reduce(terms[a > 0])) / (2 * np.abs(a).max())
            t[f] += step
            moved = max(moved, abs(step))
        if moved < tol:
            return


def _newton(L: np.ndarray, B: np.ndarray, t: np.ndarray, free: np.ndarray) -> None:
    """Newton's method with backtracking."""
    for _ in range(60):
        terms = L + B @ t[free]
        top = terms.max()
        weights = np.exp(terms - top)
        gradient = weights @ B
        hessian = (B * weights[:, None]).T @ B
        hessian[np.diag_indices_from(hessian)] *= 1 + 1e-12
        hessian[np.diag_indices_from(hessian)] += 1e-300
        step = np.linalg.lstsq(hessian, -gradient, rcond=1e-14)[0]
        decrease = -float(gradient @ step)
        if decrease <= 1e-28 * weights.sum() or not np.isfinite(step).all():
            return
        length = 1.0
        while length > 1e-6:
            lower = np.exp(terms + length * (B @ step) - top).sum() <= weights.sum() - 1e-4 * length * decrease
            if lower or decrease < 1e-13 * weights.sum():
                break
            length /= 2
        else:
            return
        t[free] += length * step
