"""Permuted tensors: what each becomes, and how that is undone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm.discovery.labels import numbered


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
