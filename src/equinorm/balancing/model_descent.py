"""The two-level method for finite p: minima of rank-one models, and Anderson's acceleration for what these miss."""

import torch
from torch import Tensor

from equinorm.balancing.problem import Problem
from equinorm.balancing.rank_one import RankOne

DEPTH = 8
"""Iterates that the acceleration remembers."""

COARSE = 3e-6
"""Residual from which on sums in float32 no longer show the way."""

ROUNDING = 1e-14
"""Residual that a model cannot be asked to go below."""


class ModelDescent:
    """Minima of the rank-one models that readings give. A cycle uses every weight twice, as one of Algorithm 1 does."""

    def __init__(self, problem: Problem, live: Tensor, z: Tensor, tol: float) -> None:
        self._problem, self._tol = problem, tol
        self._model, self._mixer = RankOne(problem, live), Mixer()
        self._go_to(z)

    @property
    def is_done(self) -> bool:
        """Is the residual small enough?"""
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
            self._go_to(target)
            # Near the minimum the objective is all rounding; there the residual tells.
            if self._value <= value + 1e-12 or self.residual < before:
                return
            if target is end:
                self._mixer.forget()

    def _go_to(self, z: Tensor) -> None:
        z = z if self._problem.shared is None else self._problem.shared.agreed(z)
        self._model.read_energies_at(z)
        self.z, self._value, self.residual = z, self._model.value(), self._model.residual()
        if self.residual <= COARSE and self._tol < 1e-6 and not self._problem.is_precise:
            self._problem.refine()
            self._go_to(z)


class Mixer:
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
