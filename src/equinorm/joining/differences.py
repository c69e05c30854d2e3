"""Where the weights of two networks differ: in which tensors, in how many entries, and in which most."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._scaling import Scaling

_FEW = 4
"""Places along an axis that are named one by one."""


@dataclass(frozen=True, slots=True)
class Change:
    """Where one tensor differs between two networks, once the first is brought near to the second.

    Attributes:
        tensor: its name.
        difference: the largest over its channels (slices along axis 0), ‖a − b‖_∞ / max(‖a‖_∞, ‖b‖_∞), both at the canonical
            scales of the second network.
        entries: how many differ by more than the tolerance, in parts of the largest of their channel.
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


def changes(
    scalings: Sequence[Scaling], forms: Iterable[tuple[Tensor, Tensor]], scales: Tensor, tolerance: float
) -> tuple[float, tuple[Change, ...]]:
    """The largest difference of all tensors, and where those above the tolerance differ, worst first.

    Args:
        scalings: how they move.
        forms: each tensor of both networks, dense and with offsets, at canonical scales.
        scales: log-scales that brought the second one there.
        tolerance: on relative differences.
    """
    found: list[Change] = []
    worst = 0.0
    for scaling, (one, other) in zip(scalings, forms, strict=True):
        if not one.numel():
            continue
        apart = _relative(one, other)
        largest = float(apart.max())
        worst = max(worst, largest)
        if largest > tolerance:
            found.append(_change(scaling, apart, (one, other), scales, tolerance))
    return worst, tuple(sorted(found, key=lambda change: -change.difference))


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """|a − b| of every entry, in parts of the largest in its channel."""
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    rest = tuple(range(1, a.dim()))
    scale = torch.maximum(a.abs(), b.abs())
    scale = scale.amax(rest, keepdim=True) if rest else scale
    return torch.nan_to_num(torch.where(apart == 0, 0.0, apart / scale), nan=math.inf)


def _change(scaling: Scaling, apart: Tensor, sides: tuple[Tensor, Tensor], scales: Tensor, tolerance: float) -> Change:
    """Where one tensor differs."""
    mask = apart > tolerance
    index = tuple(int(place) for place in torch.unravel_index(apart.argmax(), apart.shape)) if apart.dim() else ()
    scale = scaling.log_scales(scales).expand(scaling.shape)[index].exp()
    first, second = ((side[index] / scale - scaling.offset).item() for side in sides)
    places = tuple(_places(mask, axis) for axis in range(len(scaling.shape)))
    return Change(scaling.name, float(apart.max()), int(mask.sum()), scaling.numel, index, first, second, places)


def _places(mask: Tensor, axis: int) -> tuple[int, ...] | None:
    """Where along an axis something differs; None at more than a few places, or at all."""
    rest = tuple(at for at in range(mask.dim()) if at != axis)
    found = (mask.sum(rest) if rest else mask).nonzero()[:, 0].tolist()
    return tuple(found) if len(found) <= min(_FEW, mask.shape[axis] - 1) else None
