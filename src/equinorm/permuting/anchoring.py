"""An order for every family, found outwards from the axes that no permutation moves.

At the inputs of a network, at its outputs and at tokens the channels of two networks are known to be the same. Families beside
them are matched first, by these weights alone; then those beside the families that are matched. A copy that was trained further
is matched so whatever order its channels had.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from equinorm.permuting.assignment import Assignment, Standing
from equinorm.permuting.atoms import Atom
from equinorm.permuting.pieces import along, rows

MOST_PRODUCTS = 2**26
"""Inner products between parts of channels beside which not all is matched; where there are more, norms are compared."""


def anchored(assignment: Assignment, is_flipped: bool) -> dict[Atom, Tensor]:
    """Orders of all atoms, each found when most of its weights are known.

    Args:
        assignment: of one network's tensors to another's.
        is_flipped: may channels have the other sign? Then those are taken that are alike up to it.
    """
    ours = [tensor.clone(memory_format=torch.contiguous_format) for tensor in assignment.ours]
    orders, waiting = assignment.identity(), {*assignment.standing}
    norms = {
        atom: [float(stand.piece.of(assignment.theirs[stand.piece.tensor]).square().sum()) for stand in assignment.places[atom]]
        for atom in waiting
    }
    while waiting:
        ready = [atom for atom in waiting if not waiting.intersection(assignment.around[atom])]
        shares = {atom: _shares(assignment.places[atom], norms[atom], waiting) for atom in ready}
        atom = max(ready, key=lambda atom: (shares[atom], [-number for number in atom.order]))
        gains = _gains(assignment, ours, atom, waiting)
        order = assignment.solved(gains.abs() if is_flipped else gains)
        signs = gains.gather(2, order[:, :, None]).sign()
        shape = assignment.shapes[atom]
        assignment.move_(ours, atom, order.reshape(shape))
        if is_flipped and bool((signs < 0).any()):
            for piece, axis, around in assignment.places[atom]:
                view = piece.of(ours[piece.tensor])
                view.mul_(along(view, axis, around, signs.reshape(shape)))
        orders = assignment.composed(orders, atom, order.reshape(shape))
        waiting.discard(atom)
    return orders


def _shares(stands: Sequence[Standing], weights: Sequence[float], waiting: set[Atom]) -> tuple[float, float]:
    """How much of an atom's weight stands where all others are known, and where some are."""
    whole = sum(weights) or 1.0
    known = sum(weight for stand, weight in zip(stands, weights, strict=True) if not _unknown(stand, waiting))
    partly = sum(weight for stand, weight in zip(stands, weights, strict=True) if _is_partly_known(stand, waiting))
    return known / whole, partly / whole


def _unknown(stand: Standing, waiting: set[Atom]) -> list[int]:
    """Axes of atoms that are not matched yet, beside that of the atom itself."""
    return [at for at, atom in enumerate(stand.piece.atoms) if at != stand.axis and atom in waiting]


def _is_partly_known(stand: Standing, waiting: set[Atom]) -> bool:
    """Does it stand beside something known?"""
    return len(_unknown(stand, waiting)) + 1 + len(stand.around) < len(stand.piece.atoms)


def _gains(assignment: Assignment, ours: Sequence[Tensor], atom: Atom, waiting: set[Atom]) -> Tensor:
    """What each of our channels gains at the place of each of theirs: of shape (places around the atom, theirs, ours)."""
    stands = assignment.places[atom]
    known = [stand for stand in stands if not _unknown(stand, waiting)]
    gains = torch.zeros(assignment.square(atom), dtype=ours[0].dtype)
    for stand in known or stands:
        piece, axis, around = stand
        one, other = (piece.of(tensors[piece.tensor]) for tensors in (ours, assignment.theirs))
        if known:
            gains.baddbmm_(rows(other, axis, around), rows(one, axis, around).transpose(-1, -2))
        else:
            gains += _likeness(one, other, stand, _unknown(stand, waiting))
    return gains


def _likeness(one: Tensor, other: Tensor, stand: Standing, unknown: Sequence[int]) -> Tensor:
    """‖A_i B_jᵀ‖_F, which no permutation of the rows of A_i and B_j changes: these are the places that are not known."""
    ours, theirs = (_matrices(view, stand, unknown) for view in (one, other))
    orders, channels, height, width = ours.shape
    if width == 1 or orders * (channels * height) ** 2 > MOST_PRODUCTS:
        norms = [side.square().sum((2, 3)) for side in (theirs, ours)]
        return (norms[0][:, :, None] * norms[1][:, None, :]).sqrt()
    products = theirs.flatten(1, 2) @ ours.flatten(1, 2).transpose(1, 2)
    return products.reshape(orders, channels, height, channels, height).square().sum((2, 4)).sqrt()


def _matrices(view: Tensor, stand: Standing, unknown: Sequence[int]) -> Tensor:
    """Entries of shape (places around, channels, places not known, others)."""
    front = (*stand.around, stand.axis, *unknown)
    rest = [at for at in range(view.dim()) if at not in front]
    sizes = [math.prod(view.shape[at] for at in axes) for axes in (stand.around, unknown)]
    return view.permute(*front, *rest).reshape(sizes[0], view.shape[stand.axis], sizes[1], -1)
