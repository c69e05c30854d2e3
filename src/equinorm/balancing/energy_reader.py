"""Energies of one tensor.

Sums over a convolution's kernel are products with ones, along the memory as it lies and a strip at a time: reductions over a
few entries each are ten times slower.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._errors import BalanceError
from equinorm._memory import STRIP, forget, is_dense, memory_order
from equinorm.balancing.layout import TensorLayout
from equinorm.balancing.norm import Norm

AT_ONCE = 1 << 20
"""Entries of a strip that is read for both of its sides: it fits a larger cache."""


@dataclass(frozen=True, slots=True)
class Runs:
    """A tensor's memory as runs: neighbours that are summed are one, and so are those of one side that follow one another.

    Attributes:
        order: axes of the tensor as they lie, from the slowest to the fastest.
        sizes: entries of each run.
        summed: places of the runs to sum over.
        sides: of the other runs, as they lie: the side that each belongs to.
        back: their places, as the sides name them.

    A convolution of 8 by 4 channels, in memory as (out, in, kernel) and as (out, kernel, in):

    >>> weight = torch.zeros(8, 4, 3, 3)
    >>> runs_of(weight, ((0,), (1,))).sizes, runs_of(weight, ((0,), (1,))).summed
    ((8, 4, 9), (2,))
    >>> runs_of(weight.to(memory_format=torch.channels_last), ((0,), (1,))).sizes
    (8, 9, 4)

    Six experts of 4 by 3 channels, and transposed. Rows are the 24 outputs of all experts:

    >>> runs_of(torch.zeros(6, 4, 3), ((0, 1), (2,))).sizes
    (24, 3)
    >>> experts = runs_of(torch.zeros(6, 3, 4), ((0, 2), (1,)))
    >>> experts.sizes, experts.sides, experts.back
    ((6, 3, 4), (0, 1, 0), (0, 2, 1))
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    summed: tuple[int, ...]
    sides: tuple[int, ...]
    back: tuple[int, ...]

    @property
    def is_sliced(self) -> bool:
        """Does one side run along the slowest axis and along another, as the outputs of transposed experts do?"""
        twice = len(self.sides) > len(set(self.sides)) and 0 not in self.summed
        return twice and self.sides.count(self.sides[0]) == 2 and self.back.index(0) < self.back.index(self._again)

    @property
    def stretch(self) -> int:
        """Entries of that other run, where it is sliced."""
        return [size for place, size in enumerate(self.sizes) if place not in self.summed][self._again]

    @property
    def _again(self) -> int:
        return self.sides.index(self.sides[0], 1)


def runs_of(tensor: Tensor, along: Sequence[Sequence[int]]) -> Runs:
    """The runs of a tensor of which some axes stay apart, side by side."""
    order = memory_order(tensor)
    side_of = {axis: side for side, axes in enumerate(along) for axis in axes}
    pairs = {(axis, after) for axes in along for axis, after in itertools.pairwise(axes)}
    runs: list[list[int]] = []
    for axis in order:
        last = runs[-1][-1] if runs else None
        if last is not None and ((last, axis) in pairs or (last not in side_of and axis not in side_of)):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    kept = [run for run in runs if run[0] in side_of]
    return Runs(
        tuple(order),
        tuple(math.prod(tensor.size(axis) for axis in run) for run in runs),
        tuple(place for place, run in enumerate(runs) if run[0] not in side_of),
        tuple(side_of[run[0]] for run in kept),
        tuple(place for axis in side_of for place, run in enumerate(kept) if run[0] == axis),
    )


class Reading:
    """Reads |w|^p of a tensor, summed (p = ∞: maximised) over the axes that no scale tells apart.

    A vector of two channels, as a bias or a gain has them, is a matrix of one column on the ground:

    >>> from equinorm._scaling import Scaling
    >>> from equinorm.balancing.layout import lay_out
    >>> scaling = Scaling(("gain",), (2,), torch.float32, "parameter", "weight", 1, ((1.0, torch.tensor([1, 2])),))
    >>> (layout,) = lay_out([scaling], [(1, 3)], 2, torch.zeros(3, dtype=torch.bool)).layouts
    >>> Reading(layout, torch.tensor([3.0, -4.0]), Norm(2.0), torch.float64).read_energies()
    tensor([[ 9.],
            [16.]], dtype=torch.float64)

    Args:
        layout: of the tensor.
        tensor: the tensor itself; its strides must stay what they are.
        norm: whose energies these are.
        dtype: of the sums.
        keeps: read into the same memory every time, which spares getting it where energies live for a whole step.
    """

    def __init__(self, layout: TensorLayout, tensor: Tensor, norm: Norm, dtype: torch.dtype, keeps: bool = False) -> None:
        self._layout, self._tensor, self._dtype = layout, tensor, dtype
        self._p, self._is_max, self._is_cheap = norm.p, norm.is_max, norm.is_cheap
        tensor = layout.view(tensor)
        self._shape = layout.sizes if len(layout.sizes) == 2 or not layout.is_matrix else (*layout.sizes, 1)
        self._runs = runs = runs_of(tensor, layout.along)
        self._kept = tuple(size for place, size in enumerate(runs.sizes) if place not in runs.summed)
        self._ones = {place: torch.ones(runs.sizes[place], device=tensor.device, dtype=dtype) for place in runs.summed if place}
        # Strips that fit the cache; on an accelerator, where launches cost, all in one.
        is_cpu, sizes = tensor.device.type == "cpu", (*runs.sizes, 1)
        self._cut = int(is_cpu and math.prod(sizes[1:]) > STRIP and len(runs.sizes) > 2 and 0 not in runs.summed)
        self._strip = max(1, STRIP // math.prod(sizes[self._cut + 1 :])) if is_cpu else sizes[0]
        keeps = keeps and not runs.summed and norm.p == 2 and tensor.dtype == dtype
        self._memory = torch.empty_like(tensor, requires_grad=False) if keeps else None

    def read_energies(self) -> Tensor:
        """Read them: a matrix of two sides, or a list of terms."""
        weight = self._layout.effective(self._tensor)
        if self._memory is not None and not torch.compiler.is_compiling():
            return torch.mul(weight, weight, out=self._memory).permute(self._layout.axes).reshape(self._shape)
        if not self._runs.summed:
            return self._power(weight).permute(self._layout.axes).reshape(self._shape)
        weight = weight.permute(self._runs.order).reshape(self._runs.sizes)
        whole = torch.cat([self._read(part) for part in weight.split(1)]) if self._cut else self._read(weight)
        return whole.view(self._kept).permute(self._runs.back).reshape(self._shape)

    def _read(self, weight: Tensor) -> Tensor:
        """Sums of memory as it lies, along the axis that is cut into strips."""
        cut, is_compiling = self._cut, torch.compiler.is_compiling()
        has_room = (self._is_cheap or self._is_max) and not is_compiling
        room = self._room(cut, self._strip) if has_room else None
        found: list[Tensor] = []
        for strip in weight.split(self._strip, cut):
            own = self._summed(strip, None if room is None else room.narrow(cut, 0, strip.size(cut)))
            if not is_compiling:
                forget(strip)
            if cut not in self._runs.summed or not found:
                found.append(own)
            else:
                found[0] = torch.maximum(found[0], own) if self._is_max else found[0] + own
        return found[0] if cut in self._runs.summed else torch.cat(found, cut)

    @property
    def has_strips(self) -> bool:
        """Can a matrix be read a strip at a time without a copy of the tensor?"""
        fits = self._runs.sides in ((0, 1), (1, 0)) or self._has_slices
        return fits and 0 not in self._runs.summed and is_dense(self._tensor) and not self._layout.scaling.offset

    @property
    def _has_slices(self) -> bool:
        """Is it a matrix for each index of the slowest axis, as those of transposed experts are?"""
        return self._runs.is_sliced and self._runs.sides in ((0, 1, 0), (1, 0, 1)) and 1 not in self._runs.summed

    @property
    def slow_side(self) -> int:
        """The side of the matrix, 0 or 1, that strips run along."""
        return self._runs.sides[-2]

    def strips(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Places along the slow side and along the fast one, and the energies of a strip of these, which fits the cache.

        Only where `has_strips`, for p = 1 and 2. A strip holds until the next one is asked for.
        """
        cut, sizes, fast = int(self._has_slices), self._runs.sizes, self._kept[-1]
        weight = self._layout.view(self._tensor).permute(self._runs.order).view(sizes)
        rows = max(1, AT_ONCE // math.prod(sizes[cut + 1 :]))
        memory = self._room(cut, rows)
        for number, part in enumerate(weight.split(1) if cut else [weight]):
            there = slice(number * fast, number * fast + fast)
            for first, strip in enumerate(part.split(rows, cut)):
                here = slice(first * rows, first * rows + strip.size(cut))
                energies = self._summed(strip, memory.narrow(cut, 0, strip.size(cut)))
                forget(strip)
                yield here, there, energies[0] if cut else energies

    def _room(self, cut: int, rows: int) -> Tensor:
        """Memory for the powers of one strip after the other: fresh pages cost more than the powers themselves."""
        sizes = (*[1] * cut, min(rows, self._runs.sizes[cut]), *self._runs.sizes[cut + 1 :])
        return torch.empty(sizes, device=self._tensor.device, dtype=self._tensor.dtype if self._is_max else self._dtype)

    def _power(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """|w|^p in the dtype of the sums; |w| for p = ∞."""
        if out is not None:
            same = weight if weight.dtype == self._dtype else out.copy_(weight)
            return torch.mul(same, same, out=out) if self._p == 2 else torch.abs(same, out=out)
        converted = weight.to(self._dtype)
        if converted is not weight:  # a copy of our own
            return converted.mul_(converted) if self._p == 2 else self._raised(converted.abs_())
        return weight * weight if self._p == 2 else self._raised(weight.abs())

    def _raised(self, magnitude: Tensor) -> Tensor:
        """magnitude^p in place; p = 1 and ∞ leave it."""
        return magnitude if self._p == 1 or self._is_max else magnitude.pow_(self._p)

    def _summed(self, weight: Tensor, memory: Tensor | None = None) -> Tensor:
        """Sums (largest entries) over some of the axes of a contiguous strip."""
        powers = torch.abs(weight, out=memory) if self._is_max else self._power(weight, memory)
        places = [*self._runs.summed]
        first = int(places[:1] == [0] and len(places) > 1)  # along the slowest axis by itself: up to ten times faster
        if first:
            powers = powers.amax(0) if self._is_max else powers.sum(0)
        if self._is_max:  # exact in any dtype
            return powers.amax([place - first for place in places[first:]]).to(self._dtype)
        for place in reversed(places[first:]):
            axis = place - first
            if place == 0 or axis < powers.dim() - 2:
                powers = powers.sum(axis)
                continue
            ones = self._ones[place][: powers.size(axis)]
            powers = powers @ ones if axis == powers.dim() - 1 else ones @ powers
        return powers


def check_finite(name: str, weight: Tensor, sums: Sequence[Tensor]) -> None:
    """Refuse a weight whose sums show that it is not finite.

    Raises:
        BalanceError: which names it.
    """
    if not all(math.isfinite(float(total.max())) for total in sums if total.numel()):  # of magnitudes; NaN is the largest
        bad = "NaN" if bool(weight.isnan().any()) else "inf"
        raise BalanceError(f"cannot balance {name}: it holds {bad}. The model was not touched.")
