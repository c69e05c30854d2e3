"""p = ∞: the least maximum of a network's weights, t* = min_z max_e log|w_e| + Σ_s a_es · z_s, and the proof that it is that.

It is a linear program. Where every entry is moved by two scales at most, and there are factors u = z / g by which each entry
depends on a difference c · (u − u'), the largest ratio of a cycle solves it (`policy_iteration`): with exponents ±1 the largest
geometric mean of weights along a path from the ground to the ground, or around a cycle. What remains (products of scales, or
cycles that multiply exponents) is solved by an active set (`active_set`). Both take the largest entries of large matrices only,
and then others that turn out to be larger.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm._memory import STRIP
from equinorm.balancing import active_set
from equinorm.balancing.active_set import Entries
from equinorm.balancing.blocks import AnyBlock, Block
from equinorm.balancing.families import FamilyStructure
from equinorm.balancing.norm import Norm
from equinorm.balancing.policy_iteration import Differences, largest_ratio, lifted
from equinorm.balancing.problem import Problem
from equinorm.balancing.separable import is_separable, least_maximum_by_class
from equinorm.balancing.sides import GROUND, family_of_classes
from equinorm.balancing.singles import ClassMaxima, Singles
from equinorm.balancing.sweeps import imbalance

MAX_NORM = Norm(math.inf)

WHOLE = 1 << 13
"""Matrices of so many entries are taken as a whole."""

SLACK = 1e-12
"""By how much an entry that was left out may be above the maximum of the others."""


def least_maximum(problem: Problem, z: Tensor) -> tuple[float, Tensor]:
    """A lower bound of the largest log-entry at any log-scales, and log-scales near z that reach it.

    Args:
        problem: p = ∞, without dead classes.
        z: log-scales of classes 0..num_free, where to begin.
    """
    if is_separable(problem):
        return least_maximum_by_class(problem, z)
    blocks = [block for block in problem.blocks if isinstance(block, Block) and not block.is_empty]
    found = [_entries(block, z) for block in blocks]
    gains = _gains(blocks, len(problem.families))
    if gains is not None:
        gains = np.array([1.0, *gains])[_family_of(problem) + 1]
    values, bound = z.numpy(), -np.inf
    while True:
        entries = _joined(found)
        if not len(entries.logs):
            return bound, z
        bound, values = active_set.least(entries, values) if gains is None else _by_policies(entries, gains, values)
        largest = float((entries.logs + entries.moved(values)).max())
        more = [_above(block, torch.from_numpy(values), largest + SLACK * max(1.0, abs(largest))) for block in blocks]
        more = [added for added in more if added is not None]
        if not more:
            return bound, torch.from_numpy(values)
        found += more


def are_differences(problem: Problem) -> bool:
    """Is each entry a difference of two scales, so that the largest ratio of a cycle is the least maximum?"""
    return _gains(problem.blocks, len(problem.families)) is not None


def least_by_families(problem: Problem, z: Tensor) -> Tensor:
    """Log-scales that differ from z by one scalar for each family, with the least maximum."""
    blocks = [block for block in problem.blocks if not block.is_empty]
    ids = np.zeros((len(blocks), max(len(block.sides) for block in blocks)), np.int64)
    exponents = np.zeros(ids.shape)
    for row, block in enumerate(blocks):
        for place, side in enumerate(block.sides):
            if side.family != GROUND:
                ids[row, place], exponents[row, place] = side.family + 1, side.exponent
    logs = np.array([block.log_total(z, MAX_NORM) for block in blocks])
    live = np.isfinite(logs)
    _, shifts = active_set.least(Entries(ids[live], exponents[live], logs[live]), np.zeros(len(problem.families) + 1))
    return z + torch.from_numpy(shifts)[torch.from_numpy(_family_of(problem) + 1)]


class SweepSchedule:
    """Which classes move at once in a sweep, and how far: what the layouts tell, without a number of theirs.

    Attributes:
        masks: over 0..num_free of the classes of one colour.
        steps: by what log(out / in) of each class is multiplied.
    """

    def __init__(self, problem: Problem) -> None:
        sides = [block.sides for block in problem.blocks if not block.is_empty]
        structure, owner = FamilyStructure(sides, len(problem.families), problem.norm), _family_of(problem)
        shades = np.array([*structure.colours, -1])[owner]
        self.masks = [shades == shade for shade in range(shades.max() + 1)]
        self.steps = np.array([*structure.steps, 0.0])[owner]


class FlatSweeps:
    """Coordinate steps where all entries are few enough to stand in one list: all families of one colour at once.

    Args:
        problem: p = ∞, without dead classes, and `are_few`.
    """

    def __init__(self, problem: Problem) -> None:
        others = [block for block in problem.others if isinstance(block, Block) and not block.is_empty]
        found = [_entries(block, torch.zeros(0)) for block in others]
        self._entries = _joined(found if problem.singles is None else [_entries_of(problem.singles), *found])
        exponents, ids = self._entries.exponents.ravel(), self._entries.ids.ravel()
        self._gathers = [ClassMaxima(ids, keep, self._entries.ids.shape[1]) for keep in (exponents > 0, exponents < 0)]
        self._schedule = problem.kept.once(SweepSchedule, None, lambda: SweepSchedule(problem))

    def sweep(self, z: Tensor) -> tuple[Tensor, float]:
        """Log-scales after one sweep, and the imbalance ρ = ‖in − out‖₁ / ‖in + out‖₁ of channels when it met them."""
        moved, ends = z.numpy().copy(), []
        for mask in self._schedule.masks:
            values = self._entries.logs + self._entries.moved(moved)
            into, out = (gather.maxima(values, len(moved)) for gather in self._gathers)
            is_live = mask & np.isfinite(into) & np.isfinite(out)
            moved[is_live] += self._schedule.steps[is_live] * (out[is_live] - into[is_live])
            ends.append(np.exp(np.stack([into[is_live], out[is_live]])))
        into, out = np.concatenate(ends, 1)
        return torch.from_numpy(moved), float(np.abs(into - out).sum() / max((into + out).sum(), 1e-300))

    def imbalance(self, z: Tensor) -> float:
        """ρ of all classes as they are."""
        values = self._entries.logs + self._entries.moved(z.numpy())
        into, out = (torch.from_numpy(gather.maxima(values, len(z))) for gather in self._gathers)
        return imbalance([(into, out)])

    def largest(self, z: Tensor) -> float:
        """The largest log-entry."""
        return float((self._entries.logs + self._entries.moved(z.numpy())).max(initial=-np.inf))


def are_few(problem: Problem) -> bool:
    """Are all entries few enough to be listed?"""
    return all(not block.is_matrix or block.energies.numel() <= WHOLE for block in problem.blocks if isinstance(block, Block))


def _family_of(problem: Problem) -> np.ndarray:
    """Family of classes 0..num_free."""
    return family_of_classes(problem.families, problem.num_free).numpy()


# ------------------------------------------------------------------------------------------------------------ entries


def _entries_of(singles: Singles) -> Entries:
    """All of them that are not 0."""
    live = (singles.logs > -math.inf).numpy()
    parts = singles.ids.numpy()[live, None], singles.exponents.numpy()[live, None], singles.logs.numpy()[live]
    return Entries(*parts)


def _entries(block: Block, z: Tensor) -> Entries:
    """All entries of a block, or of each row and column of a large matrix the one that is largest at z."""
    if not block.is_matrix:
        places = block.energies.nonzero()[:, 0]
        logs = block.energies[places].double().log() + block.offsets[0][places]
        return _of(block, [places] * len(block.sides), logs)
    if block.energies.numel() <= WHOLE:
        return _picked(block, *block.energies.nonzero().T)
    return _picked(block, *_largest(block, z))


def _above(block: Block, z: Tensor, limit: float) -> Entries | None:
    """The largest entry of every row of a large matrix that is above a limit at z."""
    if not block.is_matrix or block.energies.numel() <= WHOLE:
        return None
    rows = (block.log_energies(0, z, MAX_NORM) > limit).nonzero()[:, 0]
    if not len(rows):
        return None
    factors = _factors(block, 1, z)
    parts = rows.split(max(1, STRIP // len(factors)))
    return _picked(block, rows, torch.cat([(block.energies[part] * factors).argmax(1) for part in parts]))


def _largest(block: Block, z: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the largest entry of each row and then of each column, read a strip at a time as they lie."""
    is_turned = block.energies.stride(1) != 1
    matrix = block.energies.T if is_turned else block.energies
    along, across = (_factors(block, side, z) for side in ((0, 1) if is_turned else (1, 0)))
    strip, (lines, length) = max(1, STRIP // matrix.shape[1]), matrix.shape
    room, in_line = matrix.new_empty(min(strip, lines), length), []
    top, place = matrix.new_zeros(length), torch.zeros(length, dtype=torch.long)
    for first in range(0, lines, strip):
        part = matrix[first : first + strip]
        scaled = room[: len(part)]
        in_line.append(torch.mul(part, along, out=scaled).argmax(1))
        best, where = torch.mul(part, across[first : first + strip, None], out=scaled).max(0)
        place = torch.where(best > top, where + first, place)
        top = torch.maximum(top, best)
    own, other = torch.cat([torch.arange(lines), place]), torch.cat([*in_line, torch.arange(length)])
    return (other, own) if is_turned else (own, other)


def _factors(block: Block, side: int, z: Tensor) -> Tensor:
    """What multiplies the channels along one side of a matrix, at most 1."""
    logs = block.sides[side].exponent * z[block.sides[side].ids] + block.offsets[side]
    return torch.exp(logs - logs.max()).to(block.energies.dtype)


def _picked(block: Block, rows: Tensor, columns: Tensor) -> Entries:
    """Entries of a matrix that are not 0."""
    energies = block.energies[rows, columns]
    rows, columns, energies = (part[energies > 0] for part in (rows, columns, energies))
    logs = energies.double().log() + block.offsets[0][rows] + block.offsets[1][columns]
    return _of(block, [rows, columns], logs)


def _of(block: Block, places: Sequence[Tensor], logs: Tensor) -> Entries:
    ids = np.stack([side.ids[place].numpy() for side, place in zip(block.sides, places, strict=True)], 1)
    exponents = np.array([[0.0 if side.family == GROUND else side.exponent for side in block.sides]])
    return Entries(ids, np.where(ids > 0, exponents, 0.0), logs.numpy())


def _joined(parts: Sequence[Entries]) -> Entries:
    """All of them, with as many factors as any has."""
    width = max((part.ids.shape[1] for part in parts), default=1)
    logs = np.concatenate([np.zeros(0), *(part.logs for part in parts)])
    ids, exponents, first = np.zeros((len(logs), width), np.int64), np.zeros((len(logs), width)), 0
    for part in parts:
        here = np.s_[first : first + len(part.logs), : part.ids.shape[1]]
        ids[here], exponents[here] = part.ids, part.exponents
        first += len(part.logs)
    return Entries(ids, exponents, logs)


# -------------------------------------------------------------------------------------------------------- differences


def _gains(blocks: Sequence[AnyBlock], count: int) -> list[float] | None:
    """g of every family such that a · g + a' · g' = 0 for any two that move an entry; None if there are none."""
    ties: list[list[tuple[int, float]]] = [[] for _ in range(count)]
    for block in blocks:
        moving = [(side.family, side.exponent) for side in block.sides if side.family != GROUND]
        if len(moving) > 2:
            return None
        if len(moving) == 2:
            (one, a), (other, b) = moving
            ties[one].append((other, -a / b))
            ties[other].append((one, -b / a))
    gains = [0.0] * count
    for start in range(count):
        gains[start] = gains[start] or 1.0
        queue = [start]
        while queue:
            family = queue.pop()
            for other, factor in ties[family]:
                gain = gains[family] * factor
                if gains[other] and abs(gains[other] - gain) > 1e-12 * abs(gain):
                    return None
                if not gains[other]:
                    gains[other] = gain
                    queue.append(other)
    return gains


def _by_policies(entries: Entries, gains: np.ndarray, z: np.ndarray) -> tuple[float, np.ndarray]:
    """The same where all entries are differences: half of the way up and half of the way down, so that z hardly moves."""
    order = np.argsort(entries.ids == 0, 1, kind="stable")  # what moves first
    ids = np.pad(np.take_along_axis(entries.ids, order, 1), ((0, 0), (0, 1)))[:, :2]
    slopes = np.take_along_axis(entries.exponents, order, 1)[:, 0] * gains[ids[:, 0]]
    is_down = slopes < 0
    nodes, places = np.unique(np.concatenate([ids.ravel(), [0]]), return_inverse=True)
    ends = places.reshape(-1)[:-1].reshape(-1, 2)
    heads, tails = np.where(is_down, ends[:, 1], ends[:, 0]), np.where(is_down, ends[:, 0], ends[:, 1])
    by_tail = np.argsort(tails, kind="stable")
    edges = Differences(
        tails[by_tail], heads[by_tail], (entries.logs / np.abs(slopes))[by_tail], (1.0 / np.abs(slopes))[by_tail]
    )
    start = z[nodes] / gains[nodes]
    bound = largest_ratio(edges, start, float((entries.logs + entries.moved(z)).max()))
    middle = (lifted(edges, start, bound) - lifted(edges.turned, -start, bound)) / 2
    found = z.copy()
    found[nodes] = gains[nodes] * (middle - middle[0])
    return bound, found
