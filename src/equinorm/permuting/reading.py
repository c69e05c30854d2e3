"""From axes in parts to plain data: families of channels, where they stand, what is pinned; and places after a permutation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from equinorm._scaling import Reason
from equinorm.discovery.labels import numbered
from equinorm.discovery.values import Source
from equinorm.permuting.atoms import Atom, Axis, Sum, atoms, resolved, size_of
from equinorm.permuting.dependence import Dependence
from equinorm.permuting.families import AxisPart, AxisPin, ChannelFamily
from equinorm.permuting.laws.contraction import KERNEL


def families(axes: Mapping[Source, Sequence[Axis]], dependence: Dependence) -> tuple[list[Atom], tuple[ChannelFamily, ...]]:
    """The free atoms of the model's tensors, and what is known of each."""
    found: dict[Atom, list[AxisPart]] = {}
    for source, own in axes.items():
        for place, axis in enumerate(own):
            whole = resolved(axis)
            for atom, offset, inner, outer in _parts(whole, 0, 1, ()):
                if atom.pinned is None:
                    part = AxisPart(
                        source.names[0], place, atom.size, offset, inner, outer, len(whole) == 1 and whole[0] is atom
                    )
                    found.setdefault(atom, []).append(part)
    names: dict[str, int] = {}
    result = []
    for atom, parts in found.items():
        first = f"{parts[0].tensor}[{parts[0].axis}]"
        names[first] = names.get(first, 0) + 1
        name = first if names[first] == 1 else f"{first}.{names[first]}"
        within = tuple(other.size for other in dependence.of(atom))
        result.append(ChannelFamily(name, atom.size, within, tuple(parts)))
    return list(found), tuple(result)


def _parts(
    axis: Axis, offset: int, inner: int, outer: tuple[tuple[int, int], ...]
) -> Iterator[tuple[Atom, int, int, tuple[tuple[int, int], ...]]]:
    """Every atom of an axis, where it begins, its entries in a row, and the loops around it."""
    for place, factor in enumerate(axis):
        own = inner * size_of(axis[place + 1 :])
        count = size_of(axis[:place])
        loops = (*outer, (count, factor.size * own)) if count > 1 else outer
        if isinstance(factor, Atom):
            yield factor, offset, own, loops
            continue
        start = offset
        for term in factor.terms:
            yield from _parts(resolved(term), start, own, loops)
            start += size_of(term) * own


def pins(axes: Mapping[Source, Sequence[Axis]]) -> tuple[AxisPin, ...]:
    """What cannot be permuted, and why; axes of kernels are no channels. Channels that are read one by one stay too."""
    found: list[AxisPin] = []
    for source, own in axes.items():
        for place, axis in enumerate(own):
            reasons: dict = {}
            for atom in atoms(axis):
                if atom.pinned is not None and atom.pinned.detail != KERNEL:
                    reasons[atom.pinned] = reasons.get(atom.pinned, 0) + atom.size
            for reason in _alone(axis):
                reasons[reason] = reasons.get(reason, 0) + 1
            found += [AxisPin(source.names[0], place, count, reason) for reason, count in reasons.items()]
    return tuple(found)


def _alone(axis: Axis) -> Iterator[Reason]:
    """For each channel that is cut off by itself, the operation that did so."""
    for factor in resolved(axis):
        if isinstance(factor, Sum):
            for term in map(resolved, factor.terms):
                if not term and factor.reason is not None:
                    yield replace(factor.reason, detail="reads one channel by itself")
                yield from _alone(term)


class Order(NamedTuple):
    """New orders of one atom's channels, one for each place of the atoms around it."""

    around: tuple[Atom, ...]
    channels: Tensor


def places(axes: Sequence[Axis], orders: Mapping[Atom, Order]) -> list[Tensor | None]:
    """For each axis, which entry comes to each place: of shapes that broadcast to the tensor's; None where nothing moves."""
    own = [resolved(axis) for axis in axes]
    coordinates = [_split(axis, numbered(size_of(axis), place, len(own))) for place, axis in enumerate(own)]
    found: list[Tensor | None] = []
    for place, axis in enumerate(own):
        if not any(atom in orders for atom in atoms(axis)):
            found.append(None)
            continue
        around = {
            factor: coordinate
            for at, other in enumerate(own)
            if at != place
            for factor, coordinate in zip(other, coordinates[at], strict=True)
            if isinstance(factor, Atom)
        }
        found.append(_image(axis, numbered(size_of(axis), place, len(own)), around, orders))
    return found


def _split(axis: Axis, positions: Tensor) -> list[Tensor]:
    """The coordinate of each factor at positions of their product."""
    found: list[Tensor] = []
    for factor in reversed(axis):
        found.append(positions % factor.size)
        positions = positions // factor.size
    return found[::-1]


def _image(axis: Axis, positions: Tensor, around: Mapping[Atom, Tensor], orders: Mapping[Atom, Order]) -> Tensor:
    """Where the entries come from that are at these positions of an axis afterwards."""
    axis = resolved(axis)
    coordinates = _split(axis, positions)
    around = {**around, **{f: c for f, c in zip(axis, coordinates, strict=True) if isinstance(f, Atom)}}
    result = torch.zeros((), dtype=torch.int64)
    for factor, coordinate in zip(axis, coordinates, strict=True):
        if isinstance(factor, Sum):
            moved = _image_of_sum(factor, coordinate, around, orders)
        elif factor in orders:
            order = orders[factor]
            moved = order.channels[(*(around[other] for other in order.around), coordinate)]
        else:
            moved = coordinate
        result = result * factor.size + moved
    return result


def _image_of_sum(factor: Sum, coordinate: Tensor, around: Mapping[Atom, Tensor], orders: Mapping[Atom, Order]) -> Tensor:
    moved, start = coordinate, 0
    for term in factor.terms:
        size = size_of(term)
        if any(atom in orders for atom in atoms(term)):
            inside = (coordinate - start).clamp(0, size - 1)
            is_here = (coordinate >= start) & (coordinate < start + size)
            moved = torch.where(is_here, start + _image(term, inside, around, orders), moved)
        start += size
    return moved
