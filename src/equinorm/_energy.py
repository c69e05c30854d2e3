"""From scalings and weights to energies: one pass over each weight.

|w|^p is summed over the axes that no scale tells apart. What remains between an out-axis and an in-axis is a matrix; with one
axis only, a matrix of one column on the ground; with more, or with several scales on one axis, a list of terms. It is cut
where families of channels change.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from equinorm._blocks import GROUND, Block, Problem, Side
from equinorm._errors import BalanceError
from equinorm._scaling import Scaling


def problem(
    scalings: Sequence[Scaling],
    tensors: Mapping[str, Tensor],
    families: Sequence[tuple[int, int]],
    num_free: int,
    p: float,
    c: float,
    held: Tensor,
    precision: torch.dtype,
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
        precision: of the energies, float32 or float64; float32 gives way to float64 where it would underflow.

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
        energies, offsets, sides = _read(scaling, tensors[scaling.name], p, family_of, precision)
        offsets[0] = offsets[0] - q * scaling.depth * math.log(c)
        for part in _split(index, energies, offsets, sides, family_of):
            if all(side.family == GROUND for side in part.sides):
                constants.setdefault(index, []).append(_log_constant(part, p))
                continue
            if part.is_matrix and (loops := _self_loops(part)) is not None:
                constants.setdefault(index, []).append(_log_constant(replace(part, energies=part.energies * loops), p))
                part.energies = part.energies.masked_fill(loops, 0.0)
            blocks.append(part)
    found = Problem(tuple(blocks), tuple(families), {}, num_free, p)
    return replace(found, constants={index: found.join(logs) for index, logs in constants.items()})


_Channels = tuple[Tensor, Tensor]
"""Free class (0: none) and exponent of each channel along one side."""


def _read(
    scaling: Scaling, tensor: Tensor, p: float, family_of: Tensor, precision: torch.dtype
) -> tuple[Tensor, list[Tensor], list[_Channels]]:
    """Energies, offsets and sides of one tensor: a matrix if an out-scale meets an in-scale on another axis, or terms."""
    weight = scaling.effective(tensor)
    if weight.is_meta:
        raise BalanceError(f"cannot balance {scaling.name}: on the meta device it holds no numbers. Load the weights first.")
    factors = [(exponent, torch.where(family_of[ids] == GROUND, 0, ids)) for exponent, ids in scaling.factors]
    axes = sorted({axis for _, ids in factors for axis in range(ids.dim()) if ids.size(axis) > 1})
    energies, offsets = _reduce(scaling, weight, axes, p, precision)
    along = [_joined([f for f in factors if f[1].size(axis) > 1]) for axis in axes]
    if len(axes) in (1, 2) and None not in along and all(sum(size > 1 for size in ids.shape) == 1 for _, ids in factors):
        sides = [channels for channels in along if channels is not None]
        if len(axes) == 2:
            return energies, offsets, sides
        one = torch.zeros(1, dtype=torch.float64)
        return energies[:, None], [offsets[0], one], [sides[0], (one.long(), one)]
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
    sides = [(part, torch.full(part.shape, e, dtype=torch.float64)) for part, e in zip(ids, exponents, strict=True)]
    return energies.flatten(), [logs.flatten()], sides


def _joined(factors: Sequence[tuple[float, Tensor]]) -> _Channels | None:
    """One class and exponent for each channel of an axis, or None if several move one channel."""
    ids = torch.stack([part.flatten() for _, part in factors])
    if int((ids > 0).sum(0).max()) > 1:
        return None
    exponents = torch.tensor([[exponent] for exponent, _ in factors], dtype=torch.float64)
    return ids.sum(0), ((ids > 0) * exponents).sum(0)


def _reduce(
    scaling: Scaling, weight: Tensor, axes: Sequence[int], p: float, precision: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """|w|^p summed over every axis but `axes` (largest |w| if p = ∞), scaled towards 1 where it could underflow."""
    q = 1.0 if math.isinf(p) else p
    others = [axis for axis in range(weight.dim()) if axis not in axes]
    if precision == torch.float32 and weight.dtype != torch.float64 and q <= 2:
        powered = _power(weight.to("cpu", torch.float32), q, others, math.isinf(p))
        if all(bool(((total > 1e-30) & (total < 1e30)).all()) for total in _totals(powered)):
            return powered, [torch.zeros(weight.size(axis), dtype=torch.float64) for axis in axes] or [torch.zeros(())]
    if not bool(torch.linalg.vector_norm(weight, math.inf).isfinite()):
        bad = "NaN" if bool(weight.isnan().any()) else "inf"
        raise BalanceError(f"cannot balance {scaling.name}: it holds {bad}. The model was not touched.")
    magnitude = weight.to("cpu", torch.float64)
    offsets = [torch.zeros(weight.size(axis), dtype=torch.float64) for axis in axes]
    if weight.dtype == torch.float64 or q > 4:  # below, |w|^p of narrower dtypes fits float64
        magnitude = magnitude.abs()
        for place, axis in enumerate(axes):
            rest = [other for other in range(weight.dim()) if other != axis]
            top = magnitude.amax(rest, keepdim=True) if rest else magnitude
            top = torch.where(top > 0, top, 1.0)
            magnitude = magnitude / top
            offsets[place] = q * top.flatten().log()
    return _power(magnitude, q, others, math.isinf(p)), offsets or [torch.zeros((), dtype=torch.float64)]


def _totals(powered: Tensor) -> list[Tensor]:
    """Sums along every axis: too small, too large or NaN shows whether float32 will do."""
    if powered.dim() == 2:
        rows, columns = powered.shape
        return [powered @ powered.new_ones(columns), powered.T @ powered.new_ones(rows)]
    axes = range(powered.dim())
    return [powered.sum([other for other in axes if other != axis]) if powered.dim() > 1 else powered for axis in axes]


def _power(weight: Tensor, q: float, others: list[int], maximum: bool) -> Tensor:
    """|w|^q, summed (maximised) over `others`."""
    powered = weight.square() if q == 2 else weight.abs() if q == 1 else weight.abs().pow_(q)
    if not others:
        return powered
    return powered.amax(others) if maximum else powered.sum(others)


def _split(
    tensor: int, energies: Tensor, offsets: Sequence[Tensor], sides: Sequence[_Channels], family_of: Tensor
) -> Iterator[Block]:
    """Cut a tensor's energies where families or exponents change, so that every side of a block has one of each."""
    kinds = [_kinds(ids, exponents, family_of) for ids, exponents in sides]
    if energies.dim() == 2:
        rows, columns = ([(legend[code], _where(codes, code)) for code in legend] for codes, legend in kinds)
        for (row_kind, row_pick), (column_kind, column_pick) in itertools.product(rows, columns):
            found = (_side(row_kind, sides[0][0][row_pick]), _side(column_kind, sides[1][0][column_pick]))
            part = (offsets[0][row_pick], offsets[1][column_pick])
            yield Block(tensor, energies[row_pick][:, column_pick], part, found)
        return
    patterns, inverse = torch.unique(torch.stack([codes for codes, _ in kinds]), dim=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T.tolist()):
        pick = inverse == number
        found = tuple(_side(kinds[i][1][code], sides[i][0][pick]) for i, code in enumerate(pattern))
        yield Block(tensor, energies[pick], (offsets[0][pick],), found)


_Kind = tuple[int, float]
"""Family and exponent."""


def _side(kind: _Kind, ids: Tensor) -> Side:
    return Side(kind[0], ids, kind[1])


def _kinds(ids: Tensor, exponents: Tensor, family_of: Tensor) -> tuple[Tensor, dict[int, _Kind]]:
    """A code for the family and exponent of each channel, and what the codes mean. The ground has exponent 1."""
    if ids.numel() == 1:
        return torch.zeros(1, dtype=torch.long), {0: (int(family_of[ids]), float(exponents) if int(ids) else 1.0)}
    values, which = torch.unique(torch.where(ids > 0, exponents, 1.0), return_inverse=True)
    codes = (family_of[ids] - GROUND) * len(values) + which
    present = torch.unique(codes).tolist()
    return codes, {code: (code // len(values) + GROUND, float(values[code % len(values)])) for code in present}


def _where(codes: Tensor, code: int) -> Tensor | slice:
    """Places of one kind: a slice where they are contiguous, which copies nothing."""
    places = (codes == code).nonzero().flatten()
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
    logs = block.energies.double().log()
    for side, offset in enumerate(block.offsets):
        logs = logs + offset.reshape([-1 if axis == side else 1 for axis in range(logs.dim())])
    if not logs.numel():
        return -math.inf
    return float(logs.max() if math.isinf(p) else logs.flatten().logsumexp(0))
