"""Mappings: scale groups in the form that libraries for smoothing and quantization ask for, one layer and its readers."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equinorm._display import count
from equinorm.grouping.groups import ScaledAxis, ScaleGroup, ScaleGroups, enumerated


@dataclass(frozen=True, slots=True, eq=False)
class SmoothMapping:
    """A layer whose output channels may be scaled, and those that make up for it.

    Attributes:
        smooth: the module whose weight, and bias, is divided by s: a norm, or a layer in front. A tensor's name where the
            tensor is no module's weight, as experts in one tensor.
        balance: the modules (or tensors) whose in-axis is multiplied by s; all that read the scaled channels. Experts last.
        is_gain: is the weight of `smooth` a vector, as a norm's gain?
        group: what it was made of.
    """

    smooth: str
    balance: tuple[str, ...]
    is_gain: bool
    group: ScaleGroup = field(repr=False)

    def __str__(self) -> str:
        return f"{self.smooth} → {enumerated(self.balance)}"


class SmoothMappings(Sequence[SmoothMapping]):
    """Mappings in the order of the groups, and why the other groups are none.

    Attributes:
        left_out: groups that have free scales and are no mapping, each with the reason.
    """

    def __init__(self, mappings: Sequence[SmoothMapping], left_out: Sequence[tuple[ScaleGroup, str]]) -> None:
        self._mappings, self.left_out = tuple(mappings), tuple(left_out)

    def __getitem__(self, key):  # pyright: ignore
        return self._mappings[key]

    def __len__(self) -> int:
        return len(self._mappings)

    def __repr__(self) -> str:
        return f"{len(self)} mappings, {len(self.left_out)} groups left out"

    def __str__(self) -> str:
        left = Counter(_starred(why) for _, why in self.left_out)
        return "\n".join([*map(str, self._mappings), *(f"left out, {count(n, 'group')}: {why}" for why, n in left.items())])

    def patterns(self) -> dict[tuple[str, tuple[str, ...]], list[str]]:
        """Mappings that differ in numbers alone, as one: names with `*` for the layer's number, and the numbers.

        For tables that hold for every decoder layer, such as those of AutoAWQ and ModelOpt. Numbers that differ within one
        mapping, as those of experts, become `*` too.
        """
        found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for mapping in self._mappings:
            number = next(iter(re.findall(r"(?<=\.)\d+(?=\.)", mapping.smooth)), "")
            names = tuple(dict.fromkeys(_starred(name) for name in mapping.balance))
            found.setdefault((_starred(mapping.smooth), names), []).append(number)
        return found


def mappings(groups: ScaleGroups) -> SmoothMappings:
    """The groups that are mappings: one axis brings in, every reader reads the same channels in the same order."""
    found, left_out = [], []
    for group in groups:
        if group.is_pinned:
            continue
        why = _hinders(group)
        if why:
            left_out.append((group, why))
            continue
        (up,) = group.up
        down = sorted(group.down, key=lambda axis: ".experts." in axis.tensor)
        names = tuple(dict.fromkeys(module_of(axis) for axis in down))
        found.append(SmoothMapping(module_of(up), names, up.ids.dim() == 1, group))
    return SmoothMappings(found, left_out)


def module_of(axis: ScaledAxis) -> str:
    """The module whose weight a tensor is; the tensor itself if it is none."""
    return axis.tensor.removesuffix(".weight")


def _hinders(group: ScaleGroup) -> str:
    """Why a group is no mapping, or nothing."""
    if len(group.up) != 1:
        if not group.up:
            return f"no single axis brings in the scales of {enumerated(group.axes)}"
        what = "which cancel in a product" if not group.down else "all of which must move"
        return f"{enumerated(group.up)} bring the scales in, {what}"
    if not group.down:
        return f"no axis takes out what {group.up[0]} brings in"
    (up,) = group.up
    for axis in (up, *group.down):
        if len({*axis.exponents[axis.ids > 0].abs().tolist()}) > 1 or abs(float(axis.exponents.abs().max())) != 1:
            return f"{axis} scales with a power of the scale"
    for axis in group.down:
        wide, read = up.channels, axis.channels
        if not _ends_with(wide, read):
            reason = "in another order, or some several times" if read.numel() else ""
            return f"{axis} reads the channels of {up} {reason}"
    return ""


def _ends_with(wide: Tensor, read: Tensor) -> bool:
    """Are the last channels of one axis those of the other, and are no others scaled?"""
    if wide.dim() != read.dim() or not wide.dim() or read.size(-1) > wide.size(-1):
        return wide.dim() < 2 and read.dim() < 2 and torch.equal(wide.reshape(-1), read.reshape(-1))
    first, last = wide.split([wide.size(-1) - read.size(-1), read.size(-1)], -1)
    return torch.equal(last, read) and not bool(first.any()) and bool((read > 0).all())


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
