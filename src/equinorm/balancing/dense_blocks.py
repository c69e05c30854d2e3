"""A block of a weight as a matrix that lies dense in memory."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equinorm._memory import is_dense
from equinorm.balancing.energy_reader import runs_of
from equinorm.balancing.layout import TensorLayout

FEW_COLUMNS = 8
"""Fewer make short rows, each of which costs some work of its own."""

LEAST = 1 << 12
"""Entries of a weight for each of many pieces that it may be cut into."""


@dataclass(frozen=True, slots=True)
class DenseLine:
    """How the channels of one side lie along rows or columns: runs of `after` entries for each, all of that `before` times."""

    is_row: bool
    before: int
    size: int
    after: int

    def spread(self, values: Tensor) -> Tensor:
        """A value of each channel, for every row or column."""
        if self.before == self.after == 1:
            return values
        return values[None, :, None].expand(self.before, self.size, self.after).reshape(-1)

    def fold(self, sums: Tensor) -> Tensor:
        """Sums of every row or column, for each channel."""
        return sums if self.before == self.after == 1 else sums.view(self.before, self.size, self.after).sum((0, 2))


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix in memory.

    Attributes:
        first: entry of the tensor's memory with which it starts.
        shape: rows and columns.
        pitch: entries from the start of a row to that of the next.
        lines: where the channels of each side lie; one for all sides of a list of terms.
    """

    first: int
    shape: tuple[int, int]
    pitch: int
    lines: tuple[DenseLine, ...]


def dense(layout: TensorLayout, picks: Sequence[slice], tensor: Tensor) -> DenseMatrix | None:
    """How a block of contiguous channels of a weight is such a matrix; None if it is none."""
    if layout.scaling.offset or not is_dense(tensor):
        return None
    runs = runs_of(layout.view(tensor), layout.along)
    sizes, start = runs.sizes, 0
    places = [place for place in range(len(sizes)) if place not in runs.summed]
    if not layout.is_matrix:
        return _terms(sizes, places, picks[0])
    if runs.is_sliced:
        side, count = runs.sides[0], runs.stretch
        first, last, _ = picks[side].indices(layout.sizes[side])
        number = first // count
        if last > (number + 1) * count:
            return None
        start, sizes, places = number * math.prod(sizes[1:]), sizes[1:], [place - 1 for place in places[1:]]
        within = slice(first - number * count, last - number * count)
        picks = [within if place == side else pick for place, pick in enumerate(picks)]
    sides = runs.sides[runs.is_sliced :]
    if len(set(sides)) < len(sides):
        return None
    found = _matrix(sizes, [place for _, place in sorted(zip(sides, places, strict=True))], picks)
    return found and replace(found, first=start + found.first)


def _matrix(sizes: Sequence[int], places: Sequence[int], picks: Sequence[slice]) -> DenseMatrix | None:
    """Rows and columns of memory.

    Args:
        sizes: of its runs.
        places: of the run that each side is.
        picks: channels along each side.
    """
    cut = min(places) + 1
    if len(places) == 1 and math.prod(sizes[cut:]) < FEW_COLUMNS:
        cut -= 1
    shape, start = [math.prod(sizes[:cut]), math.prod(sizes[cut:])], 0
    pitch, lines = shape[1], []
    for place, pick in zip(places, picks, strict=False):  # the ground side of a single side has no place
        is_row, size = place < cut, sizes[place]
        before = math.prod(sizes[:place] if is_row else sizes[cut:place])
        after = math.prod(sizes[place + 1 : cut] if is_row else sizes[place + 1 :])
        first, last, _ = pick.indices(size)
        if last - first < size and before > 1:
            return None
        lines.append(DenseLine(is_row, before, last - first, after))
        start += first * after * (pitch if is_row else 1)
        if last - first < size:
            shape[not is_row] = (last - first) * after
    return DenseMatrix(start, (shape[0], shape[1]), pitch, tuple(lines))


def stretches(layout: TensorLayout, tensor: Tensor) -> tuple[int, int]:
    """Number of channels of each side of a matrix that may be in one block: of transposed experts, those of one."""
    runs, sizes = runs_of(layout.view(tensor), layout.along), [*layout.sizes, 1]
    rows, columns = (runs.stretch if runs.is_sliced and runs.sides[0] == side else sizes[side] for side in (0, 1))
    return rows, columns


def runs_of_kinds(kinds: Tensor, most: int) -> list[slice]:
    """Neighbours of one kind, in none of which a multiple of `most` lies but at its start.

    >>> import torch
    >>> [(run.start, run.stop) for run in runs_of_kinds(torch.tensor([0, 0, 1, 0, 0, 0]), 4)]
    [(0, 2), (2, 3), (3, 4), (4, 6)]
    """
    ends = (kinds.diff() != 0) | (torch.arange(1, len(kinds)) % most == 0)
    starts = [0, *(ends.nonzero().flatten() + 1).tolist(), len(kinds)]
    return [slice(first, last) for first, last in itertools.pairwise(starts)]


def _terms(sizes: Sequence[int], places: Sequence[int], pick: slice) -> DenseMatrix | None:
    """A row for every term: only where the axes that stay apart come first in memory, as they are numbered."""
    if list(places) not in ([], [0]):
        return None
    columns = math.prod(sizes[len(places) :])
    first, last, _ = pick.indices(math.prod(sizes[: len(places)]))
    return DenseMatrix(first * columns, (last - first, columns), columns, (DenseLine(True, 1, last - first, 1),))
