"""Minimise a sum of exponentials: block coordinate descent over families of channels, two-level and accelerated.

The coordinate step of a channel with in-energy r (terms in which its log-scale enters with a positive exponent) and
out-energy s (negative) is z += log(s / r) / 2q; for p-norms that is D = √(R/L). All channels of a family may take it at
once: by Cauchy-Schwarz the objective never increases, even if terms join them, as long as the exponents of the family in one
term sum to at most 1 on either sign (otherwise divide the step by that sum).

Slow modes are one scalar for each family. For finite p the two-level method minimises over those first. It works on the
rank-one model (`rank_one`) that each reading of the weights gives; Anderson's acceleration takes over what the model misses,
and is undone where it fails (`model_descent`). For p = ∞ the least maximum is found first (`least_maximum`), and sweeps make
channels below it even.

Sources: Stock et al., ICLR 2019, Algorithm 1; Osborne, JACM 1960; Anderson, JACM 1965.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm.balancing.least_maximum import FlatSweeps, are_differences, are_few, least_by_families, least_maximum
from equinorm.balancing.model_descent import ROUNDING, ModelDescent
from equinorm.balancing.options import LIMIT, BalanceOptions
from equinorm.balancing.problem import Problem
from equinorm.balancing.separable import SeparableDescent, is_separable
from equinorm.balancing.sweeps import System, gap, imbalance


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Where the iteration stopped.

    Attributes:
        problem: the energies, without those of dead classes.
        z: log-scales of classes 0..num_free; entry 0 is 0.
        residuals: ρ before the first cycle and after each; for p = ∞ the gap 1 − t* / t of the largest entry t to t*.
        dead: mask over 0..num_free of classes that no path joins to an input and an output.
    """

    problem: Problem
    z: Tensor
    residuals: tuple[float, ...]
    dead: Tensor


FIRST = 5
"""Sweeps before the least maximum is looked for: from there few entries of large matrices matter."""

EVEN = 50
"""Sweeps that channels below the maximum get to become even."""

PLATEAU = 1000
"""Sweeps of Algorithm 1 that do not lower a maximum, after which it is taken to stand still."""

PATIENCE = 50
"""Cycles without a smaller residual after which it is taken to be rounding, …"""

STALLED = 1e-10
"""… if it is below this."""

Progress = Callable[[int, float], None]


def solve(problem: Problem, options: BalanceOptions, progress: Progress | None = None) -> Solution:
    """Run cycles until the residual is at most `tol`, or exactly `cycles` of them.

    Args:
        problem: the energies.
        options: the method ("cyclic" is Algorithm 1), how many cycles, and `tol`, on the residual; for p = ∞ also on
            ρ = ‖in − out‖₁ / ‖in + out‖₁, or as far as `EVEN` sweeps lead.
        progress: called with the number of the cycle and the residual.
    """
    system = System(problem)
    z = torch.zeros(problem.num_free + 1, dtype=torch.float64)
    dead = torch.zeros(problem.num_free + 1, dtype=torch.bool)
    while bool((more := system.dead(z)).any()):  # a product dies with any of its factors, and may leave others dead
        dead |= more
        problem = problem.without(dead)
        system = System(problem)
        system.live &= ~dead
    descent = _descent(system, options, z)
    residuals = [descent.residual]
    while not _is_over(descent, residuals, options.cycles):
        descent.cycle()
        residuals.append(descent.residual)
        if progress is not None:
            progress(len(residuals) - 1, descent.residual)
    return Solution(problem, descent.z, tuple(residuals), dead)


def _descent(system: System, options: BalanceOptions, z: Tensor) -> "_Descent":
    """Cycles of a method for a norm."""
    if system.norm.is_max and options.method == "two-level" and is_separable(system.problem):
        return SeparableDescent(system.problem, z, options.tol)
    if system.norm.is_max:
        return _Least(system, options.method, z, options.tol)
    if options.method == "two-level":
        return ModelDescent(system.problem, system.live, z, options.tol)
    return _Sweeps(system, z, options.tol)


def _is_over(descent: "_Descent", residuals: Sequence[float], cycles: int | None) -> bool:
    """Have all cycles run that were asked for, or as many as make sense?"""
    done = len(residuals) - 1
    return done >= cycles if cycles is not None else descent.is_done or done >= LIMIT or _is_stalled(residuals)


def _is_stalled(residuals: Sequence[float]) -> bool:
    """Has rounding kept the residual where it is for a while?"""
    return len(residuals) > PATIENCE and STALLED > min(residuals[:-PATIENCE]) <= min(residuals[-PATIENCE:])


class _Sweeps:
    """Coordinate steps on the energies themselves: Algorithm 1."""

    def __init__(self, system: System, z: Tensor, tol: float) -> None:
        self._system, self._tol, self.z = system, tol, z
        self.residual = system.residual(z)

    @property
    def is_done(self) -> bool:
        return self.residual <= self._tol

    def cycle(self) -> None:
        """One sweep over all families."""
        self.z = self.z.clone()
        for family in range(len(self._system.problem.families)):
            self._system.sweep(self.z, family)
        self.residual = self._system.residual(self.z)


class _Least:
    """The least maximum, and then sweeps, which never raise a maximum, over channels that it leaves free.

    The residual is the gap to the bound: 1 − exp(t* − t) for a largest entry e^t.
    """

    def __init__(self, system: System, method: str, z: Tensor, tol: float) -> None:
        self._system, self._tol, self.z = system, tol, z
        problem = system.problem
        self._flat = FlatSweeps(problem) if method == "two-level" and system.blocks and are_few(problem) else None
        self._order = system.structure.order(method) if self._flat is None else []
        start = self._swept(z, 1 if is_separable(problem) else FIRST)
        if system.blocks and not is_separable(problem) and not are_differences(problem):
            for _ in range(FIRST):
                start = self._swept(least_by_families(problem, start), FIRST)
        self._bound, least = least_maximum(problem, start)
        self._next = least if method == "two-level" else z
        self._sweeps, self._lowered, self._imbalance = 0, 0, self._flat.imbalance(z) if self._flat else system.residual(z)
        self.residual = self._gap()

    @property
    def is_done(self) -> bool:
        """Nothing moves any more; or the bound is reached, and channels below it are even enough."""
        is_still = self._imbalance <= min(self._tol, STALLED) or self._sweeps - self._lowered >= PLATEAU
        return is_still or (self.residual <= self._tol and (self._imbalance <= self._tol or self._sweeps >= EVEN))

    def cycle(self) -> None:
        """One sweep over all families."""
        self.z, self._sweeps = self._swept(self._next, 1), self._sweeps + 1
        self._next, before = self.z, self.residual
        if before > ROUNDING:  # sweeps never raise a maximum
            self.residual = self._gap()
        if self.residual < before - 1e-12:
            self._lowered = self._sweeps

    def _swept(self, z: Tensor, count: int) -> Tensor:
        """After so many sweeps; notes the imbalance ρ of channels when the last sweep met them."""
        z = z.clone()
        for _ in range(count):
            if self._flat is not None:
                z, self._imbalance = self._flat.sweep(z)
            else:
                self._imbalance = imbalance([self._system.sweep(z, family) for family in self._order])
        return z

    def _gap(self) -> float:
        if self._flat is not None:
            largest = self._flat.largest(self.z)
        else:
            largest = max((block.log_total(self.z, self._system.norm) for block in self._system.blocks), default=-math.inf)
        return gap(self._bound, largest)


_Descent = SeparableDescent | ModelDescent | _Least | _Sweeps
"""Cycles that go down, and where they are: `z`, `residual`, `is_done`, `cycle()`."""
