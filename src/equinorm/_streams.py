"""Energies that are read from the weights each time and never stored.

One pass over a weight, a strip that fits the cache at a time, gives the energies of the channels along both of its sides at any
log-scales. Sums are taken in float32 where that is precise enough and stays in range, otherwise in float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equinorm._blocks import STRIP, Side, log_sum
from equinorm._layout import Layout, Pick
from equinorm._reading import Reading, check_finite

CHEAP = (1.0, 2.0)
"""Norms whose powers cost nothing beside reading; others are raised once and kept."""

KEPT = 8
"""Energies summed over kernels are kept in float32 where they take at most this fraction of the weight's memory."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Sums in float32 beyond these are taken again in float64."""


class Stream:
    """One weight as a matrix of energies.

    Args:
        layout: of the weight, a matrix of two axes.
        tensor: the weight.
        p: the norm, one of `CHEAP`.
        log_weight: logarithm to add to every energy.
    """

    def __init__(self, layout: Layout, tensor: Tensor, p: float, log_weight: float) -> None:
        self.layout, self._tensor, self._p, self._log_weight = layout, tensor, p, log_weight
        self._readings = {dtype: Reading(layout, tensor, p, dtype, False) for dtype in (torch.float32, torch.float64)}
        self.precise = False
        self._wide = False
        self._at: tuple[Tensor, int] | None = None  # log-scales of the last sums, and their version
        self._was_precise = False
        width = layout.scaling.shape[layout.axes[0]] * layout.scaling.shape[layout.axes[1]]
        self._keeps = width * 4 * KEPT <= tensor.numel() * tensor.element_size()
        self._kept: Tensor | None = None
        self._sums: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))
        sizes = [layout.scaling.shape[axis] for axis in layout.axes]
        self._ids = [torch.zeros(size, dtype=torch.long) for size in sizes]
        self._powers = [torch.ones(size, dtype=torch.float64) for size in sizes]
        self._group = [torch.zeros(size, dtype=torch.long) for size in sizes]
        self._empty = [torch.zeros(size, dtype=torch.bool) for size in sizes]
        kinds: list[dict[tuple[int, float], int]] = [{}, {}]
        self._loops: Tensor | None = None
        for part in layout.parts:
            for axis, (side, pick) in enumerate(zip(part.sides, part.picks, strict=True)):
                self._ids[axis][pick] = side.ids
                self._powers[axis][pick] = p * side.exponent
                self._group[axis][pick] = kinds[axis].setdefault((side.family, side.exponent), len(kinds[axis]))
            if part.loops is not None:
                self._loops = torch.zeros(sizes, dtype=torch.bool) if self._loops is None else self._loops
                rows, columns = (torch.arange(size)[pick] for size, pick in zip(sizes, part.picks, strict=True))
                self._loops[rows[:, None], columns] = part.loops
        self._kinds = kinds
        self._dead = [torch.zeros(size, dtype=torch.bool) for size in sizes]

    def bury(self, dead: Tensor) -> None:
        """Leave out dead classes from now on; `dead` is a mask over 0..num_free."""
        self._dead = [dead[ids] for ids in self._ids]
        self._at = None

    def along(self, axis: int, side: Side, pick: Pick, other: Side, z: Tensor) -> Tensor:
        """Log-energies of the channels of one block along one of its sides."""
        self._read(z)
        column = self._kinds[1 - axis][other.family, other.exponent]
        return self._sums[axis][pick, column]

    def reached(self, axis: int, pick: Pick, other: Pick, ready: Tensor) -> Tensor:
        """Which channels along one side a nonzero energy joins to a channel of the other that is ready."""
        mask = torch.zeros(len(self._ids[1 - axis]), dtype=torch.float64)
        mask[other] = ready.double()
        ends = [torch.zeros(len(ids), 1, dtype=torch.float64) for ids in self._ids]
        ends[1 - axis][:, 0] = mask
        return self._products(ends, torch.float64)[axis][pick, 0] > 0

    def loop_energies(self) -> Tensor:
        """Energies that join a class to itself."""
        if self._loops is None:
            return torch.zeros(0, dtype=torch.float64)
        weight = self._tensor.detach().permute(*self.layout.axes, *self.layout.others)
        entries = weight[self._loops.to(weight.device)].to("cpu", torch.float64).abs() ** self._p
        return entries.flatten(1).sum(1) if entries.dim() > 1 else entries

    def _read(self, z: Tensor) -> None:
        """Sums at these log-scales, unless they are those of the last time."""
        if self._was_precise >= self.precise and self._at is not None:
            before, version = self._at
            if before._version == version and (before is z or torch.equal(before, z)):
                return
        own = [
            torch.where(dead, -math.inf, power * z[ids])
            for dead, power, ids in zip(self._dead, self._powers, self._ids, strict=True)
        ]
        found = [
            _factors(logs, *kinds)
            for logs, kinds in zip(own, zip(self._group, map(len, self._kinds), strict=True), strict=True)
        ]
        tops, factors = [top for top, _ in found], [factor for _, factor in found]
        fine = self.precise or self._wide
        sums = self._products(factors, torch.float64 if fine else torch.float32)
        if not fine and not self._in_range(sums):
            fine = True
            sums = self._products(factors, torch.float64)
            check_finite(self.layout.scaling.name, self._tensor, sums)
            self._empty = [~(total > 0).any(1) for total in sums]
            self._wide = not self._in_range(sums)  # zeros alone do not need float64 the next time
        self._at, self._was_precise = (z, z._version), fine
        self._sums = (
            sums[0].log() + tops[1] + own[0][:, None] + self._log_weight,
            sums[1].log() + tops[0] + own[1][:, None] + self._log_weight,
        )

    def _in_range(self, sums: list[Tensor]) -> bool:
        """Would these sums be safe in float32? Channels known to be empty do not count."""
        for total, empty, dead in zip(sums, self._empty, self._dead, strict=True):
            low, high = torch.aminmax(torch.where((empty | dead)[:, None], 1.0, total))
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
        rows = max(1, STRIP // self._kept.size(1))
        for first in range(0, len(self._kept), rows):
            yield first, self._kept[first : first + rows]

    def _products(self, factors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Energies times the factors of the other side, for both sides: shapes (channels, groups of the other side)."""
        reading = self._readings[dtype]
        slow, device = reading.slow_side, self._tensor.device
        along, across = (factors[side].to(device, dtype) for side in (slow, 1 - slow))
        loops = None if self._loops is None else (self._loops if slow == 0 else self._loops.T).to(device)
        single, one = across.size(1) == 1, along.size(1) == 1
        parts: list[Tensor] = []
        total = torch.zeros(len(across), along.size(1), device=device, dtype=torch.float64)
        for first, strip in self._strips(dtype):
            if loops is not None:
                strip = strip.masked_fill(loops[first : first + len(strip)], 0.0)
            piece = along[first : first + len(strip)]
            parts.append(torch.mv(strip, across[:, 0])[:, None] if single else strip @ across)
            total += torch.mv(strip.T, piece[:, 0])[:, None] if one else strip.T @ piece
        found = [torch.cat(parts).to("cpu", torch.float64), total.cpu()]
        return found if slow == 0 else found[::-1]


def _factors(logs: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """exp(logs), one column for each group and at most 1, and the logarithm of what each column was divided by."""
    if count == 1:
        top = logs.max().clamp_min(-1e300)
        return top.reshape(1), torch.exp(logs - top)[:, None]
    tops = torch.full((count,), -math.inf, dtype=torch.float64).scatter_reduce(0, group, logs, "amax")
    tops = torch.where(tops.isfinite(), tops, 0.0)
    scales = torch.exp(logs - tops[group])
    return tops, torch.where(group[:, None] == torch.arange(count), scales[:, None], 0.0)


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
        return not all(side.ids.numel() for side in self.sides)

    def log_energies(self, side: int, z: Tensor, q: float, maximum: bool) -> Tensor:
        """Logarithm of the energy of each channel along one side, at log-scales z."""
        return self.stream.along(side, self.sides[side], self.picks[side], self.sides[1 - side], z)

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


def still_logs(stream: Stream, z: Tensor) -> Iterator[float]:
    """Logarithms of the energies that no free class changes."""
    for part in stream.layout.parts:
        if part.is_still:
            yield log_sum(stream.along(0, part.sides[0], part.picks[0], part.sides[1], z))
    loops = stream.loop_energies()
    if loops.numel():
        yield log_sum(loops.log()) + stream._log_weight
