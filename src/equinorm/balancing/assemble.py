"""From layouts and weights to energies: read once and kept, or streamed."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from equinorm import native
from equinorm._errors import BalanceError
from equinorm.balancing.blocks import AnyBlock, Block
from equinorm.balancing.energy_reader import Reading, check_finite
from equinorm.balancing.layout import NetworkLayout, Part, TensorLayout
from equinorm.balancing.list_reader import Extremes, ends_of, energies_of_lists, fits_float64, is_list
from equinorm.balancing.norm import Norm
from equinorm.balancing.options import BalanceOptions
from equinorm.balancing.problem import Problem
from equinorm.balancing.streamed import Stream, streamed
from equinorm.rescaling.last_answers import LastAnswers

FAINT = torch.finfo(torch.float64).tiny
"""Energies below it have few digits."""


def problem_of(network: NetworkLayout, tensors: Mapping[str, Tensor], options: BalanceOptions) -> Problem:
    """Set up the energies of every weight: read once and kept, or, where the options say so and it is cheap, streamed.

    Args:
        network: of the tensors whose norm counts.
        tensors: the model's tensors by name.
        options: the norm, the asymmetry (a weight of depth k counts c^(−pk)), and how to read.

    Raises:
        BalanceError: if a weight is on the meta device or not finite.
    """
    norm, is_compiled = options.norm, native.are_wanted(options.compile)
    blocks: list[Sequence[AnyBlock]] = [() for _ in network.layouts]
    constants: dict[int, Sequence[float]] = {}
    opened: list[Stream] = []
    lists: dict[int, Extremes] = {}
    faint: list[Block] = []
    for index, layout in enumerate(network.layouts):
        tensor = tensors[layout.scaling.name]
        if tensor.is_meta:
            raise BalanceError(
                f"cannot balance {layout.scaling.name}: on the meta device it holds no numbers. Load the weights first."
            )
        if is_list(layout, tensor, norm):
            lists[index] = ends_of(layout, tensor, norm, is_compiled)
        elif options.is_streamed and _is_streamable(layout, tensor, norm):
            stream = Stream(layout, tensor, norm, norm.log_weight(layout.scaling.depth, options.c), is_compiled)
            opened.append(stream)
            blocks[index] = [*streamed(index, stream)]
            constants[index] = [*stream.still_logs(torch.zeros(network.num_free + 1, dtype=torch.float64))]
        else:
            (blocks[index], constants[index]), more = _read(index, layout, tensor, options)
            faint += more
    for index, (moving, still) in _lists(network, lists, options):
        blocks[index], constants[index] = moving, still
    joined = {index: norm.join(logs) for index, logs in constants.items() if logs}
    found = (*itertools.chain(*blocks), *faint)
    kept = LastAnswers() if faint else network.kept  # which knows of what layouts tell alone
    return Problem(found, network.families, joined, network.num_free, norm, tuple(opened), kept=kept)


_Parted = tuple[list[Block], list[float]]
"""Blocks that move, and logarithms of the energies that do not."""


def _read(index: int, layout: TensorLayout, tensor: Tensor, options: BalanceOptions) -> tuple[_Parted, list[Block]]:
    """The energies of one tensor, read once; those that a matrix cannot hold beside the others as lists."""
    norm = options.norm
    energies, offsets, faint = _read_energies(layout, tensor, norm)
    offsets[0] = offsets[0] + norm.log_weight(layout.scaling.depth, options.c)
    more: list[Block] = []
    if faint is not None and energies.size(-1) > 1 and layout.is_matrix:
        more = [_faint_block(index, part, faint, offsets) for part in layout.parts if not part.is_still]
    elif faint is not None:
        is_faint = faint.isfinite().flatten()
        energies = energies.masked_fill(is_faint.view_as(energies), 1.0)
        offsets[0] = offsets[0] + torch.where(is_faint, faint.flatten(), 0.0)
    parted = _parted([_block(index, layout, part, energies, offsets) for part in layout.parts], layout.parts, norm)
    return parted, [block for block in more if not block.is_empty]


def _faint_block(index: int, part: Part, faint: Tensor, offsets: Sequence[Tensor]) -> Block:
    """The faint entries of one part of a matrix, a term each."""
    rows, columns = part.picks
    own = faint[rows][:, columns]
    own = own if part.loops is None else own.masked_fill(part.loops, -math.inf)
    places = own.isfinite().nonzero().T
    logs = own[places[0], places[1]] + offsets[0][rows][places[0]] + offsets[1][columns][places[1]]
    sides = tuple(replace(side, ids=side.ids[place]) for side, place in zip(part.sides, places, strict=True))
    return Block(index, torch.ones_like(logs), (logs,), sides)


def _lists(network: NetworkLayout, lists: Mapping[int, Extremes], options: BalanceOptions) -> Iterator[tuple[int, _Parted]]:
    """The energies of all lists, by the index of their layout."""
    norm = options.norm
    weights = {depth: norm.log_weight(depth, options.c) for depth in {layout.scaling.depth for layout in network.layouts}}
    offsets = {depth: torch.full((1,), weight, dtype=torch.float64) for depth, weight in weights.items()}
    for index, energies in _list_energies(network, lists, norm):
        layout = network.layouts[index]
        offset = offsets[layout.scaling.depth].expand(layout.sizes[0])
        yield index, _parted([*_list_blocks(index, layout, energies, offset)], layout.parts, norm)


def _block(index: int, layout: TensorLayout, part: Part, energies: Tensor, offsets: Sequence[Tensor]) -> Block:
    """The energies of one part of a tensor."""
    if not layout.is_matrix:
        return Block(index, energies[part.picks[0]], (offsets[0][part.picks[0]],), part.sides)
    rows, columns = part.picks
    if len(layout.along) == 1:
        return Block(index, energies[rows, 0], (offsets[0][rows] + offsets[1],), part.sides[:1])
    return Block(index, energies[rows][:, columns], (offsets[0][rows], offsets[1][columns]), part.sides)


def _list_blocks(index: int, layout: TensorLayout, energies: Tensor, offset: Tensor) -> Iterator[Block]:
    """The parts of a list."""
    if len(layout.parts) == 1:
        yield Block(index, energies, (offset,), layout.parts[0].sides[:1])
        return
    for part in layout.parts:
        pick = part.picks[0]
        yield Block(index, energies[pick], (offset[pick],), part.sides[:1])


def _parted(blocks: Sequence[Block], parts: Sequence[Part], norm: Norm) -> _Parted:
    """What moves, and logarithms of what does not: whole blocks, and entries that join a class to itself."""
    if len(parts) == 1 and parts[0].loops is None and not parts[0].is_still:
        return [*blocks], []
    moving: list[Block] = []
    still: list[Block] = []
    for block, part in zip(blocks, parts, strict=True):
        if part.is_still:
            still.append(block)
        elif part.loops is None:
            moving.append(block)
        else:
            still.append(replace(block, energies=block.energies * part.loops))
            moving.append(replace(block, energies=block.energies.masked_fill(part.loops, 0.0)))
    return moving, [_log_constant(block, norm) for block in still]


def _list_energies(network: NetworkLayout, lists: Mapping[int, Extremes], norm: Norm) -> Iterator[tuple[int, Tensor]]:
    """Energies of lists by the index of their layout, worked out together."""
    if not lists:
        return
    layouts, ends = [network.layouts[index] for index in lists], [*lists.values()]
    sizes = [layout.sizes[0] for layout in layouts]
    energies = energies_of_lists(ends, sizes, norm)
    parts = energies.split(sizes)
    if not bool(energies.isfinite().all()):
        for layout, own in zip(layouts, parts, strict=True):
            check_finite(layout.scaling.name, own, [own])
    yield from zip(lists, parts, strict=True)


def _is_streamable(layout: TensorLayout, tensor: Tensor, norm: Norm) -> bool:
    """A matrix of two sides whose squares or magnitudes can be summed in float64 as they are."""
    if not (layout.is_matrix and len(layout.along) == 2 and norm.is_cheap and tensor.dtype != torch.float64):
        return False
    return Reading(layout, tensor, norm, torch.float32).has_strips


def _read_energies(layout: TensorLayout, tensor: Tensor, norm: Norm) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Energies of one tensor and the logarithms to add to them: along rows and columns, or for every term.

    Also logarithms of energies that are missing there since they are too small beside others, −∞ elsewhere; None without any.
    """
    if fits_float64(tensor, norm):
        energies = Reading(layout, tensor, norm, torch.float64).read_energies()
        check_finite(layout.scaling.name, tensor, [energies])
        energies = energies.cpu()
        offsets = [torch.zeros(size, dtype=torch.float64) for size in energies.shape]
        return energies, offsets if layout.is_matrix else [torch.zeros(energies.shape, dtype=torch.float64)], None
    energies, offsets, faint = _scaled(layout, tensor, norm)
    sides = [_added([offsets[axis] for axis in axes]).flatten() for axes in layout.along]
    order = [sorted(layout.axes).index(axis) for axis in layout.axes]
    shape = (-1, 1) if layout.is_matrix and len(sides) == 1 else layout.sizes
    energies, faint = (None if found is None else found.permute(order).reshape(shape) for found in (energies, faint))
    assert energies is not None
    return energies, [*sides, torch.zeros(1, dtype=torch.float64)] if shape == (-1, 1) else sides, faint


def _added(logs: Sequence[Tensor]) -> Tensor:
    """The sums of logarithms along some axes, of shape (…, …); along none one 0."""
    total = torch.zeros((), dtype=torch.float64)
    for log in logs:
        total = total[..., None] + log
    return total


def _scaled(layout: TensorLayout, tensor: Tensor, norm: Norm) -> tuple[Tensor, dict[int, Tensor], Tensor | None]:
    """|w|^p summed over the other axes (largest |w| if p = ∞), scaled towards 1, and the logarithms of the scales by axis.

    Also what is faint, as in `_read_energies`: at p = 100 beside 1 what is below 0.0008.
    """
    weight = layout.effective(tensor)
    check_finite(layout.scaling.name, weight, [torch.linalg.vector_norm(weight, math.inf)])
    magnitude = weight.to("cpu", torch.float64).abs()
    offsets: dict[int, Tensor] = {}
    for axis in sorted(layout.axes):
        rest = [other for other in range(weight.dim()) if other != axis]
        top = magnitude.amax(rest, keepdim=True) if rest else magnitude
        top = torch.where(top > 0, top, 1.0)
        magnitude = magnitude / top
        offsets[axis] = norm.q * top.flatten().log()
    powered = magnitude.pow(norm.q)
    if layout.others:
        powered = powered.amax(layout.others) if norm.is_max else powered.sum(layout.others)
    if norm.is_max:
        return powered, offsets, None
    magnitude = magnitude.permute([*sorted(layout.axes), *layout.others]).reshape(*powered.shape, -1)
    is_faint = (powered < FAINT) & (magnitude > 0).any(-1)
    if not bool(is_faint.any()):
        return powered, offsets, None
    faint = torch.full_like(powered, -math.inf)
    faint[is_faint] = (norm.q * magnitude[is_faint].log()).logsumexp(-1)
    return powered.masked_fill(is_faint, 0.0), offsets, faint


def _log_constant(block: Block, norm: Norm) -> float:
    """Logarithm of the energy of a block that does not move."""
    logs = block.energies.double().log()
    for side, offset in enumerate(block.offsets):
        logs = logs + offset.reshape([-1 if axis == side else 1 for axis in range(logs.dim())])
    if not logs.numel():
        return -math.inf
    return float(logs.max() if norm.is_max else logs.flatten().logsumexp(0))
