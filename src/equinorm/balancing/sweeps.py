"""Energies into and out of channels, family by family: the coordinate steps of Algorithm 1, and which channels are dead."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from equinorm.balancing.blocks import AnyBlock
from equinorm.balancing.families import FamilyStructure
from equinorm.balancing.problem import Problem
from equinorm.balancing.sides import GROUND


class System:
    """Energies by family, as the sweeps read them."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.norm = problem, problem.norm
        self.blocks = [block for block in problem.blocks if not block.is_empty]
        self.touching: list[list[tuple[AnyBlock, int]]] = [[] for _ in problem.families]
        self._joining: list[list[tuple[AnyBlock, int]]] = [[] for _ in problem.families]
        others = set(map(id, problem.others))
        self.structure = FamilyStructure([block.sides for block in self.blocks], len(problem.families), problem.norm)
        self.live = torch.zeros(problem.num_free + 1, dtype=torch.bool)
        for block in self.blocks:
            for place, side in enumerate(block.sides):
                if side.family != GROUND:
                    self.touching[side.family].append((block, place))
                    if id(block) in others:
                        self._joining[side.family].append((block, place))
                        self.live[side.ids] = True
        if problem.singles is not None:
            self.live[problem.singles.ids] = True

    def energies(self, z: Tensor, family: int) -> tuple[Tensor, Tensor]:
        """Log-energies into and out of every channel of a family."""
        first, last = self.problem.families[family]
        parts: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
        for block, place in self.touching[family]:
            side = block.sides[place]
            logs = block.log_energies(place, z, self.norm)
            if not self.norm.is_max:  # an exponent belongs to the gradient of a sum; a maximum is what it is
                logs = logs + math.log(abs(side.exponent))
            parts[side.exponent < 0].append((side.ids - first, logs))
        return self._gather(parts[0], last - first), self._gather(parts[1], last - first)

    def _gather(self, parts: Sequence[tuple[Tensor, Tensor]], size: int) -> Tensor:
        """log Σ exp (or maximum) of the logs that share an id."""
        if not parts:
            return torch.full((size,), -math.inf, dtype=torch.float64)
        return self.norm.join_by(torch.cat([ids for ids, _ in parts]), torch.cat([logs for _, logs in parts]), size)

    def sweep(self, z: Tensor, family: int) -> tuple[Tensor, Tensor]:
        """The coordinate step of every live channel of a family at once; returns log-energies into and out of it before."""
        first, last = self.problem.families[family]
        into, out = self.energies(z, family)
        step = (out - into) * self.structure.steps[family]
        z[first:last] += torch.where(step.isfinite(), step, 0.0)
        return into, out

    def residual(self, z: Tensor) -> float:
        """ρ = ‖in − out‖₁ / ‖in + out‖₁ over all channels."""
        return imbalance([self.energies(z, family) for family in range(len(self.problem.families))])

    # ----------------------------------------------------------------------------------------------------------- dead

    def dead(self, z: Tensor) -> Tensor:
        """Classes that are not both reached from the ground and reach it, through nonzero energies."""
        if self.problem.shared is not None:
            self.problem.shared.read(z)
        return self.live & ~(self._reach(z, 1) & self._reach(z, -1))

    def _reach(self, z: Tensor, sign: int) -> Tensor:
        """Classes reached from the ground forwards (sign 1: against negative exponents, along positive ones) or backwards."""
        reached = torch.zeros(len(z), dtype=torch.bool)
        reached[0] = True
        order = [family for family in range(len(self.problem.families))[::sign] if self._joining[family]]
        singles = self.problem.singles
        if singles is not None:
            reached |= singles.maxima(len(z))[sign < 0] > -math.inf
        shared, known = self.problem.shared, 0
        if not order and shared is None:
            return reached
        while True:
            before = int(reached.sum())
            for family in order:
                for block, place in self._joining[family]:
                    side = block.sides[place]
                    if side.exponent * sign > 0 and not bool(reached[side.ids].all()):
                        reached[side.ids[self._hits(block, place, z, reached, sign)]] = True
            if int(reached.sum()) == before or bool(reached.all()):
                if shared is None:
                    return reached
                reached, last = shared.joined(reached), known
                known = int(reached.sum())
                if known == last or bool(reached.all()):  # what all processes know alike, so that all end together
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
            return block.log_energies(place, z, self.norm) > -math.inf
        if block.is_matrix and not bool(ready[1 - place].any()):
            return torch.zeros_like(ready[place])
        return block.hits(place, ready)


def gap(bound: float, largest: float) -> float:
    """1 − exp(t* − t) of a largest log-entry t and the least t* that there can be; 0 where there are no entries."""
    return max(0.0, -math.expm1(bound - largest)) if math.isfinite(largest) else 0.0


def imbalance(ends: Sequence[tuple[Tensor, Tensor]]) -> float:
    """ρ = ‖in − out‖₁ / ‖in + out‖₁, from the logarithms of energies into and out of channels, family by family."""
    if not ends:
        return 0.0
    into, out = torch.cat([i for i, _ in ends]), torch.cat([o for _, o in ends])
    top = float(torch.maximum(into, out).max())
    if top == -math.inf:
        return 0.0
    into, out = torch.exp(into - top), torch.exp(out - top)
    return float((into - out).abs().sum() / (into + out).sum())
