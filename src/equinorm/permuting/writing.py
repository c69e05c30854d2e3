"""Writing permuted tensors in place, all or nothing: a permutation can be undone exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._errors import PermutationError
from equinorm.discovery.labels import numbered
from equinorm.rescaling.writing import uninterrupted


@dataclass(frozen=True, slots=True, eq=False)
class Reordering:
    """tensor[i, j, …] ← tensor[places[0][i, j, …], places[1][i, j, …], …].

    Attributes:
        what: its name.
        tensor: to be written.
        places: for each axis, which entry comes to each place; None where nothing moves.
    """

    what: str
    tensor: Tensor
    places: Sequence[Tensor | None]

    def taken(self) -> Tensor:
        """What the tensor becomes."""
        tensor = self.tensor.detach()
        whole = [index for index in self.places if index is not None]
        if all(index.numel() == index.shape[axis] for axis, index in enumerate(self.places) if index is not None) and whole:
            for axis, index in enumerate(self.places):
                if index is not None:
                    tensor = tensor.index_select(axis, index.flatten().to(tensor.device))
            return tensor
        return tensor[self._indices()]

    def given_back(self, taken: Tensor) -> Tensor:
        """What the tensor was."""
        before = torch.empty_like(taken)
        before[self._indices()] = taken
        return before

    def _indices(self) -> tuple[Tensor, ...]:
        shape, rank = self.tensor.shape, self.tensor.dim()
        found = []
        for axis, index in enumerate(self.places):
            if index is None:
                index = numbered(shape[axis], axis, rank)
            found.append(index.to(self.tensor.device))
        return tuple(found)


def permute_all_(moves: Sequence[Reordering]) -> None:
    """Write all of them, or none.

    Raises:
        PermutationError: if an operation fails; all is put back then, bitwise.
    """
    begun: list[tuple[Reordering, Tensor | None]] = []
    with torch.no_grad(), uninterrupted():
        try:
            for move in moves:
                taken = move.taken()
                begun.append((move, taken))
                move.tensor.copy_(taken)
                begun[-1] = (move, None)
        except BaseException as error:
            lost = _put_back(begun)
            if not isinstance(error, Exception):
                raise
            what = moves[len(begun) - 1 if begun and begun[-1][1] is not None else len(begun)].what
            outcome = (
                f"These could not be put back, load them again: {', '.join(lost)}." if lost else "All is as it was before."
            )
            raise PermutationError(f"writing {what} failed: {type(error).__name__}: {error}. {outcome}") from error


def _put_back(begun: Sequence[tuple[Reordering, Tensor | None]]) -> list[str]:
    """Undo what was begun, last first; returns what cannot be."""
    lost: list[str] = []
    for move, taken in reversed(begun):
        try:
            move.tensor.copy_(move.given_back(move.tensor.detach().clone() if taken is None else taken))
        except Exception:
            lost.append(move.what)
    return lost
