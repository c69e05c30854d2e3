"""Which channels of one network are which of another: by fingerprints that no permutation changes.

A channel's fingerprint sums its weights, each times random numbers for the places in pinned axes that it stands at and times
the fingerprints of the other channels that it joins. A few rounds tell apart all channels that weights tell apart; as in the
refinement of colours of Weisfeiler and Leman, with numbers for colours, so that rounding changes them little.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from equinorm.permuting.arrangement import shapes_of
from equinorm.permuting.atoms import Atom
from equinorm.permuting.layout import Layout
from equinorm.permuting.pieces import Piece, pieces

FEATURES, ROUNDS = 6, 5
"""Numbers of a fingerprint, and rounds in which it is refined."""

TIE = 1e-9
"""Fingerprints, numbers from ½ to 1½, that are nearer than this are taken for those of channels that are alike."""

_LETTERS = "abcdefghijklmnopqrstuvwxy"
"""Of the axes of a piece; z counts features."""

Tensors = Mapping[str, Tensor]

Shapes = Mapping[Atom, tuple[int, ...]]
"""Of each free atom: sizes of the atoms around it, then its own."""


def fingerprints(
    tensors: Sequence[Tensor],
    parts: Sequence[Piece],
    places: Mapping[Atom, tuple[Atom, ...]],
    shapes: Shapes,
) -> dict[Atom, Tensor]:
    """Fingerprints of every channel, of shape (*places around it, channels, features).

    Args:
        tensors: of one network.
        parts: their pieces.
        places: for each free atom, those at each place of which its order may be another one.
        shapes: of each.
    """
    values = [_with_squares(tensor.double().contiguous()) for tensor in tensors]
    colours = {atom: torch.ones(*shape, FEATURES, dtype=torch.float64) for atom, shape in shapes.items()}
    for number in range(ROUNDS):
        generator = torch.Generator().manual_seed(number)  # the same for networks to be matched
        sums = {atom: torch.zeros(*shape, FEATURES, dtype=torch.float64) for atom, shape in shapes.items()}
        for piece in parts:
            tables = [torch.randn(atom.size, FEATURES, generator=generator, dtype=torch.float64) for atom in piece.atoms]
            _add(piece.of(values[piece.tensor]), piece, dict(piece.axes_of(places)), tables, (colours, sums))
        for atom, total in sums.items():
            flat, old = total.reshape(-1, FEATURES), colours[atom].reshape(-1, FEATURES)
            spread = (flat - flat.mean(0)) / flat.std(0, correction=0).clamp_min(1e-300)
            colours[atom] = (1 + 0.5 * torch.tanh(spread + 0.3 * (old - 1))).reshape(total.shape)
    return colours


def _with_squares(tensor: Tensor) -> Tensor:
    """w + w² / rms(w), whose sums tell apart what has the same sum."""
    return torch.addcmul(tensor, tensor, tensor, value=1 / max(float(tensor.square().mean().sqrt()), 1e-150))


def _add(
    view: Tensor,
    piece: Piece,
    free: Mapping[int, tuple[int, ...]],
    tables: Sequence[Tensor],
    into: tuple[Mapping[Atom, Tensor], Mapping[Atom, Tensor]],
) -> None:
    """Add what a piece says of each channel that stands in it; pinned axes, which say the same to all, are summed first."""
    colours, sums = into
    letters, feature = _LETTERS[: view.dim()], ""
    outside = {at for around in free.values() for at in around} - {*free}
    pinned = [axis for axis in range(view.dim()) if axis not in free and axis not in outside]
    left = "".join(letter for axis, letter in enumerate(letters) if axis not in pinned)
    if pinned:
        names = ["".join(letters[axis] for axis in pinned), *(letters[axis] for axis in pinned)]
        table = torch.einsum(f"{','.join(f'{name}z' for name in names[1:])}->{names[0]}z", *(tables[axis] for axis in pinned))
        view, feature = torch.einsum(f"{letters},{names[0]}z->{left}z", view, table), "z"
    for axis in outside:
        view, feature = torch.einsum(f"{left}{feature},{letters[axis]}z->{left}z", view, tables[axis]), "z"
    if not feature and len(free) == 1:
        view, feature = view[..., None].expand(*view.shape, FEATURES), "z"
    names = {axis: "".join(letters[at] for at in (*around, axis)) for axis, around in free.items()}
    for axis, target in names.items():
        others = [(name, colours[piece.atoms[at]]) for at, name in names.items() if at != axis]
        equation = ",".join([f"{left}{feature}", *(f"{name}z" for name, _ in others)])
        sums[piece.atoms[axis]].add_(torch.einsum(f"{equation}->{target}z", view, *(factor for _, factor in others)))


_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Distances, squared or not, that are nearer than this part of the largest in the row are equal."""


def paired(distances: Tensor) -> Tensor:
    """For each row the column that is nearest, each once: nearest pairs first, and its own place before others as near."""
    near = distances + _ROUNDING[distances.dtype] * distances.abs().amax(1, keepdim=True)
    own = distances.diagonal()
    stays = (own <= near.amin(1)) & (own <= near.amin(0))
    order = torch.where(stays, torch.arange(len(own)), -1)
    rows = columns = (~stays).nonzero()[:, 0]
    distances = distances[rows][:, columns]
    while len(rows):  # pairs that are nearest to each other; there always is one
        column, row = distances.argmin(1), distances.argmin(0)
        is_mutual = row[column] == torch.arange(len(rows))
        if not bool(is_mutual.any()):  # ties in a circle
            first = int(distances.argmin()) // len(rows)
            is_mutual[first], column[first] = True, int(distances[first].argmin())
        order[rows[is_mutual]] = columns[column[is_mutual]]
        rest = torch.ones(len(columns), dtype=torch.bool)
        rest[column[is_mutual]] = False
        rows, columns, distances = rows[~is_mutual], columns[rest], distances[~is_mutual][:, rest]
    return order


def matching(layout: Layout, ours: Tensors, theirs: Tensors) -> dict[str, Tensor]:
    """The permutation that brings weights by name nearest to others, by fingerprints of channels: exact for copies.

    Returns an order of our channels for each family, by its name.
    """
    around, shapes, parts = _laid_out(layout)
    one, other = (fingerprints(_in_turn(layout, tensors), parts, around, shapes) for tensors in (ours, theirs))
    orders = _chosen(around, shapes, lambda atom, origin, place: paired(torch.cdist(other[atom][place], one[atom][origin])))
    return layout.by_name(orders)


def sorting(layout: Layout, tensors: Tensors) -> tuple[dict[str, Tensor], int]:
    """The permutation that sorts every family by fingerprints of its channels, as in `equinorm.canonical`.

    Returns an order for each family, by its name, and how many channels have the fingerprint of another one.
    """
    around, shapes, parts = _laid_out(layout)
    found = fingerprints(_in_turn(layout, tensors), parts, around, shapes)
    ties = 0
    for colours in found.values():
        firsts = colours[..., 0].sort(-1).values
        ties += int((firsts.diff(dim=-1) < TIE).sum())
    orders = _chosen(around, shapes, lambda atom, origin, _: found[atom][origin][:, 0].argsort(stable=True))
    return layout.by_name(orders), ties


def weights_of_places(layout: Layout, tensors: Tensors) -> dict[str, Tensor]:
    """Positive numbers for all entries: random for each place that stays, of its fingerprint for each channel that may move.

    Permuted copies of a network get the same ones, permuted.

    Args:
        layout: of the families.
        tensors: by name.
    """
    around, shapes, parts = _laid_out(layout)
    values = _in_turn(layout, tensors)
    colours = fingerprints(values, parts, around, shapes)
    generator = torch.Generator().manual_seed(0)
    found = [0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64) for tensor in values]
    for piece in parts:
        view, free = piece.of(found[piece.tensor]), dict(piece.axes_of(around))
        view.fill_(1.0)
        for axis, atom in enumerate(piece.atoms):
            if axis in free:
                front = (*free[axis], axis)
                numbers = colours[atom][..., 0].permute(*(front.index(at) for at in sorted(front)))
                view.mul_(numbers.reshape([size if at in front else 1 for at, size in enumerate(view.shape)]))
            else:
                numbers = 0.5 + torch.rand(atom.size, generator=generator, dtype=torch.float64)
                view.mul_(numbers.reshape([-1 if at == axis else 1 for at in range(view.dim())]))
    return dict(zip(layout.names, found, strict=True))


def _in_turn(layout: Layout, tensors: Tensors) -> list[Tensor]:
    return [tensors[name].detach().cpu() for name in layout.names]


def _laid_out(layout: Layout) -> tuple[dict[Atom, tuple[Atom, ...]], dict[Atom, tuple[int, ...]], list[Piece]]:
    """The atoms around each, shapes of their orders, and the pieces in which they stand."""
    around = dict(zip(layout.atoms, layout.around, strict=True))
    return around, shapes_of(around), pieces([*layout.axes.values()], around)


_Place = tuple[int, ...]
"""A place of the atoms around one; empty where there are none."""


def _chosen(
    places: Mapping[Atom, tuple[Atom, ...]], shapes: Shapes, choose: Callable[[Atom, _Place, _Place], Tensor]
) -> tuple[Tensor, ...]:
    """An order for each atom, at each place of those around it: of the channels that come there from another place."""
    orders: dict[Atom, Tensor] = {}
    for atom in sorted(places, key=lambda atom: atom.order):  # those around it first
        order = torch.zeros(shapes[atom], dtype=torch.int64)
        for place in product(*map(range, shapes[atom][:-1])):
            origin = tuple(_origin(places[atom], place, orders, places))
            order[place] = choose(atom, origin, place)
        orders[atom] = order
    return tuple(orders[atom] for atom in places)


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
