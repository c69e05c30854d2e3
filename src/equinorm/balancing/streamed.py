"""Energies that are read from the weights each time and never stored.

One pass over a weight, a strip that fits the cache at a time, gives the energies of the channels along both of its sides at any
log-scales. Sums are taken in float32 where that is precise enough and stays in range, otherwise in float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm.balancing.blocks import AnyBlock, log_sum
from equinorm.balancing.energy_reader import check_finite
from equinorm.balancing.float32_range import are_safe_factors, are_safe_sums
from equinorm.balancing.layout import Pick, TensorLayout
from equinorm.balancing.norm import Norm
from equinorm.balancing.sides import Side
from equinorm.balancing.weight_passes import StripPass, compiled_pass


class _Axis:
    """The channels along one side of a weight.

    Attributes:
        ids: free class of each, 0 on the ground.
        powers: p times the exponent of its scale.
        kinds: a number for each family and exponent that there is.
        group: that number, for each channel.
        dead: channels that are left out.
        empty: channels known to have no energy.
    """

    def __init__(self, size: int) -> None:
        self.ids = torch.zeros(size, dtype=torch.long)
        self.powers = torch.ones(size, dtype=torch.float64)
        self.kinds: dict[tuple[int, float], int] = {}
        self.group = torch.zeros(size, dtype=torch.long)
        self.dead, self.empty = torch.zeros(2, size, dtype=torch.bool)

    def add(self, side: Side, pick: Pick, p: float) -> None:
        """Say who moves the channels at these places."""
        self.ids[pick], self.powers[pick] = side.ids, p * side.exponent
        self.group[pick] = self.kinds.setdefault((side.family, side.exponent), len(self.kinds))

    def logs(self, z: Tensor) -> Tensor:
        """By how much log-scales z raise the logarithms of energies."""
        return torch.where(self.dead, -math.inf, self.powers * z[self.ids])

    def factors(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """exp(logs), one column for each group and at most 1, and the logarithm of what each column was divided by."""
        count = len(self.kinds)
        if count == 1:
            top = logs.max().clamp_min(-1e300)
            return torch.exp(logs - top)[:, None], top.reshape(1)
        tops = torch.full((count,), -math.inf, dtype=torch.float64).scatter_reduce(0, self.group, logs, "amax")
        tops = torch.where(tops.isfinite(), tops, 0.0)
        scales = torch.exp(logs - tops[self.group])
        return torch.where(self.group[:, None] == torch.arange(count), scales[:, None], 0.0), tops


class Stream:
    """One weight as a matrix of energies.

    Args:
        layout: of the weight, a matrix of two sides.
        tensor: the weight.
        norm: one whose powers are cheap.
        log_weight: logarithm to add to every energy.
        compile: read it by compiled kernels, where they can.

    Attributes:
        precise: take sums in float64.
        reader: how the weight is read.
    """

    def __init__(self, layout: TensorLayout, tensor: Tensor, norm: Norm, log_weight: float, compile: bool = False) -> None:
        self.layout, self.precise = layout, False
        self._tensor, self._p, self._log_weight = tensor, norm.p, log_weight
        self._axes = [_Axis(size) for size in layout.sizes]
        for part in layout.parts:
            for axis, side, pick in zip(self._axes, part.sides, part.picks, strict=True):
                axis.add(side, pick, norm.p)
        self._loops = _loops(layout)
        groups = [axis.group for axis in self._axes]
        compiled = compiled_pass(layout, tensor, norm, groups) if compile and self._loops is None else None
        self.reader = compiled or StripPass(layout, tensor, norm, self._loops)
        self._is_wide = False  # float32 does not hold these energies
        self._at: tuple[Tensor, bool] | None = None  # log-scales of the last sums, and whether they are in float64
        self._sums: list[Tensor] = []

    def bury(self, dead: Tensor) -> None:
        """Leave out dead classes from now on; `dead` is a mask over 0..num_free."""
        for axis in self._axes:
            axis.dead = dead[axis.ids]
        self._at = None

    def along(self, place: int, pick: Pick, other: Side, z: Tensor) -> Tensor:
        """Log-energies, at log-scales z, of channels along one side, from those along the other that move like `other`."""
        self._sum_at(z)
        return self._sums[place][pick, self._axes[1 - place].kinds[other.family, other.exponent]]

    def reached(self, place: int, pick: Pick, other: Pick, ready: Tensor) -> Tensor:
        """Which channels along one side a nonzero energy joins to a channel of the other that is ready."""
        factors = [torch.zeros(len(axis.ids), 1, dtype=torch.float64) for axis in self._axes]
        factors[1 - place][other, 0] = ready.double()
        return self.reader.products(factors, torch.float64)[place][pick, 0] > 0

    def still_logs(self, start: Tensor) -> Iterator[float]:
        """Logarithms of the energies that no free class changes; `start` is where the solver reads first."""
        for part in self.layout.parts:
            if part.is_still:
                yield log_sum(self.along(0, part.picks[0], part.sides[1], start))
        if self._loops is not None:
            weight = self.layout.view(self._tensor).permute(*self.layout.axes, *self.layout.others)
            weight = weight.reshape(*self.layout.sizes, *weight.shape[len(self.layout.axes) :])
            loops = weight[self._loops.to(weight.device)].to("cpu", torch.float64).abs() ** self._p
            check_finite(self.layout.scaling.name, self._tensor, [loops])
            yield log_sum(loops.flatten().log()) + self._log_weight

    def _sum_at(self, z: Tensor) -> None:
        """Sums at these log-scales, unless they are those of the last time; z must not be changed in place afterwards."""
        if self._at is not None:
            before, fine = self._at
            if fine >= self.precise and (before is z or torch.equal(before, z)):
                return
        own = [axis.logs(z) for axis in self._axes]
        (rows, row_tops), (columns, column_tops) = (axis.factors(logs) for axis, logs in zip(self._axes, own, strict=True))
        fine = self.precise or self._is_wide or not all(map(are_safe_factors, own))
        sums = self.reader.products([rows, columns], torch.float64 if fine else torch.float32)
        if not fine and not self._are_safe(sums):
            fine = True
            sums = self.reader.products([rows, columns], torch.float64)
            check_finite(self.layout.scaling.name, self._tensor, sums)
            for axis, total in zip(self._axes, sums, strict=True):
                axis.empty = ~(total > 0).any(1)
            self._is_wide = not self._are_safe(sums)  # zeros alone do not need float64 the next time
        self._at = z, fine
        tops = column_tops, row_tops
        self._sums = [sums[i].log() + tops[i] + own[i][:, None] + self._log_weight for i in (0, 1)]

    def _are_safe(self, sums: list[Tensor]) -> bool:
        """Would these sums be safe in float32? Channels known to be empty do not count."""
        silent = [(axis.empty | axis.dead)[:, None] for axis in self._axes]
        return are_safe_sums([torch.where(mask, 1.0, total) for mask, total in zip(silent, sums, strict=True)])


def _loops(layout: TensorLayout) -> Tensor | None:
    """Mask of all entries that join a class to itself; None if there are none."""
    found: Tensor | None = None
    for part in layout.parts:
        if part.loops is not None:
            found = torch.zeros(layout.sizes, dtype=torch.bool) if found is None else found
            rows, columns = (torch.arange(size)[pick] for size, pick in zip(layout.sizes, part.picks, strict=True))
            found[rows[:, None], columns] = part.loops
    return found


@dataclass(eq=False)
class StreamedBlock(AnyBlock):
    """The same as a `Block` that is a matrix, read from the weight."""

    tensor: int
    stream: Stream
    picks: tuple[Pick, ...]
    sides: tuple[Side, ...]

    def log_energies(self, side: int, z: Tensor, norm: Norm) -> Tensor:
        """Logarithm of the energy of each channel along one side, at log-scales z."""
        return self.stream.along(side, self.picks[side], self.sides[1 - side], z)

    def hits(self, place: int, ready: Tensor) -> Tensor:
        """Which channels of one side a nonzero energy joins to a channel of the other that is ready."""
        return self.stream.reached(place, self.picks[place], self.picks[1 - place], ready)

    def without(self, dead: Tensor) -> "StreamedBlock":
        """The same block with no energy where a dead class takes part."""
        self.stream.bury(dead)
        return self


def streamed(index: int, stream: Stream) -> Iterator[StreamedBlock]:
    """Its blocks that move."""
    for part in stream.layout.parts:
        if not part.is_still:
            yield StreamedBlock(index, stream, part.picks, part.sides)
