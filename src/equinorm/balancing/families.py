"""Families of channels: the order in which they are swept, and the small problem of one scalar for each.

Slow modes of block coordinate descent are one scalar for each family. That problem has as many variables as there are
families, and is solved by sweeps and then Newton steps.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm.balancing.layout import Part
from equinorm.balancing.problem import GROUND, AnyBlock

DISPARATE = 1.0
"""Imbalance of a family, as a logarithm, from which on Newton's method has a long way to go."""


def colours(blocks: Sequence[AnyBlock | Part], count: int) -> list[int]:
    """A colour for each family so that no block joins two of one colour: two where that is possible, else few."""
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for block in blocks:
        families = {side.family for side in block.sides} - {GROUND}
        for family in families:
            neighbours[family] |= families - {family}
    colour: dict[int, int] = {}
    for start in range(count):
        queue = deque([start])
        while queue:
            family = queue.popleft()
            if family not in colour:
                taken = {colour[other] for other in neighbours[family] if other in colour}
                colour[family] = next(shade for shade in range(count) if shade not in taken)
                queue += sorted(neighbours[family])
    return [colour[family] for family in range(count)]


def red_black(blocks: Sequence[AnyBlock | Part], count: int) -> list[int]:
    """Families in an order for sweeps: by colour where two colours do, otherwise as they were made."""
    colour = colours(blocks, count)
    return sorted(range(count), key=colour.__getitem__) if max(colour, default=0) < 2 else list(range(count))


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
