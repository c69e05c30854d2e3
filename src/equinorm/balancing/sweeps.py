"""Energies into and out of channels, family by family: the coordinate steps of Algorithm 1, and which channels are dead."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from equinorm.balancing.blocks import AnyBlock
from equinorm.balancing.families import FamilyStructure
from equinorm.balancing.problem import Problem
from equinorm.balancing.sides import GROUND

LEAST_SLACK = 2.0**-50
"""What has been halved so often is no slack."""


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
        """Classes that can run away upwards or downwards, since nonzero energies do not hold them."""
        if self.problem.shared is not None:
            self.problem.shared.read(z)
        return self.live & ((self._slack(z, 1) > 0) | (self._slack(z, -1) > 0))

    def _slack(self, z: Tensor, sign: int) -> Tensor:
        """How far each class can go up (sign 1) or down (−1), at most 1, where no energy may grow: 0 where it is held.

        An energy with exponents a lets class s go as far as Σ |a_r / a_s| slack_r, over the classes r of opposite exponents,
        which make room by going the same way. So it hands on what holds, from the ground: exactly for exponents 1 and −1,
        else by a part each time, as around a circle, down to `LEAST_SLACK`.
        """
        slack = torch.ones(len(z), dtype=torch.float64)
        slack[0] = 0.0
        families = self._joining[::sign]
        places = [(block, place) for own in families for block, place in own if block.sides[place].exponent * sign > 0]
        singles = self.problem.singles
        if singles is not None:
            slack[singles.maxima(len(z))[sign < 0] > -math.inf] = 0.0
        shared, known = self.problem.shared, torch.ones_like(slack)
        if not places and shared is None:
            return slack
        while True:
            before = slack.clone()
            for block, place in places:
                self._hold(slack, block, place, z)
            if _is_settled(slack, before):
                if shared is None:
                    return slack
                slack, last = shared.joined(slack), known
                known = slack.clone()
                if _is_settled(known, last):  # what all processes know alike, so that all end together
                    return slack

    def _hold(self, slack: Tensor, block: AnyBlock, place: int, z: Tensor) -> None:
        """Lower the slack of the classes along one side of a block to what its nonzero energies allow."""
        side = block.sides[place]
        own = slack[side.ids]
        if not bool(own.any()):
            return
        rooms = [  # that the others make
            abs(other.exponent / side.exponent) * slack[other.ids]
            for other in block.sides
            if other.family != GROUND and other.exponent * side.exponent < 0
        ]
        rooms = [room for room in rooms if bool(room.any())]
        if not rooms or not block.is_matrix:
            is_there = block.log_energies(place, z, self.norm) > -math.inf
            own = torch.where(is_there, torch.minimum(own, torch.stack(rooms).sum(0)) if rooms else 0.0, own)
        else:
            for level in torch.unique(*rooms).tolist():
                if level < float(own.amax()):
                    own = torch.where(block.hits(place, rooms[0] <= level), own.clamp(max=level), own)
        own = torch.where(own < LEAST_SLACK, 0.0, own)
        slack.scatter_reduce_(0, side.ids, own, "amin")


def _is_settled(slack: Tensor, before: Tensor) -> bool:
    """Does nothing change by more than a hundredth, or is nothing left?"""
    return not bool(slack.any()) or bool((slack >= 0.99 * before).all())


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
