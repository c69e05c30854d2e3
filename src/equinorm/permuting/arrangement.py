"""Two sets of weights whose channels are put into another order, family by family."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from equinorm.discovery.labels import numbered
from equinorm.permuting.atoms import Atom, Axis
from equinorm.permuting.pieces import Piece, pieces, reorder_


class Sides(NamedTuple):
    """Tensors of two networks, and the axes of each in parts."""

    ours: Sequence[Tensor]
    theirs: Sequence[Tensor]
    axes: Sequence[Sequence[Axis]]


class Standing(NamedTuple):
    """Where an atom stands: an axis of a piece, and the axes around it."""

    piece: Piece
    axis: int
    around: tuple[int, ...]


def shapes_of(around: Mapping[Atom, Sequence[Atom]]) -> dict[Atom, tuple[int, ...]]:
    """Of each atom the shape of its order: sizes of the atoms around it, then its own."""
    return {atom: (*(other.size for other in outer), atom.size) for atom, outer in around.items()}


class Arrangement:
    """Where every family stands in two sets of weights, and the moves of its channels.

    Args:
        sides: tensors that are permuted, those that they are brought near to, and the axes of each.
        atoms: that may be permuted.
        around: for each, those at each place of which its order may be another one.
    """

    def __init__(self, sides: Sides, atoms: Sequence[Atom], around: Sequence[tuple[Atom, ...]]) -> None:
        self.ours, self.theirs = sides.ours, [tensor.contiguous() for tensor in sides.theirs]
        self.around = dict(zip(atoms, around, strict=True))
        self.shapes = shapes_of(self.around)
        self.standings: dict[Atom, list[Standing]] = {atom: [] for atom in atoms}
        self.neighbours: dict[Atom, set[Atom]] = {atom: set() for atom in atoms}
        for piece in pieces(sides.axes, self.around):
            for axis, outer in piece.axes_of(self.around):
                self.standings[piece.atoms[axis]].append(Standing(piece, axis, outer))
                others = [atom for at, atom in enumerate(piece.atoms) if at != axis and atom in self.around]
                self.neighbours[piece.atoms[axis]].update(others)

    @property
    def standing(self) -> set[Atom]:
        """The atoms that stand in some tensor."""
        return {atom for atom, places in self.standings.items() if places}

    def move(self, current: Sequence[Tensor], atom: Atom, step: Tensor) -> None:
        """Permute the channels of one atom wherever it stands."""
        for piece, axis, around in self.standings[atom]:
            reorder_(piece.of(current[piece.tensor]), axis, around, step)

    def composed(self, found: Mapping[Atom, Tensor], atom: Atom, step: Tensor) -> dict[Atom, Tensor]:
        """The permutation that does one, then permutes the channels of one atom."""
        result = dict(found)
        result[atom] = found[atom].gather(-1, step)
        for other, outer in self.around.items():
            if atom in outer:  # its orders stand at places of this one, which have moved
                result[other] = self._moved(other, result[other], atom, step)
        return result

    def _moved(self, other: Atom, order: Tensor, atom: Atom, step: Tensor) -> Tensor:
        """Orders of an atom around which another one has moved."""
        outer = self.around[other]
        axis, inner = outer.index(atom), self.around[atom]
        lines = {a: numbered(a.size, at, order.dim()) for at, a in enumerate(outer)}
        index = [lines[a] for a in outer] + [numbered(order.shape[-1], order.dim() - 1, order.dim())]
        index[axis] = step[(*(lines[a] for a in inner), lines[atom])]
        return order[tuple(index)]
