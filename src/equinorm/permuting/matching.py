"""Which channels of one network are which of another: by fingerprints that no permutation changes.

A channel's fingerprint sums its weights, each times random numbers for the places in pinned axes that it stands at and times
the fingerprints of the other channels that it joins. A few rounds tell apart all channels that weights tell apart; as in the
refinement of colours of Weisfeiler and Leman, with numbers for colours, so that rounding changes them little.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equinorm.permuting.atoms import Atom, Axis, Sum, resolved, size_of

FEATURES, ROUNDS = 6, 5
"""Numbers of a fingerprint, and rounds in which it is refined."""


class Occurrence(NamedTuple):
    """Where a free atom stands in a tensor: its channel at each entry, −1 where it has none; of a shape that broadcasts."""

    atom: Atom
    channels: Tensor


class Standing(NamedTuple):
    """What stands at each entry of a tensor.

    Attributes:
        fixed: for each axis, the place of each entry as far as no permutation changes it.
        occurrences: of free atoms.
    """

    fixed: list[Tensor]
    occurrences: list[Occurrence]


def standing(axes: Sequence[Axis], around: Mapping[Atom, tuple[Atom, ...]]) -> Standing:
    """What stands at each entry of a tensor with these axes.

    Args:
        axes: in parts.
        around: for each free atom, those at each place of which its order may be another one.
    """
    own = [resolved(axis) for axis in axes]
    rank = len(own)
    lines = [torch.arange(size_of(axis)).reshape([-1 if a == p else 1 for a in range(rank)]) for p, axis in enumerate(own)]
    tops: list[dict[Atom, Tensor]] = [_coordinates(axis, line) for axis, line in zip(own, lines, strict=True)]
    found, fixed = list[Occurrence](), list[Tensor]()
    for place, (axis, line) in enumerate(zip(own, lines, strict=True)):
        others = {atom: at for top in (*tops[:place], *tops[place + 1 :]) for atom, at in top.items()}
        fixed.append(_stand(axis, line, torch.ones_like(line, dtype=torch.bool), others, (around, found)))
    return Standing(fixed, found)


def _coordinates(axis: Axis, positions: Tensor) -> dict[Atom, Tensor]:
    """Coordinates of the atoms that have one everywhere on an axis."""
    found: dict[Atom, Tensor] = {}
    for factor in reversed(axis):
        if isinstance(factor, Atom):
            found[factor] = positions % factor.size
        positions = positions // factor.size
    return found


def _stand(
    axis: Axis,
    positions: Tensor,
    is_here: Tensor,
    others: Mapping[Atom, Tensor],
    into: tuple[Mapping[Atom, tuple[Atom, ...]], list[Occurrence]],
) -> Tensor:
    """Enter the atoms of an axis; returns the fixed part of each position."""
    around, found = into
    axis = resolved(axis)
    known = {**others, **_coordinates(axis, positions)}
    fixed, block = torch.zeros_like(positions), 1
    for factor in reversed(axis):
        coordinate, positions = positions % factor.size, positions // factor.size
        if isinstance(factor, Sum):
            start, within = 0, torch.zeros_like(coordinate)
            for term in factor.terms:
                size = size_of(term)
                inside = is_here & (coordinate >= start) & (coordinate < start + size)
                part = _stand(term, (coordinate - start).clamp(0, size - 1), inside, known, into)
                within = torch.where(inside, start + part, within)
                start += size
            fixed = fixed + within * block
        elif factor in around:
            channel = coordinate
            if around[factor]:
                channel = torch.zeros_like(coordinate)
                for other in around[factor]:
                    channel = channel * other.size + known[other]
                channel = channel * factor.size + coordinate
            found.append(Occurrence(factor, torch.where(is_here, channel, -1)))
        else:
            fixed = fixed + coordinate * block
        block *= factor.size
    return fixed


def fingerprints(
    tensors: Sequence[Tensor], standings: Sequence[Standing], sizes: Mapping[Atom, int], seed: int = 0
) -> dict[Atom, Tensor]:
    """Fingerprints of every channel, of shape (channels, features).

    Args:
        tensors: float64.
        standings: of each.
        sizes: number of channels of each atom, those at each place around it counted apart.
        seed: of the random numbers; the same for networks to be matched.
    """
    colours = {atom: torch.ones(size, FEATURES, dtype=torch.float64) for atom, size in sizes.items()}
    for number in range(ROUNDS):
        generator = torch.Generator().manual_seed(seed + number)
        sums = {atom: torch.zeros(size, FEATURES, dtype=torch.float64) for atom, size in sizes.items()}
        for tensor, stand in zip(tensors, standings, strict=True):
            tables = [torch.randn(size, FEATURES, generator=generator, dtype=torch.float64) for size in tensor.shape]
            constant = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
            if stand.occurrences:
                for feature in range(FEATURES):
                    _add(tensor, stand, [t[:, feature] for t in tables], constant[feature], feature, (colours, sums))
        for atom, total in sums.items():
            spread = (total - total.mean(0)) / total.std(0, correction=0).clamp_min(1e-300)
            colours[atom] = 1 + 0.5 * torch.tanh(spread + 0.3 * (colours[atom] - 1))
    return colours


def _add(
    tensor: Tensor,
    stand: Standing,
    tables: Sequence[Tensor],
    constant: Tensor,
    feature: int,
    into: tuple[Mapping[Atom, Tensor], Mapping[Atom, Tensor]],
) -> None:
    """Add what a tensor says of each channel that stands in it."""
    colours, sums = into
    values = tensor + constant * tensor.square()
    if _is_along_lines(tensor, stand):
        _add_lines(values, stand, tables, feature, into)
        return
    for table, fixed in zip(tables, stand.fixed, strict=True):
        values = values * table[fixed]
    for place, (atom, channels) in enumerate(stand.occurrences):
        message = values
        for at, (other, of) in enumerate(stand.occurrences):
            if at != place:
                message = message * torch.where(of >= 0, colours[other][of.clamp_min(0), feature], 1.0)
        whole = channels.expand(tensor.shape)
        here = whole >= 0
        sums[atom][:, feature].index_add_(0, whole[here], message[here])


def _is_along_lines(tensor: Tensor, stand: Standing) -> bool:
    """Does every channel stand at places of one axis, wherever it is in the others?"""
    return all(max(channels.shape) == channels.numel() for _, channels in stand.occurrences) and tensor.dim() > 0


def _add_lines(
    values: Tensor,
    stand: Standing,
    tables: Sequence[Tensor],
    feature: int,
    into: tuple[Mapping[Atom, Tensor], Mapping[Atom, Tensor]],
) -> None:
    """The same by products of the tensor with one vector for each axis."""
    colours, sums = into
    rank = values.dim()
    factors: list[list[Tensor]] = [[table[fixed.flatten()]] for table, fixed in zip(tables, stand.fixed, strict=True)]
    places = []
    for atom, channels in stand.occurrences:
        axis = next((axis for axis in range(rank) if channels.shape[axis] > 1), 0)
        line = channels.flatten()
        factors[axis].append(torch.where(line >= 0, colours[atom][line.clamp_min(0), feature], 1.0))
        places.append((axis, len(factors[axis]) - 1, line))
    vectors = [math.prod(own[1:], start=own[0]) for own in factors]
    sides: dict[int, Tensor] = {}
    for (atom, _), (axis, number, line) in zip(stand.occurrences, places, strict=True):
        if axis not in sides:
            rest = values
            for other in reversed(range(rank)):
                if other != axis:
                    rest = rest.movedim(other, -1) @ vectors[other]
            sides[axis] = rest
        message = sides[axis]
        for at, factor in enumerate(factors[axis]):
            message = message if at == number else message * factor
        here = line >= 0
        sums[atom][:, feature].index_add_(0, line[here], message[here])


def nearest(ours: Tensor, theirs: Tensor) -> Tensor:
    """For each of their channels the one of ours whose fingerprint is nearest, each of ours once; nearest pairs first."""
    distances = torch.cdist(theirs, ours)
    best = distances.argmin(1)
    if len(best.unique()) == len(best):
        return best
    order = torch.full((len(best),), -1)
    is_free = torch.ones(len(best), dtype=torch.bool)
    for pair in distances.flatten().argsort().tolist():
        row, column = divmod(pair, len(best))
        if order[row] < 0 and is_free[column]:
            order[row], is_free[column] = column, False
    return order


def match(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    axes: Sequence[Sequence[Axis]],
    atoms: Sequence[Atom],
    around: Sequence[tuple[Atom, ...]],
) -> tuple[Tensor, ...]:
    """For each atom the order of our channels that comes nearest to theirs.

    Args:
        ours: tensors of one network.
        theirs: of the other.
        axes: of each tensor, in parts.
        atoms: that may be permuted.
        around: for each, those at each place of which its order may be another one.
    """
    places = dict(zip(atoms, around, strict=True))
    shapes = {atom: (*(other.size for other in outer), atom.size) for atom, outer in places.items()}
    sizes = {atom: int(torch.Size(shape).numel()) for atom, shape in shapes.items()}
    stands = [standing(own, places) for own in axes]
    one, other = (fingerprints([t.double() for t in tensors], stands, sizes) for tensors in (ours, theirs))
    orders: dict[Atom, Tensor] = {}
    for atom in sorted(places, key=lambda atom: atom.order):  # those around it first
        shape = shapes[atom]
        left, right = (colours[atom].reshape(*shape, FEATURES) for colours in (one, other))
        if not places[atom]:
            orders[atom] = nearest(left, right)
            continue
        order = torch.zeros(shape, dtype=torch.int64)
        for index in torch.cartesian_prod(*(torch.arange(size) for size in shape[:-1])).reshape(-1, len(shape) - 1).tolist():
            of = _origin(places[atom], index, orders, places)
            order[tuple(index)] = nearest(left[tuple(of)], right[tuple(index)])
        orders[atom] = order
    return tuple(orders[atom] for atom in atoms)


def _origin(
    outer: Sequence[Atom], index: Sequence[int], orders: Mapping[Atom, Tensor], places: Mapping[Atom, tuple[Atom, ...]]
) -> list[int]:
    """Where the channels at a place come from."""
    at = dict(zip(outer, index, strict=True))
    found = []
    for atom in outer:
        if atom in orders:
            found.append(int(orders[atom][(*(at[other] for other in places[atom]), at[atom])]))
        else:
            found.append(at[atom])
    return found
