"""From scalings, families, pins and values to scale groups."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._scaling import Pin, Reason, Scaling
from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.grouping.groups import Activation, ScaledAxis, ScaleGroup, ScaleGroups
from equinorm.rescaling.orbit import Orbit

CHOICES = ("aten.index", "aten.index_select", "aten.gather")
"""Operations that choose rows of a parameter by data: what they give is a part of it, not yet an activation."""

Carried = Mapping[int, frozenset[float]]
"""The exponents of each group in a value."""


@dataclass(frozen=True, slots=True, eq=False)
class _Move:
    """How a group moves one tensor along some axes."""

    scaling: Scaling
    axes: tuple[int, ...]
    ids: Tensor
    exponents: Tensor

    @property
    def goes_along(self) -> bool:
        """Is it a bias or a buffer, which moves with what the layer gives?"""
        return self.scaling.role == "bias" or self.scaling.kind == "buffer"

    @property
    def sign(self) -> float:
        """Of its exponents; 0 where they differ."""
        return float(self.exponents.sum().sign()) if len({*self.exponents.sign().flatten().tolist()} - {0.0}) == 1 else 0.0


def groups(orbit: Orbit, values: InnerValues) -> ScaleGroups:
    """The groups of an orbit: those with free classes in the order of these, then those that are pinned.

    Args:
        orbit: scalings, families and pins.
        values: how the values inside the network scale.
    """
    number = _numbering(orbit.scalings, orbit.num_free)
    moves = _moves(orbit.scalings, number)
    carried = {value.name: _carried(value, number) for value in values if not value.parameters}
    uses = _uses(values)
    pins: dict[tuple[str, int], list[Pin]] = {}
    for pin in orbit.pins:
        pins.setdefault((pin.tensor, pin.axis), []).append(pin)
    bearers: dict[int, list[Activation]] = {}
    for value in values:
        for group in carried.get(value.name, ()):
            bearers.setdefault(group, []).append(Activation(value.name, _reason(value), value.shape))
    found = []
    for group, parts in moves.items():
        up, down, along = [], [], []
        for move, brings_in in zip(parts, _directions(parts, group, uses, carried), strict=True):
            used = tuple(_reason(value) for value in uses.get(move.scaling.name, ()))
            axis = ScaledAxis(move.scaling.name, move.axes, move.ids, move.exponents, used, move.scaling.offset)
            (along if move.goes_along else up if brings_in else down).append(axis)
        ids = torch.unique(torch.cat([move.ids.flatten() for move in parts]))
        held = [pin for axis in (*up, *along) if len(axis.axes) == 1 for pin in pins.pop((axis.tensor, axis.axes[0]), ())]
        found.append(ScaleGroup(tuple(up), tuple(down), tuple(along), tuple(bearers.get(group, ())), ids[ids > 0], tuple(held)))
    found.sort(key=lambda group: int(group.ids[0]))
    shapes = {name: scaling for scaling in orbit.scalings for name in scaling.names}
    pinned = [_pinned(key, held, shapes, uses) for key, held in pins.items()]
    return ScaleGroups([*found, *pinned], {name: scaling.name for name, scaling in shapes.items()})


def _pinned(
    key: tuple[str, int], pins: Sequence[Pin], scalings: Mapping[str, Scaling], uses: Mapping[str, list[InnerValue]]
) -> ScaleGroup:
    """A group of which nothing can scale."""
    tensor, axis = key
    shape = scalings[tensor].shape
    ids = torch.zeros([size if place == axis else 1 for place, size in enumerate(shape)], dtype=torch.long)
    used = tuple(_reason(value) for value in uses.get(tensor, ()))
    here = ScaledAxis(tensor, (axis,) if shape else (), ids, torch.zeros(ids.shape, dtype=torch.float64), used)
    return ScaleGroup((here,), (), (), (), torch.zeros(0, dtype=torch.long), tuple(pins))


def _numbering(scalings: Sequence[Scaling], num_free: int) -> Tensor:
    """The number of the group of each class, by its id; −1 for id 0. Classes that move exactly the same axes are one group.

    Each axis has a random number, and a class the sum of those that it moves: equal sums, equal axes.
    """
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(num_free + 1, dtype=torch.long)
    keys: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for scaling in scalings:
        for _, ids in scaling.factors:
            key = scaling.name, _axes(ids, scaling.shape)
            if key not in keys:
                keys[key] = torch.randint(1 << 62, (), generator=generator)
            sums[torch.unique(ids)] += keys[key]
    number = torch.unique(sums, return_inverse=True)[1]
    number[0] = -1
    return number


def _moves(scalings: Sequence[Scaling], number: Tensor) -> dict[int, list[_Move]]:
    """How each group moves each tensor. Factors of one axis that move other entries of it are joined."""
    found: dict[int, list[_Move]] = {}
    for scaling in scalings:
        for exponent, ids in scaling.factors:
            owner = number[ids]
            for group in _distinct(owner):
                own = torch.where(owner == group, ids, 0)
                new = _Move(scaling, _axes(ids, scaling.shape), own, torch.where(own > 0, exponent, 0.0).double())
                parts = found.setdefault(group, [])
                twin = next((i for i, move in enumerate(parts) if _is_beside(move, new)), None)
                if twin is None:
                    parts.append(new)
                else:
                    old = parts[twin]
                    parts[twin] = _Move(scaling, old.axes, old.ids + new.ids, old.exponents + new.exponents)
    return found


def _is_beside(one: _Move, other: _Move) -> bool:
    """Do both move the same axes of a tensor, and no entry twice?"""
    if one.scaling is not other.scaling or one.axes != other.axes or one.ids.shape != other.ids.shape:
        return False
    return not bool(((one.ids > 0) & (other.ids > 0)).any())


def _axes(ids: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Along which ids differ; of a single class the one axis of a single channel, if there is one."""
    single = [axis for axis, size in enumerate(shape) if size == 1]
    return tuple(axis for axis in range(ids.dim()) if ids.size(axis) > 1) or tuple(single if len(single) == 1 else ())


def _distinct(numbers: Tensor) -> list[int]:
    return [number for number in torch.unique(numbers).tolist() if number >= 0]


def _carried(value: InnerValue, number: Tensor) -> Carried:
    """The groups that scale a value, with their exponents."""
    scaling = value.scaling
    found: dict[int, set[float]] = {}
    for exponent, ids in scaling.factors if scaling is not None else ():
        for group in _distinct(number[torch.unique(ids)]):
            found.setdefault(group, set()).add(exponent)
    return {group: frozenset(exponents) for group, exponents in found.items()}


def _uses(values: InnerValues) -> dict[str, list[InnerValue]]:
    """Where each parameter meets an activation."""
    shown = {value.name: value.parameters for value in values if value.parameters}
    found: dict[str, list[InnerValue]] = {}
    for value in values:
        if not value.parameters:
            for parameter in dict.fromkeys(name for read in value.reads.values() for name in shown.get(read, ())):
                found.setdefault(parameter, []).append(value)
    return found


def _directions(
    moves: Sequence[_Move], group: int, uses: Mapping[str, list[InnerValue]], carried: Mapping[str, Carried]
) -> list[bool]:
    """Which of these tensors bring the scales of a group into an activation; the others take them out.

    Where activations do not tell, as those that data choose do not, the sign of the exponent does, beside one of which they do.
    """
    known = [None if move.goes_along else _brings_in(move, group, uses.get(move.scaling.name, ()), carried) for move in moves]
    votes = sum(
        move.sign * (1 if brings_in else -1) for move, brings_in in zip(moves, known, strict=True) if brings_in is not None
    )
    side = -1 if votes < 0 else 1
    return [
        bool(move.sign * side > 0) if brings_in is None else brings_in for move, brings_in in zip(moves, known, strict=True)
    ]


def _brings_in(move: _Move, group: int, uses: Iterable[InnerValue], carried: Mapping[str, Carried]) -> bool | None:
    """Does a parameter bring the scales of a group into an activation (or take them out)? None if activations do not tell.

    It does where what an operation gives carries them and what it reads does not, and does not the other way round. Where
    both carry them, as on a residual stream, the exponents tell.
    """
    for read, given in _around(uses, carried):
        if (group in given) != (group in read):
            return group in given
        exponents = {*move.exponents[move.ids > 0].tolist()}
        out = exponents <= given.get(group, frozenset())
        back = {-exponent for exponent in exponents} <= read.get(group, frozenset())
        if out != back:
            return out
    return None


def _around(uses: Iterable[InnerValue], carried: Mapping[str, Carried]) -> Iterator[tuple[Carried, Carried]]:
    """What scales the activations that an operation reads, and what it gives."""
    for value in uses:
        if value.operator in CHOICES:
            continue
        read: dict[int, frozenset[float]] = {}
        for name in value.reads.values():
            if name in carried:
                for group, exponents in carried[name].items():
                    read[group] = read.get(group, frozenset()) | exponents
        yield read, carried[value.name]


def _reason(value: InnerValue) -> Reason:
    return Reason(value.operator, "", value.source, "", value.module)
