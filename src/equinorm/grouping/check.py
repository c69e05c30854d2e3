"""Is a mapping right: does all that reads what a layer gives take its scale out, and nothing else?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equinorm._errors import EquinormError, describe
from equinorm._scaling import Pin, Reason
from equinorm.grouping.groups import ScaledAxis, ScaleGroup, ScaleGroups, enumerated
from equinorm.rescaling.orbit import Orbit

AxisName = str | tuple[str, int]
"""A tensor or a module by name, or a tensor and an axis."""

NO_CLASS = Reason("the network", "no free scale moves it")
"""Why an axis stays that brings nothing into an activation."""


@dataclass(frozen=True, slots=True, eq=False)
class MappingCheck:
    """What is right and wrong about a mapping; prints as sentences.

    Attributes:
        smooth: the axis whose scale is to change, as "norm.weight[0]".
        balance: the axes that are to make up for it.
        missing: axes that must move too, and that the mapping does not name.
        extra: names of the mapping that do not move with `smooth`, and what they move with instead, as a sentence.
        pinned: why channels of `smooth` cannot scale.
        notes: what to know of a mapping that is right: channels that share one scale, channels that stay.
        valid: may `smooth` scale, and do exactly the named axes make up for it?
    """

    smooth: str
    balance: tuple[str, ...]
    missing: tuple[ScaledAxis, ...] = field(default=())
    extra: tuple[str, ...] = ()
    pinned: tuple[Pin, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """May it scale, and is the mapping complete and nothing too much?"""
        return not (self.missing or self.extra or self.pinned)

    def __bool__(self) -> bool:
        return self.valid

    def __str__(self) -> str:
        end = f"{self.smooth} → {enumerated(self.balance)}" if self.balance else self.smooth
        lines = [f"{end}: {'right' if self.valid else 'wrong'}."]
        for axis in self.missing:
            where = f", which the network uses in {enumerated(axis.uses, 3)}" if axis.uses else ""
            lines.append(f"  {axis} is missing{where}.")
        lines += [f"  {text}" for text in self.extra]
        lines += [f"  {self.smooth} is pinned in {pin.channels} channels by {pin.reason}." for pin in self.pinned]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def check(orbit: Orbit, groups: ScaleGroups, smooth: AxisName, balance: Iterable[AxisName]) -> MappingCheck:
    """Compare a mapping with the groups; see `GroupedOrbit.check`."""
    if isinstance(balance, str):
        raise EquinormError(f"balance must be a list of names. For one: [{balance!r}].")
    here = _smooth(orbit, groups, smooth)
    places = [(place, _tensors(orbit, place)) for place in balance]
    named = [(name, place) for place, names in places for name in names]
    wanted = [group for group in groups if any(_is_at(axis, here) for axis in (*group.up, *group.along))]
    free = [group for group in wanted if not group.is_pinned]
    read = [group for group in free if any(_is_named(axis, named) for axis in group.down)]
    meant = read or free
    taken = [axis for group in meant for axis in group.down if _is_named(axis, named)]
    missing = [
        axis for group in meant for axis in (*group.up, *group.down) if not _is_at(axis, here) and not _is_named(axis, named)
    ]
    in_vain = [(names[0], place) for place, names in places if not {axis.tensor for axis in taken} & {*names}]
    extra = [_elsewhere(groups, name, place, here) for name, place in in_vain]
    pinned = [] if read and _is_whole(taken) else [pin for group in wanted for pin in group.pinned_by if _is_pin(pin, here)]
    if not free and not pinned:
        pinned = [Pin(here[0], here[1] or 0, _channels(orbit, here), NO_CLASS)]
    notes = _notes(meant) if read and not missing and not extra else []
    shown = dict.fromkeys([*map(str, taken), *(name for name, _ in in_vain)])
    return MappingCheck(_text(here), (*shown,), tuple(missing), tuple(extra), tuple(pinned), tuple(notes))


Here = tuple[str, int | None]


def _channels(orbit: Orbit, here: Here) -> int:
    """How many channels an axis has."""
    shape = next(scaling.shape for scaling in orbit.scalings if here[0] in scaling.names)
    return shape[here[1]] if here[1] is not None and shape else 1


def _text(here: Here) -> str:
    return here[0] if here[1] is None else f"{here[0]}[{here[1]}]"


def _is_at(axis: ScaledAxis, here: Here) -> bool:
    """Is this the axis, or the bias of the layer whose axis it is?"""
    return axis.tensor == here[0] and (here[1] is None or here[1] in axis.axes)


def _is_named(axis: ScaledAxis, named: Sequence[tuple[str, AxisName]]) -> bool:
    return any(name == axis.tensor and (isinstance(place, str) or place[1] in axis.axes) for name, place in named)


def _smooth(orbit: Orbit, groups: ScaleGroups, smooth: AxisName) -> Here:
    """The axis that a mapping is to scale: of a module that of its weight which brings scales in."""
    names = _tensors(orbit, smooth)
    if len(names) != 1:
        raise EquinormError(f"{smooth!r} has {len(names)} tensors that could scale: name one of {', '.join(names)}.")
    (name,) = names
    if not isinstance(smooth, str):
        return name, smooth[1]
    axes = {axis.axes for group in groups.of(name) for axis in (*group.up, *group.along) if axis.tensor == name}
    if len(axes) > 1:
        raise EquinormError(f"{name} brings scales in along axes {sorted(axes)}: name one, as ({name!r}, 0).")
    found = next(iter(axes), (0,))
    return name, found[-1] if found else None


def _tensors(orbit: Orbit, place: AxisName) -> list[str]:
    """The tensors that a name means: itself, or a module's weight, or what else the module has beside biases."""
    is_pair = isinstance(place, tuple) and len(place) == 2 and isinstance(place[0], str) and isinstance(place[1], int)
    if not isinstance(place, str) and not is_pair:
        raise EquinormError(f"a mapping names modules, tensors, or (tensor, axis), not {place!r}.")
    name = place if isinstance(place, str) else place[0]
    first = {other: scaling for scaling in orbit.scalings for other in scaling.names}
    if name in first:
        rank, axis = len(first[name].shape), 0 if isinstance(place, str) else place[1]
        if not 0 <= axis < max(rank, 1):
            raise EquinormError(f"{name} of shape {first[name].shape} has no axis {axis}.")
        return [first[name].name]
    if f"{name}.weight" in first:
        return [first[f"{name}.weight"].name]
    inside = [s.name for s in orbit.scalings if s.kind == "parameter" and s.role == "weight" and s.name.startswith(f"{name}.")]
    if not inside:
        near = sorted({s.name for s in orbit.scalings if s.name.endswith(name.rpartition(".")[2] + ".weight")})[:4]
        hint = f" Did you mean {enumerated(near)}?" if near else ""
        raise EquinormError(f"{describe(orbit.model)} has no module or tensor {name!r} with weights.{hint}")
    return inside


def _elsewhere(groups: ScaleGroups, name: str, place: AxisName, here: Here) -> str:
    """What a tensor moves with that the mapping names in vain."""
    others = [group for group in groups.of(name) if any(axis.tensor == name for axis in group.down)]
    if not isinstance(place, str):
        others = [g for g in others if any(axis.tensor == name and place[1] in axis.axes for axis in g.down)]
    sources = [axis for group in others for axis in group.up]
    instead = f": it takes out what {enumerated(sources)} brings in" if sources else ": what it reads is pinned, or not there"
    return f"{name} does not read what {_text(here)} scales{instead}."


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
