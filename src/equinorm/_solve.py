"""Minimise a sum of exponentials: block coordinate descent over families of channels, two-level and accelerated.

The coordinate step of a channel with in-energy r (terms in which its log-scale enters with a positive exponent) and
out-energy s (negative) is z += log(s / r) / 2q; for p-norms that is D = √(R/L). All channels of a family may take it at
once: by Cauchy-Schwarz the objective never increases, even if terms join them, as long as the exponents of the family in one
term sum to at most 1 on either sign (otherwise divide the step by that sum).

Slow modes are one scalar for each family. The two-level method minimises over those first. For finite p it works on the
rank-one model (`_rank_one`) that each reading of the weights gives; Anderson's acceleration takes over what the model misses,
and is undone where it fails.

Sources: Stock et al., ICLR 2019, Algorithm 1; Osborne, JACM 1960; Anderson, JACM 1965.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._blocks import GROUND, AnyBlock, Problem, stiffness
from equinorm._families import minimise_families, red_black
from equinorm._rank_one import RankOne

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
        residuals: ρ before the first cycle and after each.
        dead: mask over 0..num_free of classes that no path joins to an input and an output.
    """

    problem: Problem
    z: Tensor
    residuals: tuple[float, ...]
    dead: Tensor


PATIENCE = 50
"""Cycles without a smaller residual after which it is taken to be rounding, …"""

STALLED = 1e-10
"""… if it is below this."""

Progress = Callable[[int, float], None]


def solve(
    problem: Problem, method: str, cycles: int | None, tol: float, limit: int, progress: Progress | None = None
) -> Solution:
    """Run cycles until the residual ρ is at most `tol`, or exactly `cycles` of them.

    Args:
        problem: the energies.
        method: "two-level" or "cyclic" (Algorithm 1).
        cycles: number of cycles; None for as many as `tol` takes, at most `limit`.
        tol: on ρ = ‖in − out‖₁ / ‖in + out‖₁.
        limit: largest number of cycles when `cycles` is None.
        progress: called with the number of the cycle and ρ.
    """
    system = _System(problem)
    z = torch.zeros(problem.num_free + 1, dtype=torch.float64)
    dead = torch.zeros(problem.num_free + 1, dtype=torch.bool)
    while bool((more := system.dead(z)).any()):  # a product dies with any of its factors, and may leave others dead
        dead |= more
        problem = problem.without(dead)
        system = _System(problem)
        system.live &= ~dead
    by_model = method == "two-level" and not problem.maximum
    descent = _Modelled(problem, system.live, z, tol) if by_model else _Sweeps(system, method, z)
    residuals = [descent.residual]
    while (
        len(residuals) - 1 < cycles
        if cycles is not None
        else residuals[-1] > tol and len(residuals) - 1 < limit and not _is_stalled(residuals)
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
    """Coordinate steps on the energies themselves: Algorithm 1, and the two-level method for p = ∞."""

    def __init__(self, system: "_System", method: str, z: Tensor) -> None:
        self._system, self.z = system, z
        count = len(system.problem.families)
        self._order = red_black(system.blocks, count) if method == "two-level" else range(count)
        self._levels = method == "two-level" and system.is_chained
        self.residual = system.residual(z)

    def cycle(self) -> None:
        """One sweep over all families, after one over one scalar for each."""
        self.z = self.z.clone()
        if self._levels:
            self._system.level(self.z)
        for family in self._order:
            self._system.sweep(self.z, family)
        self.residual = self._system.residual(self.z)


class _Modelled:
    """Minima of the rank-one models that readings give. A cycle uses every weight twice, as one of Algorithm 1 does."""

    def __init__(self, problem: Problem, live: Tensor, z: Tensor, tol: float) -> None:
        self._problem, self._tol = problem, tol
        self._model, self._mixer = RankOne(problem, live), _Mixer()
        self._read(z)

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


class _System:
    """Energies by family, as the sweeps read them."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.q, self.maximum = problem, problem.q, problem.maximum
        self.blocks = [block for block in problem.blocks if not block.is_empty]
        self.touching: list[list[tuple[AnyBlock, int]]] = [[] for _ in problem.families]
        self.stiffness = [1.0] * len(problem.families)
        self.live = torch.zeros(problem.num_free + 1, dtype=torch.bool)
        self.is_chained = any(len({side.family for side in block.sides} - {GROUND}) > 1 for block in self.blocks)
        for block in self.blocks:
            for place, side in enumerate(block.sides):
                if side.family != GROUND:
                    self.touching[side.family].append((block, place))
                    self.live[side.ids] = True
                    self.stiffness[side.family] = max(self.stiffness[side.family], stiffness(block.sides, side.family))

    def energies(self, z: Tensor, family: int) -> tuple[Tensor, Tensor]:
        """Log-energies into and out of every channel of a family."""
        first, last = self.problem.families[family]
        parts: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
        for block, place in self.touching[family]:
            side = block.sides[place]
            logs = block.log_energies(place, z, self.q, self.maximum) + math.log(abs(side.exponent))
            parts[side.exponent < 0].append((side.ids - first, logs))
        return self._gather(parts[0], last - first), self._gather(parts[1], last - first)

    def _gather(self, parts: Sequence[tuple[Tensor, Tensor]], size: int) -> Tensor:
        """log Σ exp (or maximum) of the logs that share an id."""
        empty = torch.full((size,), -math.inf, dtype=torch.float64)
        if not parts:
            return empty
        ids, logs = torch.cat([i for i, _ in parts]), torch.cat([v for _, v in parts])
        top = empty.scatter_reduce(0, ids, logs, "amax")
        if self.maximum:
            return top
        safe = torch.where(top.isfinite(), top, 0.0)
        return torch.zeros_like(empty).scatter_add(0, ids, torch.exp(logs - safe[ids])).log() + safe

    def sweep(self, z: Tensor, family: int) -> None:
        """The coordinate step of every live channel of a family at once."""
        first, last = self.problem.families[family]
        into, out = self.energies(z, family)
        step = (out - into) / (2 * self.q * self.stiffness[family])
        z[first:last] += torch.where(step.isfinite(), step, 0.0)

    def residual(self, z: Tensor) -> float:
        """ρ = ‖in − out‖₁ / ‖in + out‖₁ over all channels."""
        both = [self.energies(z, family) for family in range(len(self.problem.families))]
        if not both:
            return 0.0
        into, out = torch.cat([i for i, _ in both]), torch.cat([o for _, o in both])
        top = float(torch.maximum(into, out).max())
        if top == -math.inf:
            return 0.0
        into, out = torch.exp(into - top), torch.exp(out - top)
        return float((into - out).abs().sum() / (into + out).sum())

    # ------------------------------------------------------------------------------------------------- one per family

    def level(self, z: Tensor) -> None:
        """Minimise over one scalar for each family, exactly."""
        count = len(self.problem.families)
        logs = torch.tensor([block.log_total(z, self.q, self.maximum) for block in self.blocks], dtype=torch.float64)
        exponents = torch.zeros(len(self.blocks), count + 1, dtype=torch.float64)
        for row, block in enumerate(self.blocks):
            for side in block.sides:
                exponents[row, side.family] += side.exponent  # GROUND is the last column
        live = logs.isfinite() & exponents[:, :-1].any(1)
        shifts = minimise_families(logs[live], exponents[live, :-1] * self.q, self.maximum)
        for (first, last), shift in zip(self.problem.families, shifts.tolist(), strict=True):
            z[first:last] += shift * self.live[first:last]

    # ----------------------------------------------------------------------------------------------------------- dead

    def dead(self, z: Tensor) -> Tensor:
        """Classes that are not both reached from the ground and reach it, through nonzero energies."""
        return self.live & ~(self._reach(z, 1) & self._reach(z, -1))

    def _reach(self, z: Tensor, sign: int) -> Tensor:
        """Classes reached from the ground forwards (sign 1: against negative exponents, along positive ones) or backwards."""
        reached = torch.zeros(len(z), dtype=torch.bool)
        reached[0] = True
        order = range(len(self.problem.families))[::sign]
        while True:
            before = int(reached.sum())
            for family in order:
                for block, place in self.touching[family]:
                    side = block.sides[place]
                    if side.exponent * sign > 0 and not bool(reached[side.ids].all()):
                        reached[side.ids[self._hits(block, place, z, reached, sign)]] = True
            if int(reached.sum()) == before or bool(reached.all()):
                return reached

    def _hits(self, block: AnyBlock, place: int, z: Tensor, reached: Tensor, sign: int) -> Tensor:
        """Channels of one side that a nonzero energy joins to sources that are all reached."""
        ready = [
            reached[side.ids] | (side.exponent * sign > 0)
            if side.family != GROUND
            else torch.ones_like(side.ids, dtype=torch.bool)
            for side in block.sides
        ]
        if block.is_matrix and bool(ready[1 - place].all()):
            return block.log_energies(place, z, self.q, self.maximum) > -math.inf
        if block.is_matrix and not bool(ready[1 - place].any()):
            return torch.zeros_like(ready[place])
        return block.hits(place, ready)


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
