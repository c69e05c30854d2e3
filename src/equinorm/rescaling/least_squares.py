"""Log-scales by least squares: conjugate gradients on what they do to the entries of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._class_ids import add_to_classes_

_STEPS = 5000
"""Most steps of conjugate gradients."""

_ROUNDING = 1e-14
"""Residuals that count as none, in parts of the first."""


@dataclass(frozen=True, slots=True, eq=False)
class Equations:
    """Σ_f exponent_f · z[ids_f] = wanted, one for each entry of a tensor that is usable.

    Attributes:
        factors: exponents, and ids of classes from 1, as many axes as entries have; 0 for none.
        usable: 1 where an entry tells something, else 0.
        wanted: logarithms, 0 where not usable.
    """

    factors: tuple[tuple[float, Tensor], ...]
    usable: Tensor
    wanted: Tensor

    def add_(self, totals: Tensor, values: Tensor, power: int = 1) -> None:
        """Add numbers of entries to those of the classes that scale these, times a power of the exponent."""
        for exponent, ids in self.factors:
            add_to_classes_(totals, ids, values, exponent**power)

    def of_scales(self, z: Tensor) -> Tensor:
        """The left side."""
        return self.usable * sum((exponent * z[ids] for exponent, ids in self.factors), start=torch.zeros(()))


def conjugate_gradients(equations: Sequence[Equations], size: int) -> Tensor:
    """The shortest z of shape (size,) that solves equations in least squares, each class in parts of its own number of them.

    Where every entry has one class the first step is exact: a mean.
    """
    z, rest, weights = torch.zeros(3, size + 1, dtype=torch.float64)
    for part in equations:
        part.add_(rest, part.wanted)
        part.add_(weights, part.usable, power=2)
    weights, rest[0] = torch.where(weights > 0, weights, 1.0), 0.0
    direction = rest / weights
    energy = first = (rest * direction).sum()
    for _ in range(_STEPS):
        if not energy > _ROUNDING**2 * first:
            break
        image = torch.zeros_like(rest)
        for part in equations:
            part.add_(image, part.of_scales(direction))
        image[0] = 0.0
        step = energy / (direction * image).sum()
        z, rest = z + step * direction, rest - step * image
        before, energy = energy, (rest * rest / weights).sum()
        direction = rest / weights + energy / before * direction
    return z[1:]
