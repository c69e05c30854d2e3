"""Is a mapping right: does all that reads what a layer gives take its scale out, and nothing else?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import EquinormError, describe
from equinorm._scaling import Pin, Reason
from equinorm.grouping.groups import ScaledAxis, ScaleGroup, ScaleGroups, did_you_mean, enumerated, signs
from equinorm.grouping.mappings import bias_of, other_power
from equinorm.rescaling.orbit import Orbit

AxisName = str | tuple[str, int]
"""A tensor or a module by name, or a tensor and an axis."""

Here = tuple[str, int | None]
"""A tensor by name, and an axis of it if one is meant."""

NO_CLASS = Reason("the network", "no free scale moves it")
"""Why an axis stays of which nothing else is known."""


@dataclass(frozen=True, slots=True, eq=False)
class MappingCheck:
    """What is right and wrong about a mapping; prints as sentences.

    Attributes:
        smooth: the axis whose scale is to change, as "norm.weight[0]".
        balance: the axes that are to make up for it.
        missing: axes that must move too, and that the mapping does not name.
        extra: names of the mapping that do not move with `smooth`, and what they move with instead, as a sentence.
        pinned: why channels of `smooth` cannot scale.
        unequal: axes of the mapping that would have to scale by another power than the inverse, as sentences.
        notes: what to know of a mapping that is right: channels that share one scale, channels that stay, gains written 1 + w.
            And which of the missing axes scale as `smooth` does.
        valid: may `smooth` scale, and do exactly the named axes make up for it?
    """

    smooth: str
    balance: tuple[str, ...]
    missing: tuple[ScaledAxis, ...] = field(default=())
    extra: tuple[str, ...] = ()
    pinned: tuple[Pin, ...] = ()
    notes: tuple[str, ...] = ()
    unequal: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """May it scale, and is the mapping complete and nothing too much?"""
        return not (self.missing or self.extra or self.pinned or self.unequal)

    def __bool__(self) -> bool:
        return self.valid

    def __str__(self) -> str:
        end = f"{self.smooth} → {enumerated(self.balance)}" if self.balance else self.smooth
        lines = [f"{end}: {'right' if self.valid else 'wrong'}."]
        for axis in self.missing:
            where = f", which the network uses in {enumerated(axis.uses, 3)}" if axis.uses else ""
            lines.append(f"  {axis} is missing{where}.")
        lines += [f"  {text}" for text in (*self.extra, *self.unequal)]
        lines += [f"  {self.smooth} is pinned in {pin.channels} channels by {pin.reason}." for pin in self.pinned]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def check(orbit: Orbit, groups: ScaleGroups, smooth: AxisName, balance: Iterable[AxisName]) -> MappingCheck:
    """Compare a mapping with the groups; see `GroupedOrbit.check`."""
    places = _places(orbit, balance)
    here = _smooth(orbit, groups, smooth)
    named = [tensor for tensors in places for tensor in tensors]
    wanted = [group for group in groups if any(_is_at(axis, here) for axis in (*group.up, *group.along))]
    free = [(group, _makes_up(group, here, named)) for group in wanted if not group.is_pinned]
    meant = [(group, axes) for group, axes in free if axes] or free
    taken = [axis for _, axes in meant for axis in axes]
    in_vain = [tensors[0] for tensors in places if not {axis.tensor for axis in taken} & {name for name, _ in tensors}]
    ups = [(axis, axes) for group, axes in meant for axis in group.axes if _is_at(axis, here)]

    missing = _missing(meant, here)
    extra = [_elsewhere(orbit, groups, name, axis, here) for name, axis in in_vain]
    pinned = [] if taken and _is_whole(taken) else [pin for group in wanted for pin in group.pinned_by if _is_pin(pin, here)]
    if not free and not pinned:
        pinned = [Pin(here[0], here[1] or 0, _channels(orbit, here), _reason(orbit, groups, here, named))]
    unequal = [f"{axis} {power}." for up, axes in ups for axis in axes if (power := other_power(up, axis))]
    if taken and not missing and not extra and not unequal:
        notes = _notes([group for group, _ in meant])
        notes += [f"The network adds {up.offset:g} to {up.tensor}: the sum scales." for up, _ in ups if up.offset]
    else:
        notes = [f"{axis} scales as {_text(here)} does." for axis in missing if any(_is_alike(up, axis) for up, _ in ups)]
    shown = (*dict.fromkeys([*map(str, taken), *(name for name, _ in in_vain)]),)
    return MappingCheck(_text(here), shown, (*missing,), (*extra,), (*pinned,), (*notes,), (*unequal,))


def _places(orbit: Orbit, balance: Any) -> list[list[Here]]:
    """The tensors that each name of a mapping means."""
    if isinstance(balance, str) or _is_pair(balance):
        raise EquinormError(f"balance must be a list of names. For one: [{balance!r}].")
    if not isinstance(balance, Iterable):
        raise EquinormError(f"balance must be a list of names, not {balance!r}.")
    return [_tensors(orbit, place) for place in balance]


def _missing(meant: Sequence[tuple[ScaleGroup, list[ScaledAxis]]], here: Here) -> list[ScaledAxis]:
    """Axes of the groups that the mapping does not name; biases of layers that bring scales in move along by themselves."""
    return [
        axis
        for group, axes in meant
        for axis in group.axes
        if axis not in axes and not _is_at(axis, here) and axis.tensor not in {bias_of(up.tensor) for up in group.up}
    ]


def _channels(orbit: Orbit, here: Here) -> int:
    """How many channels an axis has."""
    shape = next(scaling.shape for scaling in orbit.scalings if here[0] in scaling.names)
    return shape[here[1]] if here[1] is not None and shape else 1


def _text(here: Here) -> str:
    return here[0] if here[1] is None else f"{here[0]}[{here[1]}]"


def _is_at(axis: ScaledAxis, here: Here) -> bool:
    """Is this the axis, or the bias of the layer whose axis it is?"""
    return axis.tensor == here[0] and (here[1] is None or here[1] in axis.axes)


def _makes_up(group: ScaleGroup, here: Here, named: Sequence[Here]) -> list[ScaledAxis]:
    """The axes of a group that a mapping names: those that take scales out, and inverse ones that are named with their axis."""
    exact = [(name, axis) for name, axis in named if axis is not None]
    ups = [axis for axis in group.axes if _is_at(axis, here)]
    inverse = [axis for axis in (*group.up, *group.along) if axis not in ups and not any(_is_alike(up, axis) for up in ups)]
    return [axis for axis in group.down if _is_named(axis, named)] + [axis for axis in inverse if _is_named(axis, exact)]


def _is_alike(up: ScaledAxis, axis: ScaledAxis) -> bool:
    """Do both scale in the same direction?"""
    first = signs(up)
    return any(first.get(id, 0.0) * sign > 0 for id, sign in signs(axis).items())


def _is_named(axis: ScaledAxis, named: Sequence[Here]) -> bool:
    return any(_is_at(axis, place) for place in named)


def _smooth(orbit: Orbit, groups: ScaleGroups, smooth: AxisName) -> Here:
    """The axis that a mapping is to scale: of a module that of its weight which brings scales in."""
    tensors = _tensors(orbit, smooth)
    if len(tensors) != 1:
        names = ", ".join(name for name, _ in tensors)
        raise EquinormError(f"{smooth!r} has {len(tensors)} tensors that could scale: name one of {names}.")
    ((name, given),) = tensors
    if given is not None:
        return name, given
    axes = {axis.axes for group in groups.of(name) for axis in (*group.up, *group.along) if axis.tensor == name}
    if len(axes) > 1:
        raise EquinormError(f"{name} brings scales in along axes {sorted(axes)}: name one, as ({name!r}, 0).")
    found = next(iter(axes), (0,))
    return name, found[-1] if found else None


def _is_pair(place: object) -> bool:
    return isinstance(place, tuple) and len(place) == 2 and isinstance(place[0], str) and isinstance(place[1], int)


def _tensors(orbit: Orbit, place: AxisName) -> list[Here]:
    """What a name means: a tensor, or a module's weight, or what else the module has beside biases; with the axis, if given."""
    if not isinstance(place, str) and not _is_pair(place):
        raise EquinormError(f"a mapping names modules, tensors, or (tensor, axis), not {place!r}.")
    name, axis = (place, None) if isinstance(place, str) else place
    named = {other: scaling for scaling in orbit.scalings for other in scaling.names}
    found = [named[known] for known in (name, f"{name}.weight") if known in named][:1] or [
        s for s in orbit.scalings if s.kind == "parameter" and s.role == "weight" and s.name.startswith(f"{name}.")
    ]
    if not found:
        weights = [scaling.name for scaling in orbit.scalings if scaling.role == "weight"]
        near = sorted(other for other in weights if f".{other}".endswith(f".{name.rpartition('.')[2]}.weight"))[:4]
        near = near or get_close_matches(f"{name}.weight", weights, 4)
        raise EquinormError(f"{describe(orbit.model)} has no module or tensor {name!r} with weights.{did_you_mean(near)}")
    if axis is None:
        return [(scaling.name, None) for scaling in found]
    for scaling in found:
        rank = max(len(scaling.shape), 1)
        if not -rank <= axis < rank:
            raise EquinormError(f"{scaling.name} of shape {scaling.shape} has no axis {axis}.")
    return [(scaling.name, axis % max(len(scaling.shape), 1)) for scaling in found]


def _elsewhere(orbit: Orbit, groups: ScaleGroups, name: str, place: int | None, here: Here) -> str:
    """What a tensor moves with that the mapping names in vain."""
    others = [group for group in groups if any(_is_at(axis, (name, place)) for axis in group.down)]
    sources = [axis for group in others for axis in group.up]
    instead = ": what it reads is pinned, or not there"
    if sources:
        instead = f": it takes out what {enumerated(sources)} brings in"
    elif pins := _pins(orbit, name, place):
        instead = f": what it reads is pinned by {pins[0].reason}"
    return f"{name} does not read what {_text(here)} scales{instead}."


def _reason(orbit: Orbit, groups: ScaleGroups, here: Here, named: Sequence[Here]) -> Reason:
    """Why an axis cannot scale that brings nothing in and has no pin: what it takes out, or what pins those that read it."""
    if sources := [up for group in groups if any(_is_at(axis, here) for axis in group.down) for up in group.up]:
        return Reason("the network", f"it takes out what {enumerated(sources)} brings in")
    return next((pin.reason for name, axis in named for pin in _pins(orbit, name, axis)), NO_CLASS)


def _pins(orbit: Orbit, name: str, place: int | None) -> list[Pin]:
    """What pins the channels that a weight reads: along the axis that is named, or all behind the first."""
    return [pin for pin in orbit.pins if pin.tensor == name and (pin.axis == place if place is not None else pin.axis > 0)]


def _is_pin(pin: Pin, here: Here) -> bool:
    return pin.tensor == here[0] and (here[1] is None or pin.axis == here[1])


def _is_whole(taken: Sequence[ScaledAxis]) -> bool:
    """Does every channel that the mapping's axes read scale, with one group or another?"""
    free: dict[str, Tensor] = {}
    for axis in taken:
        free[str(axis)] = free.get(str(axis), torch.zeros_like(axis.ids, dtype=torch.bool)) | (axis.ids > 0)
    return all(bool(mask.all()) for mask in free.values())


def _notes(groups: Sequence[ScaleGroup]) -> list[str]:
    """Channels that are not meant, and axes on which several channels share one scale."""
    found = []
    for place, axis in enumerate(axis for group in groups for axis in (*group.up, *group.down)):
        ids = axis.ids[axis.ids > 0]
        if not place and ids.numel() < axis.ids.numel():
            found.append(f"{ids.numel()} of {axis.ids.numel()} channels of {axis} are meant.")
        if (most := int(ids.bincount().max())) > 1:
            found.append(f"{ids.numel()} channels of {axis} share {len(ids.unique())} scales, up to {most} each.")
    return found
