"""The permutation that brings weights nearest to others: one linear assignment for each family, in turn, until none moves.

With all other orders fixed, ‖π(a) − b‖² is least where Σ_i ⟨a_π(i), b_i⟩ is largest, over the entries of every channel in all
tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equinorm._errors import PermutationError
from equinorm.permuting.atoms import Atom, Axis
from equinorm.permuting.matching import match, standing
from equinorm.permuting.reading import Order, places


def _solver() -> Any:
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


class Assignment:
    """Sweeps of linear assignments over the families of two sets of weights.

    Args:
        ours: tensors that are permuted.
        theirs: tensors that they are brought near to.
        axes: of each tensor, in parts.
        atoms: that may be permuted.
        around: for each, those at each place of which its order may be another one.
    """

    def __init__(
        self,
        ours: Sequence[Tensor],
        theirs: Sequence[Tensor],
        axes: Sequence[Sequence[Axis]],
        atoms: Sequence[Atom],
        around: Sequence[tuple[Atom, ...]],
    ) -> None:
        self._ours, self._theirs, self._axes = ours, theirs, axes
        self._around = dict(zip(atoms, around, strict=True))
        self._shapes = {atom: (*(other.size for other in outer), atom.size) for atom, outer in self._around.items()}
        self._entries: dict[Atom, list[tuple[int, Tensor]]] = {atom: [] for atom in atoms}
        for number, own in enumerate(axes):
            for atom, channels in standing(own, self._around).occurrences:
                self._entries[atom].append((number, self._rows(atom, channels, ours[number].shape)))
        self._solve = _solver()

    def _rows(self, atom: Atom, channels: Tensor, shape: Sequence[int]) -> Tensor:
        """Which entries of a tensor belong to each channel, in the same order for all; of shape (orders, channels, entries)."""
        whole = channels.expand(tuple(shape)).reshape(-1)
        here = (whole >= 0).nonzero().flatten()
        entries = here[whole[here].argsort(stable=True)]
        own = self._shapes[atom]
        return entries.reshape(int(np.prod(own[:-1], dtype=np.int64)), own[-1], -1)

    def starts(self, count: int, seed: int) -> Iterator[dict[Atom, Tensor]]:
        """Where sweeps may start: where the weights are, where fingerprints of channels agree, at random; `count` in all."""
        yield {atom: torch.arange(shape[-1]).expand(shape).clone() for atom, shape in self._shapes.items()}
        if count > 1:
            matched = match(self._ours, self._theirs, self._axes, [*self._around], [*self._around.values()])
            yield dict(zip(self._around, matched, strict=True))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count - 2):
            yield {atom: torch.rand(shape, generator=generator).argsort(-1) for atom, shape in self._shapes.items()}

    def orders(self, start: Mapping[Atom, Tensor], sweeps: int) -> tuple[dict[Atom, Tensor], int]:
        """Orders of a fixed point, and the sweeps that it took.

        Args:
            start: orders to start from.
            sweeps: most of them.
        """
        found = dict(start)
        current = self._permuted(self._ours, found)
        for sweep in range(1, sweeps + 1):
            is_still = True
            for atom in found:
                step = self._step(atom, current)
                if step is None:
                    continue
                is_still = False
                current = self._permuted(current, {atom: step})
                found = self._composed(found, atom, step)
            if is_still:
                return found, sweep
        return found, sweeps

    def agreement(self, orders: Mapping[Atom, Tensor]) -> float:
        """⟨π(a), b⟩, the more the nearer."""
        return sum(float((a * b).sum()) for a, b in zip(self._permuted(self._ours, orders), self._theirs, strict=True))

    def _step(self, atom: Atom, current: Sequence[Tensor]) -> Tensor | None:
        """The best order of one atom with all others fixed; None where that of now is as good."""
        shape = self._shapes[atom]
        gains = torch.zeros(int(np.prod(shape[:-1], dtype=np.int64)), shape[-1], shape[-1], dtype=torch.float64)
        for number, rows in self._entries[atom]:
            one, other = (tensors[number].reshape(-1)[rows] for tensors in (current, self._theirs))
            gains += other @ one.transpose(-1, -2)
        order = torch.empty(gains.shape[:2], dtype=torch.int64)
        better = False
        for place, gain in enumerate(gains):
            columns = torch.from_numpy(self._solve(gain.numpy(), maximize=True)[1])
            now, then = float(gain.diagonal().sum()), float(gain[torch.arange(len(gain)), columns].sum())
            is_better = then > now + 1e-10 * float(gain.abs().sum(-1).mean())
            order[place] = columns if is_better else torch.arange(len(gain))
            better |= is_better
        return order.reshape(shape) if better else None

    def _permuted(self, tensors: Sequence[Tensor], orders: Mapping[Atom, Tensor]) -> list[Tensor]:
        """Tensors after a permutation."""
        placed = {atom: Order(self._around[atom], order) for atom, order in orders.items()}
        found = []
        for tensor, own in zip(tensors, self._axes, strict=True):
            indices = places(own, placed)
            if any(index is not None for index in indices):
                rank = tensor.dim()
                lines = [
                    torch.arange(n).reshape([-1 if a == p else 1 for a in range(rank)]) for p, n in enumerate(tensor.shape)
                ]
                tensor = tensor[tuple(line if index is None else index for index, line in zip(indices, lines, strict=True))]
            found.append(tensor)
        return found

    def _composed(self, found: Mapping[Atom, Tensor], atom: Atom, step: Tensor) -> dict[Atom, Tensor]:
        """The permutation that does one, then permutes the channels of one atom."""
        result = dict(found)
        result[atom] = found[atom].gather(-1, step)
        for other, outer in self._around.items():
            if atom in outer:  # its orders stand at places of this one, which have moved
                result[other] = self._moved(other, result[other], atom, step)
        return result

    def _moved(self, other: Atom, order: Tensor, atom: Atom, step: Tensor) -> Tensor:
        """Orders of an atom around which another one has moved."""
        outer = self._around[other]
        axis, inner = outer.index(atom), self._around[atom]
        rank = order.dim()
        lines = {a: torch.arange(a.size).reshape([-1 if p == at else 1 for p in range(rank)]) for at, a in enumerate(outer)}
        index = [lines[a] for a in outer] + [torch.arange(order.shape[-1]).reshape([1] * (rank - 1) + [-1])]
        index[axis] = step[(*(lines[a] for a in inner), lines[atom])]
        return order[tuple(index)]
