"""The permutation that brings weights nearest to others: one linear assignment for each family, in turn, until none moves.

With all other orders fixed, ‖π(a) − b‖² is least where Σ_i ⟨a_π(i), b_i⟩ is largest, over the entries of every channel in all
tensors: the inner products of all channels of both are one product of matrices for each piece of a tensor.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equinorm._errors import PermutationError
from equinorm.permuting.atoms import Atom, Axis
from equinorm.permuting.pieces import Piece, pieces, reorder_, rows

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Gains of an order that count as none, in parts of the norms of what is gained from."""


def solver() -> Any:
    """scipy's solver of linear assignments.

    Raises:
        PermutationError: if scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise PermutationError(
            "linear assignments need scipy, which is not installed: pip install 'equinorm[align]'."
        ) from error
    return linear_sum_assignment


class Sides(NamedTuple):
    """Tensors of two networks, and the axes of each in parts."""

    ours: Sequence[Tensor]
    theirs: Sequence[Tensor]
    axes: Sequence[Sequence[Axis]]


def fixed_point(
    sides: Sequence[Sides], around: Sequence[tuple[Atom, ...]], start: Mapping[Atom, Tensor], sweeps: int
) -> tuple[dict[Atom, Tensor], int, float]:
    """Sweeps over the first tensors; atoms that stand in none of these are moved by the next.

    Returns the orders, how many sweeps it took, and the sum of all products of the first tensors.

    Args:
        sides: what to match, first things first.
        around: for each atom, those at each place of which its order may be another one.
        start: orders to start from, of all atoms.
        sweeps: most of them.
    """
    orders, rest, total, sums = dict(start), {*start}, 0, []
    for side in sides:
        assignment = Assignment(*side, [*start], around)
        orders, taken, agreement = assignment.fixed_point(orders, sweeps, rest)
        rest -= assignment.standing
        total, sums = total + taken, [*sums, agreement]
        if not rest:
            break
    return orders, total, sums[0]


class Standing(NamedTuple):
    """Where an atom stands: an axis of a piece, and the axes around it."""

    piece: Piece
    axis: int
    around: tuple[int, ...]


class Assignment:
    """Sweeps of linear assignments over the families of two sets of weights.

    Args:
        ours: tensors that are permuted; float32 or float64, on the CPU.
        theirs: tensors that they are brought near to.
        axes: of each tensor, in parts.
        atoms: that may be permuted.
        around: for each, those at each place of which its order may be another one.

    Attributes:
        places: where each atom stands.
        shapes: of the orders of each.
    """

    def __init__(
        self,
        ours: Sequence[Tensor],
        theirs: Sequence[Tensor],
        axes: Sequence[Sequence[Axis]],
        atoms: Sequence[Atom],
        around: Sequence[tuple[Atom, ...]],
    ) -> None:
        self.ours, self.theirs = ours, [tensor.contiguous() for tensor in theirs]
        self.around = dict(zip(atoms, around, strict=True))
        self.shapes = {atom: (*(other.size for other in outer), atom.size) for atom, outer in self.around.items()}
        self.places: dict[Atom, list[Standing]] = {atom: [] for atom in atoms}
        self._neighbours: dict[Atom, set[Atom]] = {atom: set() for atom in atoms}
        for piece in pieces(axes, self.around):
            for axis, outer in piece.axes_of(self.around):
                self.places[piece.atoms[axis]].append(Standing(piece, axis, outer))
                others = [atom for at, atom in enumerate(piece.atoms) if at != axis and atom in self.around]
                self._neighbours[piece.atoms[axis]].update(others)
        self._solve = solver()

    @property
    def standing(self) -> set[Atom]:
        """The atoms that stand in some tensor."""
        return {atom for atom, places in self.places.items() if places}

    def fixed_point(self, start: Mapping[Atom, Tensor], sweeps: int, only: Set[Atom]) -> tuple[dict[Atom, Tensor], int, float]:
        """Sweep until no family moves; one whose neighbours have stood still since its last turn is left out.

        Returns the orders, how many sweeps it took, and the sum of all products.

        Args:
            start: orders to start from.
            sweeps: most of them.
            only: atoms that may move on from there.
        """
        current = [tensor.clone(memory_format=torch.contiguous_format) for tensor in self.ours]
        for atom in sorted(start, key=lambda atom: atom.order):  # those around others first
            self.move_(current, atom, start[atom])
        moving = self.standing & only
        found, waiting, taken = dict(start), set(moving), sweeps
        for sweep in range(1, sweeps + 1):
            for atom in start:
                if atom not in waiting:
                    continue
                waiting.discard(atom)
                step = self._step(atom, current)
                if step is not None and self._is_taken(current, atom, step):
                    waiting |= self._neighbours[atom] & moving
                    found = self.composed(found, atom, step)
            if not waiting:
                taken = sweep
                break
        return found, taken, self._agreement(current, range(len(current)))

    def _agreement(self, current: Sequence[Tensor], numbers: Sequence[int]) -> float:
        return sum(float((current[n] * self.theirs[n]).sum(dtype=torch.float64)) for n in numbers)

    def _step(self, atom: Atom, current: Sequence[Tensor]) -> Tensor | None:
        """The best order of one atom with all others fixed; None where that of now is as good."""
        shape, dtype = self.shapes[atom], current[0].dtype
        gains = torch.zeros(self.square(atom), dtype=dtype)
        for piece, axis, around in self.places[atom]:
            one, other = (rows(piece.of(tensors[piece.tensor]), axis, around) for tensors in (current, self.theirs))
            gains.baddbmm_(other, one.transpose(-1, -2))
        order, better = self.solved(gains), False
        for place, (gain, columns) in enumerate(zip(gains.double(), order, strict=True)):
            now, then = gain.diagonal(), gain.gather(1, columns[:, None])[:, 0]
            is_better = float((then - now).sum()) > _ROUNDING[dtype] * float(gain.abs().amax(1).sum())
            if not is_better:
                order[place] = torch.arange(len(gain))
            better |= is_better
        return order.reshape(shape) if better else None

    def square(self, atom: Atom) -> tuple[int, int, int]:
        """Places around an atom, and twice its size."""
        shape = self.shapes[atom]
        return math.prod(shape[:-1]), shape[-1], shape[-1]

    def identity(self) -> dict[Atom, Tensor]:
        """The order of every atom that moves nothing."""
        return {atom: torch.arange(shape[-1]).expand(shape).clone() for atom, shape in self.shapes.items()}

    def solved(self, gains: Tensor) -> Tensor:
        """The order of largest gain at each place: of shape (places, channels)."""
        return torch.stack([torch.from_numpy(self._solve(gain.numpy(), maximize=True)[1]) for gain in gains.double()])

    def _is_taken(self, current: Sequence[Tensor], atom: Atom, step: Tensor) -> bool:
        """Move an atom; back again where it stands twice in one piece, so that a step may lose, and does."""
        if atom not in self._neighbours[atom]:
            self.move_(current, atom, step)
            return True
        numbers = sorted({stand.piece.tensor for stand in self.places[atom]})
        before = self._agreement(current, numbers)
        self.move_(current, atom, step)
        after = self._agreement(current, numbers)
        if after > before + _ROUNDING[current[0].dtype] * abs(before):
            return True
        self.move_(current, atom, step.argsort(-1))
        return False

    def move_(self, current: Sequence[Tensor], atom: Atom, step: Tensor) -> None:
        """Permute the channels of one atom wherever it stands."""
        for piece, axis, around in self.places[atom]:
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
        rank = order.dim()
        lines = {a: torch.arange(a.size).reshape([-1 if p == at else 1 for p in range(rank)]) for at, a in enumerate(outer)}
        index = [lines[a] for a in outer] + [torch.arange(order.shape[-1]).reshape([1] * (rank - 1) + [-1])]
        index[axis] = step[(*(lines[a] for a in inner), lines[atom])]
        return order[tuple(index)]
