"""The channels along one side of a block of energies, and the families that they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GROUND = -1
"""Family of what does not scale."""


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """The channels along one side of a block.

    Attributes:
        family: index of their family, or GROUND.
        ids: free class of each channel, 1..num_free, or 0 on the ground.
        exponent: by which their scale enters.
    """

    family: int
    ids: Tensor
    exponent: float


def family_of_classes(families: Sequence[tuple[int, int]], num_free: int) -> Tensor:
    """Family of each class 0..num_free, from first and last + 1 id of every family; GROUND for class 0."""
    found = np.full(num_free + 1, GROUND)
    for number, (first, last) in enumerate(families):
        found[first:last] = number
    return torch.from_numpy(found)


def self_loops(rows: Side, columns: Side) -> Tensor | None:
    """Where a matrix joins a class to itself, so that its energy never changes; None if nowhere."""
    if rows.family == GROUND or rows.family != columns.family or rows.exponent != -columns.exponent:
        return None
    loops = rows.ids[:, None] == columns.ids[None, :]
    return loops if bool(loops.any()) else None
