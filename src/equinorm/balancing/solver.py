"""Minimise a sum of exponentials: block coordinate descent over families of channels, two-level and accelerated.

The coordinate step of a channel with in-energy r (terms in which its log-scale enters with a positive exponent) and
out-energy s (negative) is z += log(s / r) / 2q; for p-norms that is D = √(R/L). All channels of a family may take it at
once: by Cauchy-Schwarz the objective never increases, even if terms join them, as long as the exponents of the family in one
term sum to at most 1 on either sign (otherwise divide the step by that sum).

Slow modes are one scalar for each family. For finite p the two-level method minimises over those first. It works on the
rank-one model (`_rank_one`) that each reading of the weights gives; Anderson's acceleration takes over what the model misses,
and is undone where it fails. For p = ∞ the least maximum is found first (`_maximum`), and sweeps make channels below it even.

Sources: Stock et al., ICLR 2019, Algorithm 1; Osborne, JACM 1960; Anderson, JACM 1965.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm.balancing.families import red_black
from equinorm.balancing.least_maximum import FlatSweeps, are_differences, are_few, least_by_families, least_maximum
from equinorm.balancing.problem import Problem
from equinorm.balancing.rank_one import RankOne
from equinorm.balancing.sweeps import System, apart

DEPTH = 8
"""Iterates that the acceleration remembers."""

COARSE = 3e-6
"""Residual from which on sums in float32 no longer show the way."""

ROUNDING = 1e-14
"""Residual that a model cannot be asked to go below."""


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


def solve(
    problem: Problem, method: str, cycles: int | None, tol: float, limit: int, progress: Progress | None = None
) -> Solution:
    """Run cycles until the residual is at most `tol`, or exactly `cycles` of them.

    Args:
        problem: the energies.
        method: "two-level" or "cyclic" (Algorithm 1).
        cycles: number of cycles; None for as many as `tol` takes, at most `limit`.
        tol: on the residual; for p = ∞ also on ρ = ‖in − out‖₁ / ‖in + out‖₁, or as far as `EVEN` sweeps lead.
        limit: largest number of cycles when `cycles` is None.
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
    if problem.maximum:
        descent = _Least(system, method, z, tol)
    else:
        descent = _Modelled(problem, system.live, z, tol) if method == "two-level" else _Sweeps(system, z, tol)
    residuals = [descent.residual]
    while (
        len(residuals) - 1 < cycles
        if cycles is not None
        else not descent.is_done and len(residuals) - 1 < limit and not _is_stalled(residuals)
    ):
        descent.cycle()
        residuals.append(descent.residual)
        if progress is not None:
            progress(len(residuals) - 1, descent.residual)
    return Solution(problem, descent.z, tuple(residuals), dead)


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
        count = len(problem.families)
        self._order = red_black(system.blocks, count) if method == "two-level" else range(count)
        self._flat = FlatSweeps(problem) if method == "two-level" and system.blocks and are_few(problem) else None
        start = self._swept(z, FIRST)
        if system.blocks and not are_differences(problem):
            for _ in range(FIRST):
                start = self._swept(least_by_families(problem, start), FIRST)
        self._bound, least = least_maximum(problem, start)
        self._next = least if method == "two-level" else z
        self._sweeps, self._lowered, self._apart = 0, 0, system.residual(z)
        self.residual = self._gap()

    @property
    def is_done(self) -> bool:
        """Nothing moves any more; or the bound is reached, and channels below it are even enough."""
        is_still = self._apart <= min(self._tol, STALLED) or self._sweeps - self._lowered >= PLATEAU
        return is_still or (self.residual <= self._tol and (self._apart <= self._tol or self._sweeps >= EVEN))

    def cycle(self) -> None:
        """One sweep over all families."""
        self.z, self._sweeps = self._swept(self._next, 1), self._sweeps + 1
        self._next, before = self.z, self.residual
        if before > ROUNDING:  # sweeps never raise a maximum
            self.residual = self._gap()
        if self.residual < before - 1e-12:
            self._lowered = self._sweeps

    def _swept(self, z: Tensor, count: int) -> Tensor:
        """After so many sweeps; how far in and out were apart when the last one met them is noted."""
        z = z.clone()
        for _ in range(count):
            if self._flat is not None:
                z, self._apart = self._flat.sweep(z)
            else:
                self._apart = apart([self._system.sweep(z, family) for family in self._order])
        return z

    def _gap(self) -> float:
        if self._flat is not None:
            largest = self._flat.largest(self.z)
        else:
            largest = max((block.log_total(self.z, 1.0, True) for block in self._system.blocks), default=-math.inf)
        return max(0.0, -math.expm1(self._bound - largest)) if math.isfinite(largest) else 0.0


class _Modelled:
    """Minima of the rank-one models that readings give. A cycle uses every weight twice, as one of Algorithm 1 does."""

    def __init__(self, problem: Problem, live: Tensor, z: Tensor, tol: float) -> None:
        self._problem, self._tol = problem, tol
        self._model, self._mixer = RankOne(problem, live), _Mixer()
        self._read(z)

    @property
    def is_done(self) -> bool:
        return self.residual <= self._tol

    def cycle(self) -> None:
        """Two steps; one if that is enough."""
        self._step()
        if self.residual > self._tol:
            self._step()

    def _step(self) -> None:
        """Go to the model's minimum, or where the acceleration expects the true one; read again there."""
        start, value, before = self.z, self._value, self.residual
        end = start + self._model.minimise(max(before / 100, self._tol / 10, ROUNDING))
        careful = start + self._model.parallel_step()
        jump = self._mixer.propose(start, end)
        for target in [end, careful] if jump is None else [jump, end, careful]:
            self._read(target)
            # Near the minimum the objective is all rounding; there the residual tells.
            if self._value <= value + 1e-12 or self.residual < before:
                return
            if target is end:
                self._mixer.forget()

    def _read(self, z: Tensor) -> None:
        self._model.read(z)
        self.z, self._value, self.residual = z, self._model.value(), self._model.residual()
        if self.residual <= COARSE and self._tol < 1e-6 and not self._problem.is_precise:
            self._problem.refine()
            self._read(z)


class _Mixer:
    """Anderson's acceleration of a fixed-point iteration."""

    def __init__(self) -> None:
        self._starts: list[Tensor] = []
        self._ends: list[Tensor] = []

    def propose(self, start: Tensor, end: Tensor) -> Tensor | None:
        """Where the fixed point should be, after a step from start to end and those before it; None if they do not tell."""
        self._starts, self._ends = [*self._starts, start][-DEPTH:], [*self._ends, end][-DEPTH:]
        if len(self._starts) < 2:
            return None
        ends = torch.stack(self._ends, 1)
        moves = ends - torch.stack(self._starts, 1)
        weights = torch.linalg.lstsq(moves.diff(dim=1), moves[:, -1:], driver="gelsd").solution
        mixed = end - (ends.diff(dim=1) @ weights)[:, 0]
        return mixed if bool(mixed.isfinite().all()) else None

    def forget(self) -> None:
        """Start anew: the steps so far do not lead on."""
        self._starts.clear()
        self._ends.clear()
