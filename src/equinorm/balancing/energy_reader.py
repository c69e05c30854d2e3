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
from equinorm._memory import STRIP, is_dense, memory_order
from equinorm.balancing.layout import Layout
from equinorm.balancing.norm import Norm

SMALLEST, LARGEST = 1e-30, 1e30
"""Sums in float32 beyond these are taken again in float64."""

AT_ONCE = 1 << 20
"""Entries of a strip that is read for both of its sides: it fits a larger cache."""


@dataclass(frozen=True, slots=True)
class Runs:
    """A tensor's memory as runs: each axis that stays apart is one, and neighbours that are summed are one together.

    Attributes:
        order: axes of the tensor as they lie, from the slowest to the fastest.
        sizes: entries of each run.
        summed: places of the runs to sum over.
        kept: sizes of the axes that stay apart, as they lie.
        back: place among `kept` of each axis that stays apart.

    A convolution of 8 by 4 channels, in memory as (out, in, kernel) and as (out, kernel, in):

    >>> weight = torch.zeros(8, 4, 3, 3)
    >>> runs_of(weight, (0, 1)).sizes, runs_of(weight, (0, 1)).summed
    ((8, 4, 9), (2,))
    >>> runs_of(weight.to(memory_format=torch.channels_last), (0, 1)).sizes
    (8, 9, 4)
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    summed: tuple[int, ...]
    kept: tuple[int, ...]
    back: tuple[int, ...]


def runs_of(tensor: Tensor, axes: Sequence[int]) -> Runs:
    """The runs of a tensor of which some axes stay apart."""
    order = memory_order(tensor)
    runs = [(axis, [*group]) for axis, group in itertools.groupby(order, lambda axis: axis if axis in axes else None)]
    kept = [axis for axis in order if axis in axes]
    return Runs(
        tuple(order),
        tuple(math.prod(tensor.size(axis) for axis in group) for _, group in runs),
        tuple(place for place, (axis, _) in enumerate(runs) if axis is None),
        tuple(tensor.size(axis) for axis in kept),
        tuple(kept.index(axis) for axis in axes),
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

    def __init__(self, layout: Layout, tensor: Tensor, norm: Norm, dtype: torch.dtype, keeps: bool = False) -> None:
        self._layout, self._tensor, self._dtype = layout, tensor, dtype
        self._p, self._is_max, self._is_cheap = norm.p, norm.is_max, norm.is_cheap
        tensor = layout.view(tensor)
        sizes = [tensor.size(axis) for axis in layout.axes]
        self._shape = (-1,) if not layout.is_matrix else tuple(sizes) if len(sizes) == 2 else (-1, 1)
        self._runs = runs = runs_of(tensor, layout.axes)
        self._ones = {place: torch.ones(runs.sizes[place], device=tensor.device, dtype=dtype) for place in runs.summed if place}
        # Strips that fit the cache; on an accelerator, where launches cost, all in one.
        rows, rest = (*runs.sizes, 1)[0], math.prod(runs.sizes[1:])
        self._strip = max(1, STRIP // rest) if tensor.device.type == "cpu" else rows
        keeps = keeps and not runs.summed and norm.p == 2 and tensor.dtype == dtype
        self._memory = torch.empty_like(tensor, requires_grad=False) if keeps else None

    def read_energies(self) -> Tensor:
        """Read them: a matrix of two sides, or a list of terms."""
        weight = self._layout.effective(self._tensor)
        if self._memory is not None and not torch.compiler.is_compiling():
            return torch.mul(weight, weight, out=self._memory).reshape(self._shape)
        if not self._runs.summed:
            return self._power(weight).reshape(self._shape)
        strips = weight.permute(self._runs.order).reshape(self._runs.sizes).split(self._strip)
        if self._is_max:  # exact in any dtype
            strips = [strip.abs().amax(self._runs.summed) for strip in strips]
            whole = (torch.stack(strips).amax(0) if self._runs.summed[0] == 0 else torch.cat(strips)).to(self._dtype)
            return whole.view(self._runs.kept).permute(self._runs.back).reshape(self._shape)
        room = self._room(self._strip) if self._is_cheap and not torch.compiler.is_compiling() else None
        strips = [self._summed(strip, None if room is None else room[: len(strip)]) for strip in strips]
        whole = sum(strips[1:], strips[0]) if self._runs.summed[0] == 0 else torch.cat(strips)
        return whole.view(self._runs.kept).permute(self._runs.back).reshape(self._shape)

    @property
    def has_strips(self) -> bool:
        """Can a matrix be read a strip at a time without a copy of the tensor?"""
        lies_dense = is_dense(self._tensor)
        return len(self._runs.kept) == 2 and 0 not in self._runs.summed and lies_dense and not self._layout.scaling.offset

    @property
    def slow_side(self) -> int:
        """The side of the matrix, 0 or 1, that strips run along."""
        return self._runs.back.index(0)

    def strips(self) -> Iterator[tuple[int, Tensor]]:
        """First place along the slow side, and the energies of a strip of shape (slow, fast) that fits the cache.

        Only where `has_strips`, for p = 1 and 2. A strip holds until the next one is asked for.
        """
        weight = self._layout.view(self._tensor).permute(self._runs.order).view(self._runs.sizes)
        rows = max(1, AT_ONCE // math.prod(self._runs.sizes[1:]))
        memory = self._room(rows)
        for first in range(0, self._runs.sizes[0], rows):
            strip = weight[first : first + rows]
            yield first, self._summed(strip, memory[: len(strip)])

    def _room(self, rows: int) -> Tensor:
        """Memory for the powers of one strip after the other: fresh pages cost more than the powers themselves."""
        return torch.empty(min(rows, self._runs.sizes[0]), *self._runs.sizes[1:], device=self._tensor.device, dtype=self._dtype)

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
        """Sums over some of the axes of a contiguous strip, from the last to the first."""
        powers = self._power(weight, memory)
        for axis in reversed(self._runs.summed):
            if axis == 0:
                powers = powers.sum(0)
            elif axis == powers.dim() - 1:
                powers = powers @ self._ones[axis]
            else:
                powers = self._ones[axis] @ powers if axis == powers.dim() - 2 else powers.sum(axis)
        return powers


def fits_float32(layout: Layout, tensor: Tensor, norm: Norm) -> bool:
    """Are the energies of all channels that have any in the middle of float32's range?"""
    if are_between(totals(Reading(layout, tensor, norm, torch.float32).read_energies())):
        return True
    sums = totals(Reading(layout, tensor, norm, torch.float64).read_energies())
    return are_between([torch.where(total == 0, 1.0, total) for total in sums])


def totals(energies: Tensor) -> list[Tensor]:
    """Sums along every side: too small, too large or NaN shows whether float32 will do."""
    if energies.dim() == 1:
        return [energies]
    rows, columns = energies.shape
    return [energies @ energies.new_ones(columns), energies.T @ energies.new_ones(rows)]


def are_between(sums: Sequence[Tensor]) -> bool:
    """Are sums in float32 safe, neither zero nor beyond its range?"""
    return all(bool(((total > SMALLEST) & (total < LARGEST)).all()) for total in sums)


def check_finite(name: str, weight: Tensor, sums: Sequence[Tensor]) -> None:
    """Refuse a weight whose sums show that it is not finite.

    Raises:
        BalanceError: which names it.
    """
    if not all(math.isfinite(total.max()) for total in sums if total.numel()):  # of magnitudes; NaN is the largest
        bad = "NaN" if bool(weight.isnan().any()) else "inf"
        raise BalanceError(f"cannot balance {name}: it holds {bad}. The model was not touched.")
