"""A network whose energies are rank-one: what one reading of the weights tells of it.

Reading a matrix of energies E at log-scales z gives its sums along both sides, r and s, and its total T. Near z the matrix is
taken for r sᵀ / T, which has the same sums; that is exact if channels differ in scale alone, and close in wide layers, where
the sums of many independent weights differ little. The objective is then

    φ(z + δ) ≈ Σ_b T_b · Π_sides Σ_j share_j · exp(q · a · δ_j)

with vectors only, and its minimum costs no further reading. Lists of terms enter exactly. Gradients at δ = 0 are exact, so
that a point which the model does not move is the true minimum.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm.balancing.blocks import AnyBlock, log_sum
from equinorm.balancing.families import FamilyStructure, minimise_families
from equinorm.balancing.problem import Problem
from equinorm.balancing.sides import GROUND, Side, family_of_classes

SWEEPS = 20
"""Most sweeps over the model after one reading; two where it is lists of terms, which cost as much as reading."""


class RankOne:
    """The model; its structure is worked out once, its numbers come with each reading.

    Args:
        problem: whose blocks it describes.
        live: mask over 0..num_free of the classes that may move.
    """

    def __init__(self, problem: Problem, live: Tensor) -> None:
        self._problem, self._norm = problem, problem.norm
        self._live, self._count = live.numpy(), problem.num_free + 1
        blocks = [block for block in problem.others if not block.is_empty]
        singles = problem.singles
        self._singles = np.zeros(0) if singles is None else singles.logs.numpy()
        self._matrices = [block for block in blocks if block.is_matrix and len(_moving(block)) > 1]
        # What a matrix holds between free channels and the ground is a list along the free side.
        self._lists = [block for block in blocks if not block.is_matrix or len(_moving(block)) < 2]
        lists = [*(() if singles is None else singles.blocks), *self._lists]
        structure = problem.kept.once(RankOneStructure, self._norm, lambda: RankOneStructure(problem, self._matrices, lists))
        self._entries, self._levels, self._is_chained = structure.entries, structure.levels, structure.is_chained
        self._family, self._steps = structure.family, structure.steps
        self._masks = [self._live & (structure.shade == colour) for colour in range(structure.shade.max() + 1)]
        self._base: np.ndarray | None = None  # logarithms of the terms at z = 0
        self._is_base_precise = False

    def read_energies_at(self, z: Tensor) -> None:
        """Take the numbers of the blocks at these log-scales."""
        pairs = [[block.log_energies(place, z, self._norm) for place in (0, 1)] for block in self._matrices]
        self._totals = np.array([float(rows.logsumexp(0)) for rows, _ in pairs])
        finite = np.where(np.isfinite(self._totals), self._totals, 0.0)
        self._shares = _joined([logs.numpy() for pair in pairs for logs in pair]) - finite[self._entries.matrix]
        if self._base is None or self._is_base_precise != self._problem.is_precise:
            start = torch.zeros_like(z)
            own = [block.log_energies(_moving(block)[0], start, self._norm).numpy() for block in self._lists]
            self._base = _joined([self._singles, *own])
            self._is_base_precise = self._problem.is_precise
        self._terms = self._base + self._entries.by_term(self._moves(z.numpy()))

    def value(self) -> float:
        """Logarithm of all energies at the last reading."""
        return log_sum(torch.from_numpy(np.concatenate([self._totals, self._terms])))

    def residual(self, shift: np.ndarray | None = None) -> float:
        """ρ = ‖in − out‖₁ / ‖in + out‖₁, exact where nothing has shifted."""
        into, out = self._energies(np.zeros(self._count) if shift is None else shift)
        top = max(into.max(), out.max())
        if top == -np.inf:
            return 0.0
        into, out = np.exp(into - top), np.exp(out - top)
        return float(np.abs(into - out).sum() / (into + out).sum())

    def parallel_step(self) -> Tensor:
        """The coordinate step of every channel, a part of it so small that the true objective does not increase."""
        step = self._step(np.zeros(self._count)) / max(1, len(self._masks))
        return torch.from_numpy(np.where(self._live, step, 0.0))

    def minimise(self, tol: float) -> Tensor:
        """The shift of all log-scales that minimises the model, to a residual of `tol`."""
        shift = np.zeros(self._count)
        for _ in range(2 if len(self._entries.term) > len(self._shares) else SWEEPS):
            if self._is_chained:
                self._level(shift)
            for mask in self._masks:
                shift += np.where(mask, self._step(shift), 0.0)
            if self.residual(shift) <= tol:
                break
        return torch.from_numpy(shift)

    def _step(self, shift: np.ndarray) -> np.ndarray:
        """The coordinate step of every class, 0 where nothing enters or leaves."""
        into, out = self._energies(shift)
        with np.errstate(invalid="ignore"):
            step = (out - into) * self._steps
        return np.where(np.isfinite(step), step, 0.0)

    def _level(self, shift: np.ndarray) -> None:
        """Minimise over one scalar for each family."""
        _, sums, terms = self._moved(shift)
        logs = np.concatenate([self._totals + sums.reshape(-1, 2).sum(1), self._entries.terms.log_sums(terms)])
        live = torch.from_numpy(np.isfinite(logs)) & self._levels.any(1)
        moves = minimise_families(torch.from_numpy(logs)[live], self._levels[live]).numpy()
        shift += np.where(self._live, np.append(moves, 0.0)[self._family], 0.0)

    def _energies(self, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-energies into and out of every class after a shift."""
        shares, sums, terms = self._moved(shift)
        others = sums.reshape(-1, 2)[:, ::-1].reshape(-1)  # of the other side of the same matrix
        scale = self._totals.repeat(2) + others
        logs = np.concatenate([shares + scale[self._entries.sides.of], terms[self._entries.term]])
        return self._entries.by_class(logs, self._count)

    def _moved(self, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shares, their sums by side, and terms, all as logarithms, after a shift."""
        moves = self._moves(shift)
        shares = self._shares + moves[: len(self._shares)]
        return shares, self._entries.sides.log_sums(shares), self._terms + self._entries.by_term(moves)

    def _moves(self, shift: np.ndarray) -> np.ndarray:
        """By how much a shift raises the logarithm of every entry."""
        return self._norm.q * self._entries.exponents * shift[self._entries.ids]


class RankOneStructure:
    """What the layouts of the blocks tell, without a number of theirs."""

    def __init__(self, problem: Problem, matrices: Sequence[AnyBlock], lists: Sequence[AnyBlock]) -> None:
        self.entries = _Entries(matrices, lists)
        families = FamilyStructure([block.sides for block in (*matrices, *lists)], len(problem.families), problem.norm)
        self.is_chained = families.is_chained
        self.levels = families.exponents if self.is_chained else torch.zeros(0, 0)  # which grow with blocks times families
        # GROUND reads the last entry of what is by family.
        self.family = family_of_classes(problem.families, problem.num_free).numpy()
        self.shade = np.array([*families.colours, -1])[self.family]
        self.steps = np.array([*families.steps, 0.0])[self.family]


class _Entries:
    """Channels along the sides of matrices, one side after the other, and then, for each list and each of its sides, terms.

    A matrix of 2 rows and 3 columns and a list of 4 terms that 2 sides move have 2 + 3 + 4 + 4 entries: `sides` are runs of 2
    and 3, `matrix` is 0 for these 5, `terms` is one run of 4, and `term` is 0, 1, 2, 3, 0, 1, 2, 3 for the other 8.

    Attributes:
        sides: the runs of channels.
        matrix: number of the matrix of each channel.
        terms: the runs of terms, one for each list.
        term: of each entry that belongs to a list.
        ids: class of each entry.
        exponents: by which its scale enters.
    """

    def __init__(self, matrices: Sequence[AnyBlock], lists: Sequence[AnyBlock]) -> None:
        sides = [side for block in matrices for side in block.sides]
        self.sides = _segments([len(side.ids) for side in sides])
        self.matrix = np.arange(len(matrices)).repeat(2)[self.sides.of]
        moved = [[block.sides[place] for place in _moving(block)] for block in lists]
        self.terms = _segments([len(own[0].ids) for own in moved])
        starts = zip(moved, self.terms.starts, strict=True)
        terms = [first + np.arange(len(side.ids)) for own, first in starts for side in own]
        self.term = np.concatenate([np.zeros(0, np.int64), *terms])
        sides += [side for own in moved for side in own]
        self.ids = _joined([side.ids.numpy() for side in sides]).astype(np.int64)
        self.exponents = _joined([np.full(len(side.ids), _exponent(side)) for side in sides])
        with np.errstate(divide="ignore"):
            self._log_exponents = np.log(np.abs(self.exponents))
        self._into, self._out = (_ClassSums(self.ids, keep) for keep in (self.exponents > 0, self.exponents < 0))

    def by_term(self, moves: np.ndarray) -> np.ndarray:
        """What moves of all entries do to each term."""
        return np.bincount(self.term, moves[len(self.sides.of) :], len(self.terms.of))

    def by_class(self, logs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-energies into and out of every class, from those of all entries."""
        amounts = logs + self._log_exponents
        return self._into.log_sums(amounts, count), self._out.log_sums(amounts, count)


class _Segments:
    """Consecutive runs of entries: where each starts, and the one that each entry belongs to."""

    def __init__(self, starts: np.ndarray, of: np.ndarray) -> None:
        self.starts, self.of = starts, of

    def log_sums(self, logs: np.ndarray) -> np.ndarray:
        """log Σ exp of each run."""
        if not len(self.starts):
            return np.zeros(0)
        tops = np.maximum.reduceat(logs, self.starts)
        tops = np.where(np.isfinite(tops), tops, 0.0)
        with np.errstate(divide="ignore"):
            return np.log(np.add.reduceat(np.exp(logs - tops[self.of]), self.starts)) + tops


def _segments(lengths: Sequence[int]) -> _Segments:
    counts = np.array(lengths, np.int64)
    return _Segments(np.cumsum(counts) - counts, np.arange(len(counts)).repeat(counts))


class _ClassSums:
    """Sums over the entries of each class."""

    def __init__(self, ids: np.ndarray, keep: np.ndarray) -> None:
        places = np.flatnonzero(keep)
        self._order = places[np.argsort(ids[places], kind="stable")]
        self._present, counts = np.unique(ids[self._order], return_counts=True)
        self._runs = _segments(counts.tolist())

    def log_sums(self, logs: np.ndarray, count: int) -> np.ndarray:
        """log Σ exp for each class, −inf without entries."""
        found, own = np.full(count, -np.inf), logs[self._order]
        found[self._present] = own if len(own) == len(self._present) else self._runs.log_sums(own)
        return found


def _moving(block: AnyBlock) -> list[int]:
    """Places of the sides that are not on the ground."""
    return [place for place, side in enumerate(block.sides) if side.family != GROUND]


def _exponent(side: Side) -> float:
    """The ground does not move."""
    return 0.0 if side.family == GROUND else side.exponent


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])
