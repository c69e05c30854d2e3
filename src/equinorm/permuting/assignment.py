"""The permutation that brings weights nearest to others: one linear assignment for each family, in turn, until none moves.

With all other orders fixed, ‖π(a) − b‖² is least where Σ_i ⟨a_π(i), b_i⟩ is largest, over the entries of every channel in all
tensors: the inner products of all channels of both are one product of matrices for each piece of a tensor.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from equinorm._display import needed
from equinorm._errors import PermutationError
from equinorm.permuting.arrangement import Arrangement, Sides
from equinorm.permuting.atoms import Atom
from equinorm.permuting.layout import Layout
from equinorm.permuting.matching import Tensors
from equinorm.permuting.pieces import rows

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Gains of an order that count as none, in parts of the norms of what is gained from."""


def solver() -> Any:
    """scipy's solver of linear assignments.

    Raises:
        PermutationError: if scipy is not installed.
    """
    return needed("scipy.optimize", "linear assignments need", "align", PermutationError).linear_sum_assignment


def nearest(
    layout: Layout,
    weights: tuple[Tensors, Tensors],
    start: Tensors,
    sweeps: int,
    activations: Sides | None = None,
) -> tuple[dict[str, Tensor], int, float]:
    """Matching of one set of weights to another by sweeps of linear assignments, as in `equinorm.align`.

    Args:
        layout: where channels stand.
        weights: the tensors of one network by name, then of another of the same architecture; of one dtype, float32 or
            float64, on the CPU.
        start: the order of every family to start from, by name.
        sweeps: most of them.
        activations: these are matched, and weights only of families that stand at none of their points.

    Returns:
        An order of our channels for each family, by its name, the number of sweeps, and the sum of all products of what
        was matched first.
    """
    one, other = ([tensors[name] for name in layout.names] for tensors in weights)
    sides = [Sides(one, other, [*layout.axes.values()])]
    if activations is not None:
        sides.insert(0, activations)
    orders = {atom: start[family.name] for atom, family in zip(layout.atoms, layout.families, strict=True)}
    rest, total, sums = {*orders}, 0, []
    for side in sides:
        assignment = Assignment(side, [*layout.atoms], layout.around)
        orders, taken, agreement = assignment.fixed_point(orders, sweeps, rest)
        rest -= assignment.standing
        total, sums = total + taken, [*sums, agreement]
        if not rest:
            break
    return layout.by_name([orders[atom] for atom in layout.atoms]), total, sums[0]


class Assignment(Arrangement):
    """Sweeps of linear assignments over the families of two sets of weights; tensors of float32 or float64, on the CPU."""

    def __init__(self, sides: Sides, atoms: Sequence[Atom], around: Sequence[tuple[Atom, ...]]) -> None:
        super().__init__(sides, atoms, around)
        self._solve = solver()

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
            self.move(current, atom, start[atom])
        moving = self.standing & only
        found, waiting, taken = dict(start), set(moving), sweeps
        for sweep in range(1, sweeps + 1):
            for atom in start:
                if atom not in waiting:
                    continue
                waiting.discard(atom)
                step = self._step(atom, current)
                if step is not None and self._is_taken(current, atom, step):
                    waiting |= self.neighbours[atom] & moving
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
        gains = torch.zeros(math.prod(shape[:-1]), shape[-1], shape[-1], dtype=dtype)
        for piece, axis, around in self.standings[atom]:
            one, other = (rows(piece.of(tensors[piece.tensor]), axis, around) for tensors in (current, self.theirs))
            gains.baddbmm_(other, one.transpose(-1, -2))
        order = torch.empty(gains.shape[:2], dtype=torch.int64)
        better = False
        for place, gain in enumerate(gains.double()):
            columns = torch.from_numpy(self._solve(gain.numpy(), maximize=True)[1])
            now, then = gain.diagonal(), gain.gather(1, columns[:, None])[:, 0]
            is_better = float((then - now).sum()) > _ROUNDING[dtype] * float(gain.abs().amax(1).sum())
            order[place] = columns if is_better else torch.arange(len(gain))
            better |= is_better
        return order.reshape(shape) if better else None

    def _is_taken(self, current: Sequence[Tensor], atom: Atom, step: Tensor) -> bool:
        """Move an atom; back again where it stands twice in one piece, so that a step may lose, and does."""
        if atom not in self.neighbours[atom]:
            self.move(current, atom, step)
            return True
        numbers = sorted({stand.piece.tensor for stand in self.standings[atom]})
        before = self._agreement(current, numbers)
        self.move(current, atom, step)
        after = self._agreement(current, numbers)
        if after > before + _ROUNDING[current[0].dtype] * abs(before):
            return True
        self.move(current, atom, step.argsort(-1))
        return False
