"""From layouts and weights to energies: read once and kept, or streamed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from equinorm._errors import BalanceError
from equinorm.balancing.energy_reader import CHEAP, LARGEST, SMALLEST, Reading, check_finite, totals
from equinorm.balancing.layout import Layout
from equinorm.balancing.problem import AnyBlock, Block, Problem
from equinorm.balancing.streamed import Stream, streamed


def problem(
    layouts: Sequence[Layout],
    tensors: Mapping[str, Tensor],
    families: Sequence[tuple[int, int]],
    num_free: int,
    p: float,
    c: float,
    precision: torch.dtype,
    streams: bool,
    compile: bool = False,
) -> Problem:
    """Set up the energies of every weight.

    Args:
        layouts: of the tensors whose norm counts.
        tensors: the model's tensors by name.
        families: first and last + 1 id of every family.
        num_free: number of free classes.
        p: the norm.
        c: asymmetry; a weight of depth k counts c^(−pk).
        precision: of energies that are kept, float32 or float64; float32 gives way to float64 where it would underflow.
        streams: read matrices from the weights whenever they are needed, where that is cheap, and keep only the others.
        compile: read these by compiled kernels.

    Raises:
        BalanceError: if a weight is on the meta device or not finite.
    """
    blocks: list[AnyBlock] = []
    constants: dict[int, list[float]] = {}
    opened: list[Stream] = []
    start = torch.zeros(num_free + 1, dtype=torch.float64)
    q = 1.0 if math.isinf(p) else p
    for index, layout in enumerate(layouts):
        tensor, log_weight = tensors[layout.scaling.name], -q * layout.scaling.depth * math.log(c)
        if tensor.is_meta:
            raise BalanceError(
                f"cannot balance {layout.scaling.name}: on the meta device it holds no numbers. Load the weights first."
            )
        if streams and _is_streamable(layout, tensor, p):
            stream = Stream(layout, tensor, p, log_weight, compile)
            opened.append(stream)
            blocks += streamed(index, stream)
            constants[index] = list(stream.still_logs(start))
            continue
        energies, offsets = _read(layout, tensor, p, precision)
        offsets[0] = offsets[0] + log_weight
        for part in layout.parts:
            if layout.is_matrix:
                rows, columns = part.picks
                block = Block(index, energies[rows][:, columns], (offsets[0][rows], offsets[1][columns]), part.sides)
            else:
                block = Block(index, energies[part.picks[0]], (offsets[0][part.picks[0]],), part.sides)
            if part.is_still:
                constants.setdefault(index, []).append(_log_constant(block, p))
                continue
            if part.loops is not None:
                constants.setdefault(index, []).append(_log_constant(replace(block, energies=block.energies * part.loops), p))
                block.energies = block.energies.masked_fill(part.loops, 0.0)
            blocks.append(block)
    found = Problem(tuple(blocks), tuple(families), {}, num_free, p, tuple(opened))
    return replace(found, constants={index: found.join(logs) for index, logs in constants.items() if logs})


def _is_streamable(layout: Layout, tensor: Tensor, p: float) -> bool:
    """A matrix of two axes whose squares or magnitudes can be summed in float64 as they are."""
    if not (layout.is_matrix and len(layout.axes) == 2 and p in CHEAP and tensor.dtype != torch.float64):
        return False
    return Reading(layout, tensor, p, torch.float32, False).has_strips


def _read(layout: Layout, tensor: Tensor, p: float, precision: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Energies of one tensor and the logarithms to add to them: along rows and columns, or for every term."""
    if tensor.dtype != torch.float64 and not 4 < p < math.inf:  # |w|^p of narrower dtypes fits float64
        energies = _summed(layout, tensor, p, precision).cpu()
        offsets = [torch.zeros(size, dtype=torch.float64) for size in energies.shape]
        return energies, offsets if layout.is_matrix else [torch.zeros(energies.shape, dtype=torch.float64)]
    energies, offsets = _scaled(layout, tensor, p)
    if layout.is_matrix:
        one_sided = len(layout.axes) == 1
        return (energies[:, None], [offsets[0], torch.zeros(1, dtype=torch.float64)]) if one_sided else (energies, offsets)
    logs = torch.zeros(energies.shape, dtype=torch.float64)
    for place, offset in enumerate(offsets):
        logs = logs + offset.reshape([-1 if i == place else 1 for i in range(len(layout.axes))])
    return energies.flatten(), [logs.flatten()]


def _summed(layout: Layout, tensor: Tensor, p: float, precision: torch.dtype) -> Tensor:
    """Energies as they are, in float32 where that is wanted and holds them."""
    if precision == torch.float32 and p <= 2:
        energies = Reading(layout, tensor, p, torch.float32, False).read()
        if all(bool(((total > SMALLEST) & (total < LARGEST)).all()) for total in totals(energies)):
            return energies
    energies = Reading(layout, tensor, p, torch.float64, False).read()
    check_finite(layout.scaling.name, tensor, [energies])
    return energies


def _scaled(layout: Layout, tensor: Tensor, p: float) -> tuple[Tensor, list[Tensor]]:
    """|w|^p summed over the other axes (largest |w| if p = ∞), scaled towards 1, and the logarithms of the scales."""
    weight, axes, q = layout.effective(tensor), layout.axes, 1.0 if math.isinf(p) else p
    check_finite(layout.scaling.name, weight, [torch.linalg.vector_norm(weight, math.inf)])
    magnitude = weight.to("cpu", torch.float64).abs()
    offsets = []
    for axis in axes:
        rest = [other for other in range(weight.dim()) if other != axis]
        top = magnitude.amax(rest, keepdim=True) if rest else magnitude
        top = torch.where(top > 0, top, 1.0)
        magnitude = magnitude / top
        offsets.append(q * top.flatten().log())
    powered = magnitude.pow(q)
    if layout.others:
        powered = powered.amax(layout.others) if math.isinf(p) else powered.sum(layout.others)
    return powered, offsets or [torch.zeros((), dtype=torch.float64)]


def _log_constant(block: Block, p: float) -> float:
    """Logarithm of the energy of a block that does not move."""
    logs = block.energies.double().log()
    for side, offset in enumerate(block.offsets):
        logs = logs + offset.reshape([-1 if axis == side else 1 for axis in range(logs.dim())])
    if not logs.numel():
        return -math.inf
    return float(logs.max() if math.isinf(p) else logs.flatten().logsumexp(0))
