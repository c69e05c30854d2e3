"""Mappings: scale groups in the form that libraries for smoothing and quantization ask for, one layer and its readers."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equinorm._display import count
from equinorm._scaling import IN_HALF
from equinorm.grouping.groups import ScaledAxis, ScaleGroup, ScaleGroups, enumerated

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""Of a layer or an expert, in a module's name."""


@dataclass(frozen=True, slots=True, eq=False)
class SmoothMapping:
    """A layer whose output channels may be scaled, and those that make up for it.

    Attributes:
        smooth: the module whose weight, and bias, is divided by s: a norm, or a layer in front. A tensor's name where the
            tensor is no module's weight, as experts in one tensor.
        balance: the modules (or tensors) whose in-axis is multiplied by s; all that read the scaled channels. Experts last.
        is_gain: is the weight of `smooth` a vector, as a norm's gain?
        group: what it was made of; tells the axes, such as axis 0 for the inputs of GPT-2's Conv1D.
        offset: number that the network adds to the weight of `smooth` (1 for gains written 1 + w), otherwise 0: the sum is
            divided by s, so that w becomes (w + offset) / s − offset.
    """

    smooth: str
    balance: tuple[str, ...]
    is_gain: bool
    group: ScaleGroup = field(repr=False)
    offset: float = 0.0

    def __str__(self) -> str:
        added = f" (plus {self.offset:g})" if self.offset else ""
        return f"{self.smooth}{added} → {enumerated(self.balance)}"


class SmoothMappings(Sequence[SmoothMapping]):
    """Mappings in the order of the groups, and why the other groups are none.

    Attributes:
        left_out: groups that have free scales and are no mapping, each with the reason; and gains written 1 + w that stay
            because the model is in half precision.
    """

    def __init__(self, mappings: Sequence[SmoothMapping], left_out: Sequence[tuple[ScaleGroup, str]]) -> None:
        self._mappings, self.left_out = tuple(mappings), tuple(left_out)

    def __getitem__(self, key):  # pyright: ignore
        return self._mappings[key]

    def __len__(self) -> int:
        return len(self._mappings)

    def __repr__(self) -> str:
        return f"{count(len(self), 'mapping')}, {count(len(self.left_out), 'group')} left out"

    def __str__(self) -> str:
        left = Counter(_starred(why) for _, why in self.left_out)
        return "\n".join([*map(str, self._mappings), *(f"left out, {count(n, 'group')}: {why}" for why, n in left.items())])

    def patterns(self) -> dict[tuple[str, tuple[str, ...]], list[str]]:
        """Mappings that differ in numbers alone, as one: names with `*` for the layer's number, and the numbers.

        For tables that hold for every decoder layer, such as those of AutoAWQ and ModelOpt. Numbers that differ within one
        mapping, as those of experts, become `*` too. A reader in another layer than `smooth` keeps its number.
        """
        found: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
        for mapping in self._mappings:
            number = next((number for _, number in _numbers(mapping.smooth)), "")
            names = tuple(dict.fromkeys(_pattern(name, mapping) for name in mapping.balance))
            found.setdefault((_starred(mapping.smooth), names), {})[number] = None
        return {names: [*numbers] for names, numbers in found.items()}


def mappings(groups: ScaleGroups) -> SmoothMappings:
    """The groups that are mappings: one axis brings in, every reader reads the same channels in the same order."""
    found, left_out = [], []
    for group in groups:
        why = _in_half(group) if group.is_pinned else _hinders(group)
        if group.is_pinned and not why:
            continue
        if why:
            left_out.append((group, why))
            continue
        (up,) = group.up
        down = sorted(group.down, key=lambda axis: ".experts." in axis.tensor)
        names = tuple(dict.fromkeys(module_of(axis) for axis in down))
        found.append(SmoothMapping(module_of(up), names, up.ids.dim() == 1, group, up.offset))
    return SmoothMappings(found, left_out)


def module_of(axis: ScaledAxis) -> str:
    """The module whose weight a tensor is; the tensor itself if it is none."""
    return axis.tensor.removesuffix(".weight")


def _hinders(group: ScaleGroup) -> str:
    """Why a group is no mapping, or nothing."""
    signs = {*group.up[0].exponents.sign().flatten().tolist()} if group.up else set()
    if len(group.up) != 1 or (not group.down and {1.0, -1.0} <= signs):
        if not group.up:
            return f"no single axis brings in the scales of {enumerated(group.axes)}"
        what = "which cancel in a product" if not group.down else "all of which must move"
        verb = "bring" if len(group.up) > 1 else "brings"
        return f"{enumerated(group.up)} {verb} the scales in, {what}"
    if not group.down:
        return f"no axis takes out what {group.up[0]} brings in"
    (up,) = group.up
    for axis in group.down:
        if power := other_power(up, axis):
            return f"{axis} {power}"
    if others := [axis for axis in group.along if axis.tensor != bias_of(up.tensor)]:
        return f"{enumerated(others)} must move along with {up}"
    return next((text for axis in group.down if (text := _disorder(up, axis))), "")


def _in_half(group: ScaleGroup) -> str:
    """Would these channels scale in float32?"""
    reason = next((pin.reason for pin in group.pinned_by if pin.reason.detail == IN_HALF), None)
    return f"{group.up[0]} is pinned by {reason}: analyse the model in float32" if reason else ""


def bias_of(tensor: str) -> str:
    """The bias of the module whose weight a tensor is; tools move it along."""
    return f"{tensor.removesuffix('weight')}bias" if f".{tensor}".endswith(".weight") else ""


def other_power(up: ScaledAxis, axis: ScaledAxis) -> str:
    """By which powers of s an axis scales where another scales by s, unless by s⁻¹ as in a mapping: part of a sentence."""
    above: dict[int, set[float]] = {}
    for id, exponent in _moved(up):
        above.setdefault(id, set()).add(exponent)
    powers = sorted({exponent / other for id, exponent in _moved(axis) for other in above.get(id, ())})
    if powers in ([], [-1.0]):
        return ""
    return f"scales by {' or '.join(f's^{power:g}' for power in powers)} where {up} scales by s, not by s^-1"


def _moved(axis: ScaledAxis) -> set[tuple[int, float]]:
    """The classes that move an axis, with their exponents."""
    mask = axis.ids > 0
    return {*zip(axis.ids[mask].tolist(), axis.exponents[mask].tolist(), strict=True)}


def _disorder(up: ScaledAxis, axis: ScaledAxis) -> str:
    """How an axis reads others than the last channels of another in their order, or nothing."""
    wide, read = up.channels, axis.channels
    if not wide.dim() or not read.dim():
        return f"one scale moves {axis if wide.dim() else up} as a whole"
    if _ends_with(wide, read):
        return ""
    if torch.equal(wide, read):
        return f"only {int((wide > 0).sum())} of {wide.numel()} channels of {up} scale"
    if not bool((read > 0).all()):
        return f"{axis} reads other channels than those of {up} too"
    if torch.equal(wide[wide > 0], read.flatten()):
        return f"the channels of {up} that scale are not its last"
    return f"{axis} reads the channels of {up} in another order, or some several times"


def _ends_with(wide: Tensor, read: Tensor) -> bool:
    """Are the last channels of one axis those of the other, and are no others scaled?"""
    if wide.dim() != read.dim() or read.size(-1) > wide.size(-1):
        return False
    first, last = wide.split([wide.size(-1) - read.size(-1), read.size(-1)], -1)
    return torch.equal(last, read) and not bool(first.any()) and bool((read > 0).all())


def _starred(name: str) -> str:
    return _NUMBER.sub("*", name)


def _pattern(name: str, mapping: SmoothMapping) -> str:
    """A name with `*` for numbers that it shares with `smooth`, and for those in which names of one mapping differ."""
    shared = dict(_numbers(mapping.smooth))
    alike = {other for other in mapping.balance if _starred(other) == _starred(name)}
    parts, end = [], 0
    for place, (match, (before, number)) in enumerate(zip(_NUMBER.finditer(name), _numbers(name), strict=True)):
        differ = len({_numbers(other)[place][1] for other in alike}) > 1
        parts += [name[end : match.start()], "*" if differ or shared.get(before) == number else number]
        end = match.end()
    return "".join([*parts, name[end:]])


def _numbers(name: str) -> list[tuple[str, str]]:
    """Each number in a name, behind what stands before it with `*` for numbers."""
    return [(_starred(name[: match.end() + 1])[:-2], match.group()) for match in _NUMBER.finditer(name)]
