"""Cycles on the device where the weights are, recorded once: no analysis, no synchronisation, no float64 copies.

One cycle reads every weight once, for its energies; sweeps are products with these. Log-scales start at 0 in every step, and
stay small while training, so sums are taken as they are. Channels without energy on one side, or with energies that are not
finite, stay at scale 1.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equinorm._errors import BalanceError
from equinorm.balancing.energy_reader import Reading
from equinorm.balancing.families import FamilyStructure
from equinorm.balancing.layout import NetworkLayout
from equinorm.balancing.norm import Norm
from equinorm.native import Compute
from equinorm.training.local_parts import Ends, LocalParts, levels, summed_ends
from equinorm.training.native_cycle import Schedule, program
from equinorm.training.recorded_blocks import edges_of, recorded

NEWTON_STEPS = 3
LONGEST_STEP = 0.5
"""Of one Newton step over families: they start near the minimum."""


@dataclass(slots=True)
class _State:
    """One run.

    Attributes:
        uses: how often each tensor's energies will be needed from now on.
        energies: those that have been read and will be needed again: few, so that they stay in the cache.
        z: log-scales of the families that have moved.
        scales: that these give, by block and side.
    """

    uses: list[int]
    energies: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class RecordedCycle:
    """Cycles of Algorithm 1, or of the two-level method.

    Args:
        network: the layouts of the tensors whose norm counts.
        parts: what this process holds of the tensors; their devices, dtypes and strides must stay what they are.
        norm: whose energies these are.
        method: "cyclic" or "two-level".
        compute: where the weights are, the dtype of the sums, and whether compiled kernels run where they know all of this.
    """

    def __init__(self, network: NetworkLayout, parts: LocalParts, norm: Norm, method: str, compute: Compute) -> None:
        device, dtype = compute.device, compute.dtype
        self._network, self._norm, self._q, self._maximum = network, norm, norm.q, norm.is_max
        self._zero, self._one = torch.zeros(1, device=device, dtype=dtype), torch.ones(1, device=device, dtype=dtype)
        self._fixed = [torch.zeros(last - first, device=device, dtype=dtype) for first, last in network.families]
        held, self._processes = parts.network(network), parts.processes
        self._blocks = [recorded(index, part, held, device) for index, part in held.moving]
        self._edges = edges_of(self._blocks, network.families)
        structure = FamilyStructure([part.sides for _, part in network.moving], len(network.families), norm)
        self._order, self._steps, self._exponents = structure.order(method), structure.steps, structure.exponents.to(device)
        self._at_once = [[family] for family in self._order]
        if self._processes is not None:
            self._at_once = levels(self._order, structure.neighbours)
        self._levels_first = method == "two-level" and structure.is_chained
        schedule = Schedule(self._order, self._steps, self._levels_first, NEWTON_STEPS, LONGEST_STEP)
        self._program = program(network, parts.tensors, norm, dtype, schedule) if compute.native else None
        keeps = method == "two-level" and self._program is None
        used = {block.tensor for block in self._blocks if not block.is_empty}
        pairs = enumerate(zip(held.layouts, held.weights(parts.tensors), strict=True))
        self._readings = {index: Reading(*pair, norm, dtype, keeps) for index, pair in pairs if index in used}
        self._is_weighed, self._weights = False, torch.ones(len(self._blocks), device=device, dtype=dtype)
        swept = [edge.block for pair in self._edges for edges in pair for edge in edges]
        self._uses = self._counts(swept)
        self._level_uses = self._counts([*self._filled, *swept] if self._levels_first else ())

    @property
    def _filled(self) -> list[int]:
        """Numbers of the blocks of which this process holds something."""
        return [number for number, block in enumerate(self._blocks) if not block.is_empty]

    def _counts(self, blocks: Iterable[int]) -> list[int]:
        """How often each tensor is read, by the blocks that are."""
        counts = [0] * len(self._network.layouts)
        for number in blocks:
            counts[self._blocks[number].tensor] += 1
        return counts

    def weigh(self, c: float) -> None:
        """Let a weight of depth k count c^(−pk).

        Raises:
            BalanceError: if that is beyond floating point.
        """
        depths = [self._network.layouts[block.tensor].scaling.depth for block in self._blocks]
        middle = (min(depths, default=0) + max(depths, default=0)) / 2  # only ratios matter
        logs = [self._norm.log_weight(depth - middle, c) for depth in depths]
        largest = math.log(torch.finfo(self._zero.dtype).max) / 2
        widest = max(map(abs, logs), default=0.0)
        if widest > largest:
            raise BalanceError(f"c = {c:g} weighs layers by up to e^{widest:.0f} against one another: choose it closer to 1.")
        self._weights.copy_(torch.tensor(logs, dtype=torch.float64).exp())
        self._is_weighed = c != 1

    def run_cycles(self, cycles: int) -> Tensor:
        """Log-scales of classes 0..num_free after so many cycles on the current weights."""
        if self._program is not None:
            return self._program.run_cycles(self._weights.double(), cycles).to(self._zero.dtype)
        state = _State([cycles * sum(counts) for counts in zip(self._uses, self._level_uses, strict=True)])
        for _ in range(cycles):
            if self._levels_first:
                self._level(state)
            for families in self._at_once:
                for family, (into, out) in zip(families, self._ends(families, state), strict=True):
                    if into is not None and out is not None:
                        step = (torch.log(out) - torch.log(into)).nan_to_num_(0.0, 0.0, 0.0)
                        self._move(state, family, step * self._steps[family])
        return torch.cat([self._zero, *(state.z.get(family, fixed) for family, fixed in enumerate(self._fixed))])

    def residual(self) -> Tensor:
        """ρ = ‖in − out‖₁ / ‖in + out‖₁ of the current weights; NaN if an energy is not finite."""
        state = _State([*self._uses])
        apart, whole = torch.zeros_like(self._zero[0]), torch.zeros_like(self._zero[0])
        for into, out in self._ends(range(len(self._network.families)), state):
            if into is None or out is None:
                continue
            live = (into > 0) & (out > 0) | (into + out).isnan()  # without energy on one side there is no minimum
            apart = apart + torch.where(live, (into - out).abs(), 0.0).sum()
            whole = whole + torch.where(live, into + out, 0.0).sum()
        return torch.where(whole == 0, 0.0, apart / whole)

    def _move(self, state: _State, family: int, step: Tensor) -> None:
        """z ← z + step for one family; `step` broadcasts to its channels."""
        before = state.z.get(family, self._fixed[family])
        state.z[family] = before + step
        for edge in (edge for edges in self._edges[family] for edge in edges):
            state.scales.pop((edge.block, edge.side), None)

    # ----------------------------------------------------------------------------------------------------- energies

    def _block(self, state: _State, number: int) -> Tensor:
        """Energies of a block (with others in between where it is scattered), summed over axes that no scale tells apart."""
        block = self._blocks[number]
        if block.tensor not in state.energies:
            state.energies[block.tensor] = self._readings[block.tensor].read_energies()
        energies = state.energies[block.tensor]
        state.uses[block.tensor] -= 1
        if not state.uses[block.tensor]:
            del state.energies[block.tensor]
        for axis, pick in enumerate(block.part.picks):
            if block.scattered[axis] is None:
                energies = energies[pick] if axis == 0 else energies[:, pick]
        return energies if block.part.loops is None else energies.masked_fill(block.part.loops, 0.0)

    def _scale(self, state: _State, number: int, place: int) -> Tensor | None:
        """s^q of each channel along one side; None where it is 1: on the ground, and before the family moves."""
        block = self._blocks[number]
        side = block.part.sides[place]
        z = state.z.get(side.family)
        if z is None:
            return None
        if (number, place) not in state.scales:
            places = block.places[place]
            logs = z if places is None else z[places]
            state.scales[number, place] = torch.exp(logs * (self._q * side.exponent))
        return state.scales[number, place]

    def _along(self, state: _State, number: int, place: int) -> Tensor:
        """Energy of each channel (of each term) along one side of a block."""
        energies = self._block(state, number)
        if energies.dim() == 1:
            for other in range(len(self._blocks[number].part.sides)):
                scale = self._scale(state, number, other)
                energies = energies if scale is None else energies * scale
            return energies
        matrix = energies if place == 0 else energies.T
        own, other = self._scale(state, number, place), self._scale(state, number, 1 - place)
        here, there = (self._blocks[number].scattered[side] for side in (place, 1 - place))
        if there is not None:
            other = matrix.new_zeros(matrix.size(1)).index_copy_(
                0, there, self._one.expand(len(there)) if other is None else other
            )
        if self._maximum:
            sums = matrix.amax(1) if other is None else (matrix * other).amax(1)
        else:
            sums = matrix.sum(1) if other is None else matrix @ other
        sums = sums if here is None else sums[here]
        return sums if own is None else sums * own

    def _ends(self, families: Sequence[int], state: _State) -> list[Ends]:
        """Energies into and out of the channels of some families, over all processes."""
        found = [self._energies(family, state) for family in families]
        if self._processes is None:
            return found
        return summed_ends(self._processes, found, [self._fixed[family] for family in families], self._maximum)

    def _energies(self, family: int, state: _State) -> Ends:
        """Those that this process holds; None where nothing enters or leaves."""
        totals: list[Tensor | None] = []
        for edges in self._edges[family]:
            total: Tensor | None = None
            for edge in edges:
                amount = self._along(state, edge.block, edge.side)
                if edge.gather is not None:
                    amount = amount[edge.gather]
                    amount = amount if edge.mask is None else amount * edge.mask
                    amount = amount.amax(1) if self._maximum else amount.sum(1)
                exponent = abs(self._blocks[edge.block].part.sides[edge.side].exponent)
                amount = amount if exponent == 1 or self._maximum else amount * exponent
                amount = amount * self._weights[edge.block] if self._is_weighed else amount
                total = amount if total is None else torch.maximum(total, amount) if self._maximum else total + amount
            totals.append(total)
        return totals[0], totals[1]

    # ------------------------------------------------------------------------------------------------- one per family

    def _has_energy(self, into: Tensor | None, out: Tensor | None) -> Tensor:
        """Has each channel of a family some on both sides?"""
        if into is None or out is None:
            return torch.zeros_like(self._zero[0], dtype=torch.bool)
        return ((into > 0) & (out > 0)).all()

    def _level(self, state: _State) -> None:
        """Minimise over one scalar for each family by Newton steps; families with a channel without energy on one side stay."""
        totals = torch.zeros_like(self._weights)
        for number in self._filled:
            totals[number] = self._along(state, number, 0).sum()
        ends = [self._energies(family, state) for family in range(len(self._fixed))]
        if self._processes is not None:
            empty = [*self._fixed, torch.zeros_like(totals)]
            ends = summed_ends(self._processes, [*ends, (totals, None)], empty, self._maximum)
            totals = ends.pop()[0]
            assert totals is not None
        logs = (totals * self._weights).double().log()
        A = self._exponents * torch.stack([self._has_energy(*pair) for pair in ends])
        shift = torch.zeros(A.shape[1], dtype=torch.float64, device=logs.device)
        identity = torch.eye(A.shape[1], dtype=torch.float64, device=logs.device)
        for _ in range(NEWTON_STEPS):
            weights = torch.softmax(logs + A @ shift, 0)
            hessian = (A * weights[:, None]).T @ A
            ridge = 1e-10 * (weights @ A.square()).mean()  # of its diagonal
            step = torch.linalg.solve_ex(hessian + ridge * identity, weights @ A)[0]
            step = step * (LONGEST_STEP / step.abs().amax().clamp_min(LONGEST_STEP))
            shift = shift - step.nan_to_num_(0.0, 0.0, 0.0)
        for family, value in enumerate(shift.to(self._zero.dtype)):
            self._move(state, family, value)
