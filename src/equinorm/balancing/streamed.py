"""Energies that are read from the weights each time and never stored.

One pass over a weight, a strip that fits the cache at a time, gives the energies of the channels along both of its sides at any
log-scales. Sums are taken in float32 where that is precise enough and stays in range, otherwise in float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equinorm import native
from equinorm.balancing.dense_blocks import Dense, dense
from equinorm.balancing.energy_reader import AT_ONCE, LARGEST, SMALLEST, Reading, check_finite
from equinorm.balancing.layout import Layout, Pick
from equinorm.balancing.problem import Side, log_sum

KEPT = 8
"""Energies summed over kernels are kept in float32 where they take so many times less memory than the weight."""


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
        layout: of the weight, a matrix of two axes.
        tensor: the weight.
        p: the norm, one of `CHEAP`.
        log_weight: logarithm to add to every energy.
        compile: read it by compiled kernels, where they can.

    Attributes:
        precise: take sums in float64.
    """

    def __init__(self, layout: Layout, tensor: Tensor, p: float, log_weight: float, compile: bool = False) -> None:
        self.layout, self.precise = layout, False
        self._tensor, self._p, self._log_weight = tensor, p, log_weight
        self._readings = {dtype: Reading(layout, tensor, p, dtype, False) for dtype in (torch.float32, torch.float64)}
        sizes = [layout.scaling.shape[axis] for axis in layout.axes]
        self._axes = [_Axis(size) for size in sizes]
        self._loops: Tensor | None = None
        for part in layout.parts:
            for axis, side, pick in zip(self._axes, part.sides, part.picks, strict=True):
                axis.add(side, pick, p)
            if part.loops is not None:
                self._loops = torch.zeros(sizes, dtype=torch.bool) if self._loops is None else self._loops
                rows, columns = (torch.arange(size)[pick] for size, pick in zip(sizes, part.picks, strict=True))
                self._loops[rows[:, None], columns] = part.loops
        self._keeps = math.prod(sizes) * 4 * KEPT <= tensor.numel() * tensor.element_size()
        self._kept: Tensor | None = None
        is_native = compile and tensor.device.type in native.DEVICES and self._loops is None and not self._keeps
        whole = dense(layout, [slice(None)] * 2, tensor) if is_native and all(len(a.kinds) == 1 for a in self._axes) else None
        self._dense = whole if tensor.dtype in native.TYPES else None
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
        self._read(z)
        return self._sums[place][pick, self._axes[1 - place].kinds[other.family, other.exponent]]

    def reached(self, place: int, pick: Pick, other: Pick, ready: Tensor) -> Tensor:
        """Which channels along one side a nonzero energy joins to a channel of the other that is ready."""
        factors = [torch.zeros(len(axis.ids), 1, dtype=torch.float64) for axis in self._axes]
        factors[1 - place][other, 0] = ready.double()
        return self._products(factors, torch.float64)[place][pick, 0] > 0

    def still_logs(self, start: Tensor) -> Iterator[float]:
        """Logarithms of the energies that no free class changes; `start` is where the solver reads first."""
        for part in self.layout.parts:
            if part.is_still:
                yield log_sum(self.along(0, part.picks[0], part.sides[1], start))
        if self._loops is not None:
            weight = self.layout.view(self._tensor).permute(*self.layout.axes, *self.layout.others)
            loops = weight[self._loops.to(weight.device)].to("cpu", torch.float64).abs() ** self._p
            check_finite(self.layout.scaling.name, self._tensor, [loops])
            yield log_sum(loops.flatten().log()) + self._log_weight

    def _read(self, z: Tensor) -> None:
        """Sums at these log-scales, unless they are those of the last time; z must not be changed in place afterwards."""
        if self._at is not None:
            before, fine = self._at
            if fine >= self.precise and (before is z or torch.equal(before, z)):
                return
        own = [axis.logs(z) for axis in self._axes]
        (rows, row_tops), (columns, column_tops) = (axis.factors(logs) for axis, logs in zip(self._axes, own, strict=True))
        fine = self.precise or self._is_wide
        sums = self._products([rows, columns], torch.float64 if fine else torch.float32)
        if not fine and not self._in_range(sums):
            fine = True
            sums = self._products([rows, columns], torch.float64)
            check_finite(self.layout.scaling.name, self._tensor, sums)
            for axis, total in zip(self._axes, sums, strict=True):
                axis.empty = ~(total > 0).any(1)
            self._is_wide = not self._in_range(sums)  # zeros alone do not need float64 the next time
        self._at = z, fine
        tops = column_tops, row_tops
        self._sums = [sums[i].log() + tops[i] + own[i][:, None] + self._log_weight for i in (0, 1)]

    def _in_range(self, sums: list[Tensor]) -> bool:
        """Would these sums be safe in float32? Channels known to be empty do not count."""
        for axis, total in zip(self._axes, sums, strict=True):
            low, high = torch.aminmax(torch.where((axis.empty | axis.dead)[:, None], 1.0, total))
            if not SMALLEST < float(low) <= float(high) < LARGEST:
                return False
        return True

    def _strips(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Energies, from the weight or from what was kept of it."""
        if not self._keeps or dtype != torch.float32:
            yield from self._readings[dtype].strips()
            return
        if self._kept is None:
            self._kept = torch.cat([strip for _, strip in self._readings[dtype].strips()])
        rows = max(1, AT_ONCE // self._kept.size(1))
        for first in range(0, len(self._kept), rows):
            yield first, self._kept[first : first + rows]

    def _products(self, factors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Energies times the factors of the other side, for both sides: shapes (channels, groups of the other side)."""
        if self._dense is not None:
            return self._compiled_products(self._dense, factors, dtype)
        slow, device = self._readings[dtype].slow_side, self._tensor.device
        along, across = (factors[place].to(device, dtype) for place in (slow, 1 - slow))
        loops = None if self._loops is None else (self._loops if slow == 0 else self._loops.T).to(device)
        parts: list[Tensor] = []
        total = torch.zeros(len(across), along.size(1), device=device, dtype=torch.float64)
        for first, strip in self._strips(dtype):
            here = slice(first, first + len(strip))
            strip = strip if loops is None else strip.masked_fill(loops[here], 0.0)
            parts.append(_product(strip, across))
            total += _product(strip.T, along[here])
        found = [torch.cat(parts).to("cpu", torch.float64), total.cpu()]
        return found if slow == 0 else found[::-1]

    def _compiled_products(self, matrix: Dense, factors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The same by one compiled pass, where each side is one group."""
        found = native.kernels_for(self._tensor.dtype, dtype)
        assert found is not None
        spread = [line.spread(factor[:, 0].to(dtype)) for line, factor in zip(matrix.lines, factors, strict=True)]
        sums = [torch.empty(len(factor), dtype=dtype) for factor in spread]
        rows, columns = (0, 1) if matrix.lines[0].is_row else (1, 0)
        first = self._tensor.data_ptr() + matrix.first * self._tensor.element_size()
        found.sums(
            int(self._p), first, matrix.shape, matrix.pitch, (spread[rows], spread[columns]), (sums[rows], sums[columns])
        )
        return [line.fold(total.double())[:, None] for line, total in zip(matrix.lines, sums, strict=True)]


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix @ columns; one column as a vector, which is faster."""
    return torch.mv(matrix, columns[:, 0])[:, None] if columns.size(1) == 1 else matrix @ columns


@dataclass(eq=False)
class StreamedBlock:
    """The same as a `Block` that is a matrix, read from the weight."""

    tensor: int
    stream: Stream
    picks: tuple[Pick, ...]
    sides: tuple[Side, ...]
    is_matrix: bool = field(default=True, init=False)

    @property
    def is_empty(self) -> bool:
        """Has it no entries?"""
        return not all(side.ids.numel() for side in self.sides)

    def log_energies(self, side: int, z: Tensor, q: float, maximum: bool) -> Tensor:
        """Logarithm of the energy of each channel along one side, at log-scales z."""
        return self.stream.along(side, self.picks[side], self.sides[1 - side], z)

    def log_total(self, z: Tensor, q: float, maximum: bool) -> float:
        """Logarithm of the block's whole energy."""
        return log_sum(self.log_energies(0, z, q, maximum))

    def hits(self, place: int, ready: list[Tensor]) -> Tensor:
        """Which channels of one side a nonzero energy joins to a channel of the other that is ready."""
        return self.stream.reached(place, self.picks[place], self.picks[1 - place], ready[1 - place])

    def without(self, dead: Tensor) -> "StreamedBlock":
        """The same block with no energy where a dead class takes part."""
        self.stream.bury(dead)
        return self


def streamed(index: int, stream: Stream) -> Iterator[StreamedBlock]:
    """Its blocks that move."""
    for part in stream.layout.parts:
        if not part.is_still:
            yield StreamedBlock(index, stream, part.picks, part.sides)
