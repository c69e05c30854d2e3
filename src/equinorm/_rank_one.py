"""A network whose energies are rank-one: what one reading of the weights tells of it.

Reading a matrix of energies E at log-scales z gives its sums along both sides, r and s, and its total T. Near z the matrix is
taken for r sᵀ / T, which has the same sums; that is exact if channels differ in scale alone, and close in wide layers, where
the sums of many independent weights differ little. The objective is then

    φ(z + δ) ≈ Σ_b T_b · Π_sides Σ_j share_j · exp(q · a · δ_j)

with vectors only, and its minimum costs no further reading. Lists of terms enter exactly. Gradients at δ = 0 are exact, so
that a point which the model does not move is the true minimum.
"""

import numpy as np
import torch
from torch import Tensor

from equinorm._blocks import GROUND, AnyBlock, Problem, stiffness
from equinorm._families import colours, minimise_families

SWEEPS = 20
"""Most sweeps over the model in one cycle."""


class RankOne:
    """The model; its structure is worked out once, its numbers come with each reading.

    Args:
        problem: whose blocks it describes.
        live: mask over 0..num_free of the classes that may move.
    """

    def __init__(self, problem: Problem, live: Tensor) -> None:
        self._problem, self._q = problem, problem.q
        blocks = [block for block in problem.blocks if not block.is_empty]
        self._matrices = [block for block in blocks if block.is_matrix and _free_sides(block) > 1]
        self._lists = [block for block in blocks if not block.is_matrix or _free_sides(block) < 2]
        self._live = live.numpy()
        self._count = problem.num_free + 1
        # One entry for each channel along each side of a matrix; then one for each term and each of its sides.
        sides = [(number, place, side) for number, block in enumerate(self._matrices) for place, side in enumerate(block.sides)]
        self._segments = [(number, place) for number, place, _ in sides]
        lengths = np.array([len(side.ids) for _, _, side in sides], np.int64)
        self._starts = np.cumsum(lengths) - lengths
        self._segment = np.repeat(np.arange(len(sides)), lengths)
        moved = [(side.ids.numpy(), np.full(len(side.ids), _exponent(side.family, side.exponent))) for _, _, side in sides]
        # What the ground holds on one side is a list along the other.
        self._along = [next(i for i, s in enumerate(block.sides) if s.family != GROUND) for block in self._lists]
        offsets = np.cumsum([0, *(len(b.sides[place].ids) for b, place in zip(self._lists, self._along, strict=True))])
        self._list_starts, terms = offsets[:-1], []
        self._base: np.ndarray | None = None
        self._is_precise = False
        for first, block, place in zip(offsets, self._lists, self._along, strict=False):
            for side in [block.sides[place]] if block.is_matrix else block.sides:
                moved.append((side.ids.numpy(), np.full(len(side.ids), _exponent(side.family, side.exponent))))
                terms.append(np.arange(first, first + len(side.ids)))
        self._ids = np.concatenate([ids for ids, _ in moved]) if moved else np.zeros(0, np.int64)
        self._exponents = np.concatenate([exponents for _, exponents in moved]) if moved else np.zeros(0)
        self._term = np.concatenate(terms) if terms else np.zeros(0, np.int64)
        self._num_terms = int(offsets[-1])
        self._split = len(self._segment)
        with np.errstate(divide="ignore"):
            self._log_exponents = np.log(np.abs(self._exponents))
        self._gathers = [_Gather(self._ids, keep) for keep in (self._exponents > 0, self._exponents < 0)]
        self._prepare_families(problem)

    def _prepare_families(self, problem: Problem) -> None:
        count, blocks = len(problem.families), [*self._matrices, *self._lists]
        self._levels = torch.zeros(len(blocks), count, dtype=torch.float64)
        stiff = np.ones(count)
        for row, block in enumerate(blocks):
            for side in block.sides:
                if side.family != GROUND:
                    self._levels[row, side.family] += self._q * side.exponent
                    stiff[side.family] = max(stiff[side.family], stiffness(block.sides, side.family))
        self._is_chained = any(len({side.family for side in block.sides} - {GROUND}) > 1 for block in blocks)
        family = np.full(self._count, GROUND)
        for number, (first, last) in enumerate(problem.families):
            family[first:last] = number
        self._family = family
        shade = np.array([*colours(blocks, count), -1])[family]  # GROUND reads the last one
        self._masks = [self._live & (shade == colour) for colour in range(shade.max() + 1)] if count else []
        self._steps = 1.0 / (2 * self._q * np.array([*stiff, 1.0])[family])

    def read(self, z: Tensor) -> None:
        """Take the numbers of the blocks at these log-scales."""
        q = self._q
        pairs = [[block.log_energies(place, z, q, False) for place in (0, 1)] for block in self._matrices]
        rows = [torch.logsumexp(pair[0], 0) for pair in pairs]
        self._totals = np.array([float(row) for row in rows])
        shares = [pairs[number][place].numpy() for number, place in self._segments]
        self._shares = np.concatenate(shares) if shares else np.zeros(0)
        self._shares = self._shares - np.where(np.isfinite(self._totals), self._totals, 0.0)[self._owner()]
        if self._base is None or self._is_precise != self._problem.is_precise:
            start = torch.zeros_like(z)
            pairs = zip(self._lists, self._along, strict=True)
            logs = [block.log_energies(place, start, q, False).numpy() for block, place in pairs]
            self._base = np.concatenate(logs) if logs else np.zeros(0)
            self._is_precise = self._problem.is_precise
        self._terms = self._base + self._list_moves(q * self._exponents * z.numpy()[self._ids])

    def _owner(self) -> np.ndarray:
        """Index of the block of each entry of a matrix."""
        return np.array([number for number, _ in self._segments], np.int64)[self._segment]

    def value(self) -> float:
        """Logarithm of all energies at the last reading."""
        everything = [*self._totals, *self._terms]
        return float(np.logaddexp.reduce(everything)) if everything else -np.inf

    def residual(self, shift: np.ndarray | None = None) -> float:
        """ρ = ‖in − out‖₁ / ‖in + out‖₁, exact where nothing has shifted."""
        into, out = self._energies(np.zeros(self._count) if shift is None else shift)
        top = max(into.max(initial=-np.inf), out.max(initial=-np.inf))
        if top == -np.inf:
            return 0.0
        into, out = np.exp(into - top), np.exp(out - top)
        return float(np.abs(into - out).sum() / (into + out).sum())

    def parallel_step(self) -> Tensor:
        """The coordinate step of every channel, a part of it so small that the true objective does not increase."""
        shift = np.zeros(self._count)
        step = self._step(shift) / max(1, len(self._masks))
        return torch.from_numpy(np.where(self._live, step, 0.0))

    def minimise(self, tol: float) -> Tensor:
        """The shift of all log-scales that minimises the model, to a residual of `tol`."""
        shift = np.zeros(self._count)
        for _ in range(SWEEPS):
            if self._is_chained:
                self._level(shift)
            for mask in self._masks:
                shift += np.where(mask, self._step(shift), 0.0)
            if self.residual(shift) <= tol:
                break
        return torch.from_numpy(shift)

    def _step(self, shift: np.ndarray) -> np.ndarray:
        into, out = self._energies(shift)
        with np.errstate(invalid="ignore"):
            step = (out - into) * self._steps
        return np.where(np.isfinite(step), step, 0.0)

    def _level(self, shift: np.ndarray) -> None:
        """Minimise over one scalar for each family."""
        _, sums, terms = self._moved(shift)
        totals = self._totals.copy()
        np.add.at(totals, [number for number, _ in self._segments], sums)
        lists = _log_sums(terms, self._list_starts, None)
        logs = torch.from_numpy(np.concatenate([totals, lists]))
        live = logs.isfinite() & self._levels.any(1)
        moves = minimise_families(logs[live], self._levels[live], False).numpy()
        shift += np.where(self._live, np.append(moves, 0.0)[self._family], 0.0)

    def _moved(self, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shares, their sums by side, and terms, all as logarithms, after a shift."""
        moves = self._q * self._exponents * shift[self._ids]
        shares = self._shares + moves[: self._split]
        sums = _log_sums(shares, self._starts, self._segment)
        return shares, sums, self._terms + self._list_moves(moves)

    def _list_moves(self, moves: np.ndarray) -> np.ndarray:
        """What moves of all entries do to the terms."""
        return np.bincount(self._term, moves[self._split :], self._num_terms)

    def _energies(self, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-energies into and out of every class."""
        shares, sums, terms = self._moved(shift)
        other = sums.reshape(-1, 2)[:, ::-1].reshape(-1)  # the other side of the same matrix
        scale = (self._totals.repeat(2) + other) if len(sums) else other
        amounts = np.concatenate([shares + scale[self._segment], terms[self._term]]) + self._log_exponents
        into, out = (gather.log_sums(amounts, self._count) for gather in self._gathers)
        return into, out


class _Gather:
    """Sums over the entries of each class."""

    def __init__(self, ids: np.ndarray, keep: np.ndarray) -> None:
        places = np.flatnonzero(keep)
        self._order = places[np.argsort(ids[places], kind="stable")]
        self._present, self._starts, counts = np.unique(ids[self._order], return_index=True, return_counts=True)
        self._segment = np.repeat(np.arange(len(self._present)), counts)

    def log_sums(self, logs: np.ndarray, count: int) -> np.ndarray:
        found = np.full(count, -np.inf)
        found[self._present] = _log_sums(logs[self._order], self._starts, self._segment)
        return found


def _log_sums(logs: np.ndarray, starts: np.ndarray, segment: np.ndarray | None) -> np.ndarray:
    """log Σ exp over consecutive segments."""
    if not len(starts):
        return np.zeros(0)
    if segment is None:
        segment = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(logs))))
    tops = np.maximum.reduceat(logs, starts)
    tops = np.where(np.isfinite(tops), tops, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.add.reduceat(np.exp(logs - tops[segment]), starts)) + tops


def _free_sides(block: AnyBlock) -> int:
    return sum(side.family != GROUND for side in block.sides)


def _exponent(family: int, exponent: float) -> float:
    """The ground does not move."""
    return 0.0 if family == GROUND else exponent
