"""Where the weights of two networks differ: in which tensors, in how many entries, and in which most."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._scaling import Scaling

ROUNDINGS = 8
"""Of half a unit in the last place each. A copy that was rescaled and rounded once more has one, four times has three; the
scales that are found are those of rounded weights."""

_FEW = 4
"""Places along an axis that are named one by one."""


@dataclass(frozen=True, slots=True)
class Change:
    """Where one tensor differs between two networks, once the first is brought near to the second.

    Attributes:
        tensor: its name.
        difference: the largest over its channels (slices along axis 0), ‖a − b‖_∞ / max(‖a‖_∞, ‖b‖_∞), both at the canonical
            scales of the second network.
        entries: how many differ by more than the tolerance, in parts of the largest of their channel; in half precision those,
            too, that differ by more than eight roundings of their own.
        size: how many there are.
        index: of the entry that differs most.
        first: what the first network has there, moved and at the scale at which the second is stored.
        second: what the second has.
        places: for each axis where entries that differ stand; None for an axis where they stand at more than four places, or
            at all.

    >>> import copy, torch, equinorm
    >>> net, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), torch.randn(1, 8)
    >>> twin = copy.deepcopy(net)
    >>> twin[0].weight.data[3, 2] = 5.0
    >>> (change,) = equinorm.equivalence(net, twin, x).changes
    >>> change.entry, round(change.second, 3)
    ('0.weight[3, 2]', 5.0)
    """

    tensor: str
    difference: float
    entries: int
    size: int
    index: tuple[int, ...]
    first: float | complex
    second: float | complex
    places: tuple[tuple[int, ...] | None, ...]

    @property
    def entry(self) -> str:
        """The entry that differs most, as one writes it."""
        return f"{self.tensor}[{', '.join(map(str, self.index))}]" if self.index else self.tensor

    @property
    def where(self) -> str:
        """What holds all entries that differ, in words; empty where that is no less than the tensor."""
        named = [(axis, places) for axis, places in enumerate(self.places) if places is not None]
        if not named or self.entries == 1:
            return ""
        axis, places = min(named, key=lambda pair: len(pair[1]))
        return f"at {', '.join(map(str, places))} of axis {axis}"

    def __str__(self) -> str:
        extent = f"{self.entries:,} of {self.size:,} entries" + (f", {self.where}" if self.where else "")
        return f"{self.tensor}: {self.difference:.1e}, {extent}; {self.entry} went from {self.first:.4g} to {self.second:.4g}"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What two copies may differ by.

    Attributes:
        relative: for every entry, in parts of the largest of its channel.
        halves: for each tensor the half precision that it is stored in; None for others, and where any entry may differ so far.
    """

    relative: float
    halves: Sequence[torch.dtype | None]


def changes(
    scalings: Sequence[Scaling], forms: Iterable[tuple[Tensor, Tensor]], scales: Sequence[Tensor], tolerance: Tolerance
) -> tuple[float, tuple[Change, ...]]:
    """The largest difference of all tensors, and where those above the tolerance differ, worst first.

    Args:
        scalings: how they move.
        forms: each tensor of both networks, dense and with offsets, at canonical scales.
        scales: log-scales that brought each network there.
        tolerance: on differences.
    """
    found: list[Change] = []
    worst = 0.0
    for scaling, half, (one, other) in zip(scalings, tolerance.halves, forms, strict=True):
        if not one.numel():
            continue
        apart = relative(one, other)
        mask = apart > tolerance.relative
        if half is not None and not one.is_complex():
            largest = torch.maximum(*(scaling.log_scales(z) for z in scales)).exp()
            mask = mask | beyond_rounding(one, other, half, (torch.finfo(half).tiny + abs(scaling.offset)) * largest)
        worst = max(worst, float(apart.max()))
        if bool(mask.any()):
            found.append(_change(scaling, apart, mask, (one, other), scales[1]))
    return worst, tuple(sorted(found, key=lambda change: -change.difference))


def beyond_rounding(one: Tensor, other: Tensor, dtype: torch.dtype, least: Tensor | float) -> Tensor:
    """Entries that differ by more than a few roundings to a dtype explain.

    Args:
        one: some numbers.
        other: to compare them with.
        dtype: that both were rounded to.
        least: magnitude below which roundings are as large as there.
    """
    larger = torch.maximum(one.abs(), other.abs())
    larger = torch.maximum(larger, torch.as_tensor(least, dtype=larger.dtype))
    return torch.where(one == other, 0.0, (one - other).abs()) > ROUNDINGS * torch.finfo(dtype).eps / 2 * larger


def relative(a: Tensor, b: Tensor) -> Tensor:
    """|a − b| of every entry, in parts of the largest in its channel."""
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    rest = tuple(range(1, a.dim()))
    scale = torch.maximum(a.abs(), b.abs())
    scale = scale.amax(rest, keepdim=True) if rest else scale
    return torch.nan_to_num(torch.where(apart == 0, 0.0, apart / scale), nan=math.inf)


def _change(scaling: Scaling, apart: Tensor, mask: Tensor, sides: tuple[Tensor, Tensor], scales: Tensor) -> Change:
    """Where one tensor differs: most among those entries that differ by too much."""
    worst = torch.where(mask, apart, -1.0).argmax()
    index = tuple(int(place) for place in torch.unravel_index(worst, apart.shape)) if apart.dim() else ()
    scale = scaling.log_scales(scales).expand(scaling.shape)[index].exp()
    first, second = ((side[index] / scale - scaling.offset).item() for side in sides)
    places = tuple(_places(mask, axis) for axis in range(len(scaling.shape)))
    return Change(scaling.name, float(apart.max()), int(mask.sum()), scaling.numel, index, first, second, places)


def _places(mask: Tensor, axis: int) -> tuple[int, ...] | None:
    """Where along an axis something differs; None at more than a few places, or at all."""
    rest = tuple(at for at in range(mask.dim()) if at != axis)
    found = (mask.sum(rest) if rest else mask).nonzero()[:, 0].tolist()
    return tuple(found) if len(found) <= min(_FEW, mask.shape[axis] - 1) else None
