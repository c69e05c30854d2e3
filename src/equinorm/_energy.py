"""From scalings and weights to the convex problem: sums of exponentials of log-scales.

    φ(z) = Σ_t E_t · exp(q · Σ_s a_ts · z[id_ts]),     q = p, or 1 with a maximum instead of the sum if p = ∞.

One pass over a weight reduces |w|^p over the axes that no scale tells apart. What remains is a block of energies: a matrix
between an out-axis and an in-axis (linear layers, convolutions), or a list of terms (grouped convolutions, monomials). Every
side of a block belongs to one family of channels, or to the ground, whose log-scale is 0. The solver sees blocks only.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from equinorm._errors import BalanceError
from equinorm._scaling import Scaling

GROUND = -1
"""Family of what does not scale."""


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """The channels along one side of a block.

    Attributes:
        family: index of their family, or GROUND.
        ids: free class of each channel, 1..num_free, or 0 on the ground.
        exponent: by which their scale enters.
    """

    family: int
    ids: Tensor
    exponent: float


@dataclass(eq=False)
class Block:
    """Energies E with their sides: a matrix with two sides (rows, columns), or a list of terms with any number of them.

    Attributes:
        tensor: index of the scaling that it comes from.
        energies: float64, (rows, columns) or (terms,); every entry at most about 1.
        offsets: natural logarithms to add to the log-energies, one tensor for each side, or one for all terms.
        sides: who moves them.
    """

    tensor: int
    energies: Tensor
    offsets: tuple[Tensor, ...]
    sides: tuple[Side, ...]
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def is_matrix(self) -> bool:
        return self.energies.dim() == 2

    def log_energies(self, side: int, z: Tensor, q: float, maximum: bool) -> Tensor:
        """Logarithm of the energy of each channel (of each term) along one side, at log-scales z.

        The product with the matrix is kept: it stays valid while the other side has moved as a whole at most.
        """
        if not self.is_matrix:
            total = self.energies.log() + self.offsets[0]
            for part in self.sides:
                total = total + q * part.exponent * z[part.ids]
            return total
        own, other = self.sides[side], self.sides[1 - side]
        there = z[other.ids]
        if side in self._kept:
            before, base = self._kept[side]
            shift = there - before
            if float(shift.max() - shift.min()) <= 1e-15 * max(1.0, float(shift.abs().max())):
                return base + q * (other.exponent * shift[0] + own.exponent * z[own.ids])
        logs = q * other.exponent * there + self.offsets[1 - side]
        top = logs.max()
        factors = torch.exp(logs - top)
        matrix = self.energies if side == 0 else self.energies.T
        sums = (matrix * factors).amax(1) if maximum else matrix @ factors
        base = sums.log() + top + self.offsets[side]
        self._kept[side] = (there.clone(), base)
        return base + q * own.exponent * z[own.ids]

    def log_total(self, z: Tensor, q: float, maximum: bool) -> float:
        """Logarithm of the block's whole energy."""
        side = next(iter(self._kept), 0)
        logs = self.log_energies(side, z, q, maximum)
        return float(logs.max() if maximum else logs.logsumexp(0))

    def without(self, dead: Tensor) -> "Block":
        """The same block with no energy where a dead class takes part; `dead` is a mask over 0..num_free."""
        energies = self.energies
        for axis, side in enumerate(self.sides):
            mask = dead[side.ids]
            if bool(mask.any()):
                shape = [1] * energies.dim()
                shape[axis if self.is_matrix else 0] = -1
                energies = energies.masked_fill(mask.reshape(shape), 0.0)
        return self if energies is self.energies else replace(self, energies=energies, _kept={})


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A network's energies.

    Attributes:
        blocks: all energies that depend on free classes.
        families: first and last + 1 id of every family.
        constants: logarithm of each tensor's energy that no free class changes, by tensor index.
        num_free: number of free classes.
        p: the norm, finite or inf.
    """

    blocks: tuple[Block, ...]
    families: tuple[tuple[int, int], ...]
    constants: Mapping[int, float]
    num_free: int
    p: float

    @property
    def q(self) -> float:
        return 1.0 if math.isinf(self.p) else self.p

    @property
    def maximum(self) -> bool:
        return math.isinf(self.p)

    def log_energies(self, z: Tensor) -> dict[int, float]:
        """Logarithm of each tensor's energy by tensor index; of its largest entry if p = ∞."""
        parts: dict[int, list[float]] = {index: [value] for index, value in self.constants.items()}
        for block in self.blocks:
            parts.setdefault(block.tensor, []).append(block.log_total(z, self.q, self.maximum))
        return {index: self.join(values) for index, values in parts.items()}

    def join(self, logs: Sequence[float]) -> float:
        """Logarithm of the sum (maximum) of energies."""
        values = torch.tensor(logs, dtype=torch.float64)
        return float(values.max() if self.maximum else values.logsumexp(0))

    def without(self, dead: Tensor) -> "Problem":
        """The same problem without the edges of dead classes."""
        return replace(self, blocks=tuple(block.without(dead) for block in self.blocks))


def problem(
    scalings: Sequence[Scaling],
    tensors: Mapping[str, Tensor],
    families: Sequence[tuple[int, int]],
    num_free: int,
    p: float,
    c: float,
    held: Tensor,
) -> Problem:
    """Read every weight once and set up its energies.

    Args:
        scalings: of the tensors whose norm counts.
        tensors: the model's tensors by name.
        families: first and last + 1 id of every family.
        num_free: number of free classes.
        p: the norm.
        c: asymmetry; a weight of depth k counts c^(−pk).
        held: mask over 0..num_free of classes that must not move; they count as ground.

    Raises:
        BalanceError: if a weight is on the meta device or not finite.
    """
    family_of = torch.full((num_free + 1,), GROUND)
    for number, (first, last) in enumerate(families):
        family_of[first:last] = number
    family_of[held] = GROUND
    blocks: list[Block] = []
    constants: dict[int, list[float]] = {}
    q = 1.0 if math.isinf(p) else p
    for index, scaling in enumerate(scalings):
        whole = _block(index, scaling, tensors[scaling.name], p, held)
        whole.offsets = (whole.offsets[0] - q * scaling.depth * math.log(c), *whole.offsets[1:])
        for part in _split(whole, family_of):
            if all(side.family == GROUND for side in part.sides):
                constants.setdefault(index, []).append(_log_constant(part, p))
                continue
            if part.is_matrix and (loops := _self_loops(part)) is not None:
                constants.setdefault(index, []).append(_log_constant(replace(part, energies=part.energies * loops), p))
                part.energies = part.energies.masked_fill(loops, 0.0)
            blocks.append(part)
    found = Problem(tuple(blocks), tuple(families), {}, num_free, p)
    return replace(found, constants={index: found.join(logs) for index, logs in constants.items()})


def _block(index: int, scaling: Scaling, tensor: Tensor, p: float, held: Tensor) -> Block:
    """All energies of one tensor: a matrix if an out-scale meets an in-scale on another axis, otherwise terms."""
    weight = tensor.detach()
    if weight.is_meta:
        raise BalanceError(f"cannot balance {scaling.name}: it is on the meta device and holds no numbers. Load the weights first.")
    factors = [(exponent, torch.where(held[ids], 0, ids)) for exponent, ids in scaling.factors]
    axes = sorted({axis for _, ids in factors for axis in range(ids.dim()) if ids.size(axis) > 1})
    energies, offsets = _reduce(scaling, weight, axes, p)
    along = [[f for f in factors if f[1].dim() and f[1].size(axis) > 1] for axis in axes]
    if len(axes) in (1, 2) and len(factors) == len(axes) and all(len(fs) == 1 for fs in along):
        sides = [Side(GROUND, ids.flatten(), exponent) for ((exponent, ids),) in along]
        if len(axes) == 2:
            return Block(index, energies, tuple(offsets), tuple(sides))
        ground = Side(GROUND, torch.zeros(1, dtype=torch.long), 1.0)
        return Block(index, energies[:, None], (offsets[0], torch.zeros(1, dtype=torch.float64)), (sides[0], ground))
    logs = torch.zeros(energies.shape, dtype=torch.float64)
    for place, offset in enumerate(offsets):
        logs = logs + offset.reshape([-1 if i == place else 1 for i in range(len(axes))])
    ids = [ids.reshape([ids.size(axis) for axis in axes]).expand(energies.shape).flatten() for _, ids in factors]
    exponents = [exponent for exponent, _ in factors]
    for i in range(len(ids)):
        for j in range(i):
            if exponents[i] == -exponents[j]:  # in and out scales of one class cancel
                same = ids[i] == ids[j]
                ids[i], ids[j] = torch.where(same, 0, ids[i]), torch.where(same, 0, ids[j])
    sides = tuple(Side(GROUND, part, exponent) for part, exponent in zip(ids, exponents, strict=True))
    return Block(index, energies.flatten(), (logs.flatten(),), sides)


def _reduce(scaling: Scaling, weight: Tensor, axes: Sequence[int], p: float) -> tuple[Tensor, list[Tensor]]:
    """|w|^p summed over every axis but `axes` (largest |w| if p = ∞), scaled to at most about 1 where it could underflow."""
    q = 1.0 if math.isinf(p) else p
    others = [axis for axis in range(weight.dim()) if axis not in axes]
    magnitude = weight.to("cpu", torch.float64).abs()
    offsets = [torch.zeros(weight.size(axis), dtype=torch.float64) for axis in axes]
    if weight.dtype == torch.float64 or q > 4:  # below, |w|^p of narrower dtypes fits float64
        for place, axis in enumerate(axes):
            rest = [other for other in range(weight.dim()) if other != axis]
            top = magnitude.amax(rest, keepdim=True) if rest else magnitude
            top = torch.where((top > 0) & top.isfinite(), top, 1.0)
            magnitude = magnitude / top
            offsets[place] = q * top.flatten().log()
    powered = magnitude if q == 1 else magnitude.square() if q == 2 else magnitude.pow(q)
    if others:
        powered = powered.amax(others) if math.isinf(p) else powered.sum(others)
    if not bool(powered.isfinite().all()):
        bad = "NaN" if bool(weight.isnan().any()) else "inf"
        raise BalanceError(f"cannot balance {scaling.name}: it holds {bad}. The model was not touched.")
    return powered, offsets


def _split(block: Block, family_of: Tensor) -> Iterator[Block]:
    """Cut a block where families change, so that every side belongs to one."""
    numbers = [family_of[side.ids] for side in block.sides]
    if block.is_matrix:
        for row in torch.unique(numbers[0]).tolist():
            for column in torch.unique(numbers[1]).tolist():
                picked = [_where(numbers[0], row), _where(numbers[1], column)]
                sides = tuple(
                    Side(family, side.ids[pick], side.exponent)
                    for family, side, pick in zip((row, column), block.sides, picked, strict=True)
                )
                offsets = tuple(offset[pick] for offset, pick in zip(block.offsets, picked, strict=True))
                yield Block(block.tensor, block.energies[picked[0]][:, picked[1]], offsets, sides)
        return
    patterns, inverse = torch.unique(torch.stack(numbers), dim=1, return_inverse=True) if numbers else (torch.zeros(0, 1), None)
    for number in range(patterns.shape[1]):
        pick = inverse == number if inverse is not None else slice(None)
        sides = tuple(Side(int(patterns[i, number]), side.ids[pick], side.exponent) for i, side in enumerate(block.sides))
        yield Block(block.tensor, block.energies[pick], (block.offsets[0][pick],), sides)


def _where(numbers: Tensor, value: int) -> Tensor | slice:
    """Places of one family: a slice where they are contiguous, which copies nothing."""
    places = (numbers == value).nonzero().flatten()
    first, last = int(places[0]), int(places[-1]) + 1
    return slice(first, last) if last - first == len(places) else places


def _self_loops(block: Block) -> Tensor | None:
    """Where a matrix joins a class to itself, so that its energy never changes; None if nowhere."""
    rows, columns = block.sides
    if rows.family != columns.family or rows.exponent != -columns.exponent:
        return None
    loops = rows.ids[:, None] == columns.ids[None, :]
    return loops if bool(loops.any()) else None


def _log_constant(block: Block, p: float) -> float:
    """Logarithm of the energy of a block that does not move."""
    logs = block.energies.log()
    for side, offset in enumerate(block.offsets):
        shape = [1] * logs.dim()
        shape[side] = -1
        logs = logs + offset.reshape(shape)
    if not logs.numel():
        return -math.inf
    return float(logs.max() if math.isinf(p) else logs.flatten().logsumexp(0))
