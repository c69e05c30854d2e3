"""Cycles on the device where the weights are, recorded once: no analysis, no synchronisation, no float64 copies.

One cycle reads every weight once, for its energies; sweeps are products with these. Log-scales start at 0 in every step, and
stay small while training, so sums are taken as they are. Channels without energy on one side, or with energies that are not
finite, stay at scale 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._blocks import GROUND, Side, stiffness
from equinorm._errors import BalanceError
from equinorm._layout import Layout, Part
from equinorm._solve import red_black

NEWTON_STEPS = 3
LONGEST_STEP = 0.5
"""Of one Newton step over families: they start near the minimum."""


@dataclass(frozen=True, slots=True, eq=False)
class _Edge:
    """One side of one block, as a sweep over its family reads it.

    Attributes:
        block: index of the block.
        side: place of the side in the block.
        gather: (channels of the family, most entries of one) places in the side, or None where they are the channels in order.
        mask: which of them count; None for all.
    """

    block: int
    side: int
    gather: Tensor | None
    mask: Tensor | None


class Cycle:
    """Cycles of Algorithm 1, or of the two-level method.

    Args:
        layouts: of the tensors whose norm counts.
        families: first and last + 1 id of every family.
        num_free: number of free classes.
        p: the norm.
        method: "cyclic" or "two-level".
        device: of the weights.
        dtype: of the sums.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        families: Sequence[tuple[int, int]],
        num_free: int,
        p: float,
        method: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._layouts, self._families, self._p = layouts, families, p
        self._q = 1.0 if math.isinf(p) else p
        self._maximum = math.isinf(p)
        self._dtype = dtype
        self._z = torch.zeros(num_free + 1, device=device, dtype=dtype)
        self._blocks: list[tuple[int, Part]] = []
        for index, layout in enumerate(layouts):
            self._blocks += [(index, _moved(part, device)) for part in layout.parts if not part.is_still]
        parts = [part for _, part in self._blocks]
        self._order = red_black(parts, len(families)) if method == "two-level" else list(range(len(families)))
        self._edges: list[tuple[list[_Edge], list[_Edge]]] = [([], []) for _ in families]
        self._stiffness = [1.0] * len(families)
        for number, part in enumerate(parts):
            for place, side in enumerate(part.sides):
                if side.family != GROUND:
                    edge = _Edge(number, place, *_gathering(side, families[side.family], device))
                    self._edges[side.family][side.exponent < 0].append(edge)
                    self._stiffness[side.family] = max(self._stiffness[side.family], stiffness(part.sides, side.family))
        self._is_chained = any(len({side.family for side in part.sides} - {GROUND}) > 1 for part in parts)
        self._exponents = torch.zeros(len(parts), len(families), dtype=torch.float64)
        for number, part in enumerate(parts):
            for side in part.sides:
                if side.family != GROUND:
                    self._exponents[number, side.family] += side.exponent * self._q
        self._exponents = self._exponents.to(device)
        self._levels_first = method == "two-level" and self._is_chained
        self._weights = [1.0] * len(parts)

    def weigh(self, c: float) -> None:
        """Let a weight of depth k count c^(−pk).

        Raises:
            BalanceError: if that is beyond floating point.
        """
        depths = [self._layouts[index].scaling.depth for index, _ in self._blocks]
        middle = (min(depths, default=0) + max(depths, default=0)) / 2  # only ratios matter
        logs = [self._q * (middle - depth) * math.log(c) for depth in depths]
        largest = math.log(torch.finfo(self._dtype).max) / 2
        widest = max(map(abs, logs), default=0.0)
        if widest > largest:
            raise BalanceError(f"c = {c:g} weighs layers by up to e^{widest:.0f} against one another: choose it closer to 1.")
        self._weights = [math.exp(log) for log in logs]

    def run(self, tensors: Mapping[str, Tensor], cycles: int) -> Tensor:
        """Log-scales of classes 0..num_free after so many cycles on the current weights; the tensor is used again."""
        energies = self._read(tensors)
        self._z.zero_()
        for _ in range(cycles):
            if self._levels_first:
                self._level(energies)
            for family in self._order:
                into, out = self._energies(family, energies)
                if into is not None and out is not None:
                    step = torch.log(out / into).nan_to_num_(0.0, 0.0, 0.0)
                    first, last = self._families[family]
                    self._z[first:last].add_(step, alpha=0.5 / (self._q * self._stiffness[family]))
        return self._z

    def residual(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """ρ = ‖in − out‖₁ / ‖in + out‖₁ of the current weights."""
        energies = self._read(tensors)
        self._z.zero_()
        apart, whole = torch.zeros_like(self._z[0]), torch.zeros_like(self._z[0])
        for family in range(len(self._families)):
            into, out = self._energies(family, energies)
            if into is None or out is None:
                continue
            live = (into > 0) & (out > 0) & (into + out).isfinite()  # without energy on one side there is no minimum
            apart = apart + torch.where(live, (into - out).abs(), 0.0).sum()
            whole = whole + torch.where(live, into + out, 0.0).sum()
        return torch.where(whole > 0, apart / whole, 0.0)

    # ----------------------------------------------------------------------------------------------------- energies

    def _read(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Energies of every block: |w|^p, summed (maximised) over the axes that no scale tells apart."""
        found: list[Tensor] = []
        for layout in self._layouts:
            weight = layout.scaling.effective(tensors[layout.scaling.name]).to(self._dtype)
            powered = weight.square() if self._q == 2 else weight.abs() if self._q == 1 else weight.abs().pow_(self._q)
            if layout.others:
                powered = powered.amax(layout.others) if self._maximum else powered.sum(layout.others)
            if not layout.is_matrix:
                powered = powered.flatten()
            elif len(layout.axes) == 1:
                powered = powered[:, None]
            found.append(powered)
        blocks: list[Tensor] = []
        for index, part in self._blocks:
            block = found[index]
            for axis, pick in enumerate(part.picks):
                block = block[pick] if axis == 0 else block[:, pick]
            blocks.append(block if part.loops is None else block.masked_fill(part.loops, 0.0))
        return blocks

    def _scale(self, side: Side) -> Tensor | None:
        """s^q of each channel along one side; None on the ground."""
        return None if side.family == GROUND else torch.exp(self._z[side.ids] * (self._q * side.exponent))

    def _along(self, number: int, place: int, energies: Sequence[Tensor]) -> Tensor:
        """Energy of each channel (of each term) along one side of a block."""
        part, block = self._blocks[number][1], energies[number]
        if block.dim() == 1:
            for side in part.sides:
                scale = self._scale(side)
                block = block if scale is None else block * scale
            return block
        matrix = block if place == 0 else block.T
        own, other = self._scale(part.sides[place]), self._scale(part.sides[1 - place])
        if self._maximum:
            sums = matrix.amax(1) if other is None else (matrix * other).amax(1)
        else:
            sums = matrix.sum(1) if other is None else matrix @ other
        return sums if own is None else sums * own

    def _energies(self, family: int, energies: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Energies into and out of every channel of a family; None where nothing enters or leaves it."""
        totals: list[Tensor | None] = []
        for edges in self._edges[family]:
            total: Tensor | None = None
            for edge in edges:
                amount = self._along(edge.block, edge.side, energies)
                if edge.gather is not None:
                    amount = amount[edge.gather]
                    amount = amount if edge.mask is None else amount * edge.mask
                    amount = amount.amax(1) if self._maximum else amount.sum(1)
                amount = amount * (self._weights[edge.block] * abs(self._blocks[edge.block][1].sides[edge.side].exponent))
                total = amount if total is None else torch.maximum(total, amount) if self._maximum else total + amount
            totals.append(total)
        return totals[0], totals[1]

    # ------------------------------------------------------------------------------------------------- one per family

    def _level(self, energies: Sequence[Tensor]) -> None:
        """Minimise over one scalar for each family by Newton steps."""
        totals = [self._along(number, 0, energies).sum() * self._weights[number] for number in range(len(self._blocks))]
        logs = torch.stack(totals).double().log()
        A = self._exponents
        shift = torch.zeros(A.shape[1], dtype=torch.float64, device=logs.device)
        identity = torch.eye(A.shape[1], dtype=torch.float64, device=logs.device)
        for _ in range(NEWTON_STEPS):
            weights = torch.softmax(logs + A @ shift, 0)
            hessian = (A * weights[:, None]).T @ A
            ridge = 1e-10 * hessian.diagonal().mean()
            step = torch.linalg.solve_ex(hessian + ridge * identity, weights @ A)[0]
            step = step * (LONGEST_STEP / step.abs().amax().clamp_min(LONGEST_STEP))
            shift = shift - step.nan_to_num_(0.0, 0.0, 0.0)
        for (first, last), value in zip(self._families, shift.to(self._dtype), strict=True):
            self._z[first:last].add_(value)


def _moved(part: Part, device: torch.device) -> Part:
    picks = tuple(pick if isinstance(pick, slice) else pick.to(device) for pick in part.picks)
    sides = tuple(Side(side.family, side.ids.to(device), side.exponent) for side in part.sides)
    return Part(picks, sides, None if part.loops is None else part.loops.to(device))


def _gathering(side: Side, family: tuple[int, int], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Where in a side each channel of its family lies; sums over these places come out the same in every run."""
    first, last = family
    places = side.ids.cpu() - first
    if torch.equal(places, torch.arange(last - first)):
        return None, None
    order = torch.argsort(places, stable=True)
    counts = torch.bincount(places, minlength=last - first)
    most = int(counts.max())
    slots = torch.arange(most)
    starts = counts.cumsum(0) - counts
    mask = slots < counts[:, None]
    gather = order[(starts[:, None] + slots).clamp_(max=len(order) - 1)]
    return gather.to(device), None if bool(mask.all()) else mask.to(device)
