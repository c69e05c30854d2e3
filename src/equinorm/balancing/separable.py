"""p = ∞ where each entry moves with one class, by its scale or the inverse: every class is solved by itself, in one step.

Normalized networks are like that: gains scale with the columns of what follows, and what stands in front of them is pinned.
"""

import math

import torch
from torch import Tensor

from equinorm.balancing.problem import Problem
from equinorm.balancing.sweeps import gap, imbalance

EVEN = 1e-10
"""ρ of all classes from which on none of them needs to move."""


def is_separable(problem: Problem) -> bool:
    """Does each entry move with one class, by its scale or the inverse, so that every class can be solved by itself?"""
    return problem.singles is not None and not problem.others and problem.singles.are_alike


def least_maximum_by_class(problem: Problem, z: Tensor) -> tuple[float, Tensor]:
    """√(in · out) of the class where it is largest; z moves no further than that takes."""
    into, out = _ends(problem, z)
    bound = float(((into + out) / 2).max())
    if bound == -math.inf:
        return bound, z
    return bound, torch.minimum(torch.maximum(z, out - bound), bound - into)


class SeparableDescent:
    """The middle between what enters a class and what leaves it, for all of them at once.

    Args:
        problem: p = ∞, without dead classes, and `is_separable`.
        z: log-scales of classes 0..num_free, where to begin.
        tol: on the residual, and on the imbalance ρ.

    Attributes:
        z: where it is.
        residual: the gap 1 − exp(t* − t) of the largest entry e^t to the least that there can be.
    """

    def __init__(self, problem: Problem, z: Tensor, tol: float) -> None:
        self.z, self._is_even = z, False
        self._into, self._out = _ends(problem, z)
        self._bound = float(((self._into + self._out) / 2).max())
        self.residual = self._gap()
        rho = imbalance([(self._into + z, self._out - z)])
        self._is_even = rho <= min(tol, EVEN) or (rho <= tol and self.residual <= tol)

    @property
    def is_done(self) -> bool:
        """Is every class where it should be?"""
        return self._is_even

    def cycle(self) -> None:
        """Move every class to its middle."""
        step = (self._out - self._into) / 2
        self.z, self._is_even = torch.where(step.isfinite(), step, 0.0), True
        self.residual = self._gap()

    def _gap(self) -> float:
        return gap(self._bound, float(torch.maximum(self._into + self.z, self._out - self.z).max()))


def _ends(problem: Problem, z: Tensor) -> tuple[Tensor, Tensor]:
    """The largest log-energies into each class and out of it, at log-scales 0."""
    assert problem.singles is not None
    return problem.singles.maxima(len(z))
