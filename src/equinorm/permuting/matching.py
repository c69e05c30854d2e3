"""Which channels of one network are which of another: by fingerprints that no permutation changes.

A channel's fingerprint sums its weights, each times random numbers for the places in pinned axes that it stands at and times
the fingerprints of the other channels that it joins. A few rounds tell apart all channels that weights tell apart; as in the
refinement of colours of Weisfeiler and Leman, with numbers for colours, so that rounding changes them little.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from equinorm.permuting.atoms import Atom, Axis
from equinorm.permuting.pieces import Piece, pieces

FEATURES, ROUNDS = 6, 5
"""Numbers of a fingerprint, and rounds in which it is refined."""

_LETTERS = "abcdefghijklmnopqrstuvwxy"
"""Of the axes of a piece; z counts features."""

Shapes = Mapping[Atom, tuple[int, ...]]
"""Of each free atom: sizes of the atoms around it, then its own."""


def fingerprints(
    tensors: Sequence[Tensor],
    parts: Sequence[Piece],
    places: Mapping[Atom, tuple[Atom, ...]],
    shapes: Shapes,
    seed: int = 0,
) -> dict[Atom, Tensor]:
    """Fingerprints of every channel, of shape (*places around it, channels, features).

    Args:
        tensors: float64, contiguous.
        parts: their pieces.
        places: for each free atom, those at each place of which its order may be another one.
        shapes: of each.
        seed: of the random numbers; the same for networks to be matched.
    """
    colours = {atom: torch.ones(*shape, FEATURES, dtype=torch.float64) for atom, shape in shapes.items()}
    for number in range(ROUNDS):
        generator = torch.Generator().manual_seed(seed + number)
        sums = {atom: torch.zeros(*shape, FEATURES, dtype=torch.float64) for atom, shape in shapes.items()}
        for piece in parts:
            tables = [torch.randn(atom.size, FEATURES, generator=generator, dtype=torch.float64) for atom in piece.atoms]
            constants = torch.randn(2, FEATURES, generator=generator, dtype=torch.float64)
            _add(piece.of(tensors[piece.tensor]), piece, places, (tables, constants), (colours, sums))
        for atom, total in sums.items():
            flat, old = total.reshape(-1, FEATURES), colours[atom].reshape(-1, FEATURES)
            spread = (flat - flat.mean(0)) / flat.std(0, correction=0).clamp_min(1e-300)
            colours[atom] = (1 + 0.5 * torch.tanh(spread + 0.3 * (old - 1))).reshape(total.shape)
    return colours


def _add(
    view: Tensor,
    piece: Piece,
    places: Mapping[Atom, tuple[Atom, ...]],
    drawn: tuple[Sequence[Tensor], Tensor],
    into: tuple[Mapping[Atom, Tensor], Mapping[Atom, Tensor]],
) -> None:
    """Add what a piece says of each channel that stands in it: of its entries, and of their squares."""
    (tables, constants), (colours, sums) = drawn, into
    free = dict(piece.axes_of(places))
    factors = [
        (_LETTERS[axis], tables[axis]) if axis not in free else
        ("".join(_LETTERS[at] for at in (*free[axis], axis)), colours[atom])
        for axis, atom in enumerate(piece.atoms)
    ]  # fmt: skip
    whole = _LETTERS[: view.dim()]
    for axis, around in free.items():
        target = "".join(_LETTERS[at] for at in (*around, axis))
        others = sorted((f for at, f in enumerate(factors) if at != axis), key=lambda factor: -factor[1].numel())
        for power, constant in enumerate(constants, 1):
            message = _contracted(view if power == 1 else view.square(), whole, others, target)
            sums[piece.atoms[axis]].add_(message * constant)


def _contracted(values: Tensor, letters: str, factors: Sequence[tuple[str, Tensor]], target: str) -> Tensor:
    """Σ values · factors over all axes but those of the target; the last axis counts features."""
    for number, (own, factor) in enumerate(factors):
        ahead = {*target, *"".join(name for name, _ in factors[number + 1 :])}
        left = "".join(letter for letter in letters if letter in ahead)
        values = torch.einsum(f"{letters}{'z' if number else ''},{own}z->{left}z", values, factor)
        letters = left
    if not factors:
        values = values[..., None].expand(*values.shape, FEATURES)
    return torch.einsum(f"{letters}z->{target}z", values)


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
    parts = pieces(axes, places)
    one, other = (fingerprints([t.double().contiguous() for t in side], parts, places, shapes) for side in (ours, theirs))
    orders: dict[Atom, Tensor] = {}
    for atom in sorted(places, key=lambda atom: atom.order):  # those around it first
        shape = shapes[atom]
        left, right = one[atom], other[atom]
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
