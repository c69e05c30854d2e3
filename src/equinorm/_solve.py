"""Minimise a sum of exponentials: block coordinate descent over families of channels, two-level and accelerated.

The coordinate step of a channel with in-energy r (terms in which its log-scale enters with a positive exponent) and
out-energy s (negative) is z += log(s / r) / 2q; for p-norms that is D = √(R/L). All channels of a family may take it at
once: by Cauchy-Schwarz the objective never increases, even if terms join them, as long as the exponents of the family in one
term sum to at most 1 on either sign (otherwise divide the step by that sum).

Slow modes are one scalar for each family. The two-level method minimises over those first: a problem as small as the number
of families, by sweeps and then Newton steps. Anderson's acceleration takes over what is left, and is undone where it fails.

Sources: Stock et al., ICLR 2019, Algorithm 1; Osborne, JACM 1960; Anderson, JACM 1965.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equinorm._blocks import GROUND, Block, Problem, stiffness
from equinorm._layout import Part

DEPTH = 8
"""Iterates that the acceleration remembers."""


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


def solve(
    problem: Problem,
    method: str,
    cycles: int | None,
    tol: float,
    limit: int,
    progress: Callable[[int, float], None] | None = None,
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
    dead = system.dead(z)
    if bool(dead.any()):
        problem = problem.without(dead)
        system = _System(problem)
    system.live &= ~dead
    order = red_black(system.blocks, len(problem.families)) if method == "two-level" else range(len(problem.families))
    mixer = _Mixer()
    residuals = [system.residual(z)]
    while (len(residuals) - 1 < cycles) if cycles is not None else (residuals[-1] > tol and len(residuals) - 1 < limit):
        accelerates = method == "two-level" and not problem.maximum
        start = mixer.propose(z) if accelerates else z
        end = start.clone()
        if method == "two-level" and system.is_chained:
            system.level(end)
        for family in order:
            system.sweep(end, family)
        residual = system.residual(end)
        safe = start is z or residual < residuals[-1]  # plain cycles never fail; near the minimum the objective is all rounding
        if accelerates and residual > tol and not mixer.accept(start, end, system.log_objective(end), safe):
            end, residual = z, residuals[-1]  # the jump did not pay: stay
        z = end
        residuals.append(residual)
        if progress is not None:
            progress(len(residuals) - 1, residual)
    return Solution(problem, z, tuple(residuals), dead)


class _System:
    """Energies by family, as the sweeps read them."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.q, self.maximum = problem, problem.q, problem.maximum
        self.blocks = [block for block in problem.blocks if block.energies.numel()]
        self.touching: list[list[tuple[Block, int]]] = [[] for _ in problem.families]
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

    def log_objective(self, z: Tensor) -> float:
        """Logarithm of all energies that move."""
        return self.problem.join([block.log_total(z, self.q, self.maximum) for block in self.blocks] or [-math.inf])

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
                    if side.exponent * sign > 0:
                        reached[side.ids[self._hits(block, place, z, reached, sign)]] = True
            if int(reached.sum()) == before or bool(reached.all()):
                return reached

    def _hits(self, block: Block, place: int, z: Tensor, reached: Tensor, sign: int) -> Tensor:
        """Channels of one side that a nonzero energy joins to sources that are all reached."""
        ready = [
            reached[side.ids] | (side.exponent * sign > 0)
            if side.family != GROUND
            else torch.ones_like(side.ids, dtype=torch.bool)
            for side in block.sides
        ]
        if not block.is_matrix:
            return torch.stack([r for i, r in enumerate(ready) if i != place] + [block.energies > 0]).all(0)
        other = ready[1 - place]
        if bool(other.all()):
            return block.log_energies(place, z, self.q, self.maximum) > -math.inf
        matrix = block.energies if place == 0 else block.energies.T
        return matrix @ other.to(matrix.dtype) > 0


def red_black(blocks: Sequence[Block | Part], count: int) -> list[int]:
    """Families in an order for sweeps: two-coloured where no block joins two of one colour, otherwise as they were made."""
    colour: dict[int, int] = {}
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for block in blocks:
        for one in block.sides:
            for other in block.sides:
                if GROUND not in (one.family, other.family) and one is not other:
                    neighbours[one.family].add(other.family)
    for start in range(count):
        stack = [] if start in colour else [(start, 0)]
        while stack:
            family, shade = stack.pop()
            if colour.setdefault(family, shade) != shade:
                return list(range(count))
            stack += [(other, 1 - shade) for other in neighbours[family] if colour.get(other) != 1 - shade]
    return sorted(colour, key=lambda family: (colour[family], family))


def minimise_families(logs: Tensor, exponents: Tensor, maximum: bool) -> Tensor:
    """Minimise Σ_b exp(logs[b] + exponents[b]·t), or the largest summand, over t; shapes (blocks,) and (blocks, families).

    Sweeps of coordinate steps bring disparate terms together, then Newton's method with backtracking finishes.
    """
    L, A = logs.numpy(), exponents.numpy()
    t = np.zeros(A.shape[1])
    columns = [(f, np.flatnonzero(A[:, f])) for f in range(A.shape[1])]
    columns = [(f, rows, A[rows, f]) for f, rows in columns if (A[rows, f] > 0).any() and (A[rows, f] < 0).any()]
    join = np.max if maximum else np.logaddexp.reduce
    for _ in range(200 if maximum else 8):
        moved = 0.0
        for f, rows, a in columns:
            terms = L[rows] + A[rows] @ t + np.log(np.abs(a))
            step = (join(terms[a < 0]) - join(terms[a > 0])) / (2 * np.abs(a).max())
            t[f] += step
            moved = max(moved, abs(step))
        if moved < 1e-14:
            break
    if maximum or not columns:
        return torch.from_numpy(t)
    free = [f for f, _, _ in columns]
    B = A[:, free]
    for _ in range(60):
        terms = L + A @ t
        top = terms.max()
        weights = np.exp(terms - top)
        gradient = weights @ B
        hessian = (B * weights[:, None]).T @ B
        hessian[np.diag_indices_from(hessian)] *= 1 + 1e-12
        hessian[np.diag_indices_from(hessian)] += 1e-300
        step = np.linalg.lstsq(hessian, -gradient, rcond=1e-14)[0]
        decrease = -float(gradient @ step)
        if decrease <= 1e-28 * weights.sum() or not np.isfinite(step).all():
            break
        length = 1.0
        while length > 1e-6:
            trial = t.copy()
            trial[free] += length * step
            lower = np.exp(L + A @ trial - top).sum() <= weights.sum() - 1e-4 * length * decrease
            if lower or decrease < 1e-13 * weights.sum():
                break
            length /= 2
        else:
            break
        t = trial
    return torch.from_numpy(t)


class _Mixer:
    """Anderson's acceleration of a fixed-point iteration, with the objective as its safeguard."""

    def __init__(self) -> None:
        self.starts: list[Tensor] = []
        self.ends: list[Tensor] = []
        self.value = math.inf

    def propose(self, z: Tensor) -> Tensor:
        """Where to start the next cycle: z, or a jump from there that the last cycles suggest."""
        if len(self.starts) < 2:
            return z
        ends = torch.stack(self.ends, 1)
        moves = ends - torch.stack(self.starts, 1)
        weights = torch.linalg.lstsq(moves.diff(dim=1), moves[:, -1:], driver="gelsd").solution
        mixed = z - (ends.diff(dim=1) @ weights)[:, 0]
        return mixed if bool(mixed.isfinite().all()) else z

    def accept(self, start: Tensor, end: Tensor, value: float, safe: bool) -> bool:
        """Remember a cycle with this log-objective at its end; False, and forget all, if it has grown and nothing is `safe`."""
        if value > self.value + 1e-12 and not safe:
            self.starts.clear()
            self.ends.clear()
            return False
        self.value = value
        self.starts, self.ends = [*self.starts, start][-DEPTH:], [*self.ends, end][-DEPTH:]
        return True
