"""Layouts of the part of a sharded tensor that one process holds: the same blocks, with fewer channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equinorm.balancing.layout import NetworkLayout, Part, Pick, TensorLayout, pick_of
from equinorm.balancing.sides import Side, self_loops
from equinorm.sharding.boxes import Box


@dataclass(frozen=True, slots=True, eq=False)
class LocalLayout:
    """The layout of a part of a tensor.

    Attributes:
        layout: of the part; its blocks are those of the whole tensor, in the same order, and may be empty.
        places: for each block and each of its sides (one for a list of terms) where in the whole block the part's channels are.
    """

    layout: TensorLayout
    places: tuple[tuple[Tensor, ...], ...]


def localised(layout: TensorLayout, shape: Sequence[int], box: Box | None) -> LocalLayout:
    """The layout of a part.

    Args:
        layout: of the whole tensor.
        shape: of the whole tensor, which the layout may look at with more axes.
        box: the part; None for all of it.
    """
    box = Box((0,) * len(shape), tuple(shape)) if box is None else box
    view, channels = _local_view(layout.scaling.shape, shape, box)
    sizes, lines = [*layout.sizes], [_flat(channels, layout.scaling.shape, axes) for axes in layout.along]
    if layout.is_matrix and len(lines) == 1:
        sizes, lines = [*sizes, 1], [*lines, torch.zeros(1, dtype=torch.long)]
    found = [_part(part, lines, sizes) for part in layout.parts]
    scaling = replace(layout.scaling, shape=view)
    return LocalLayout(
        replace(layout, scaling=scaling, parts=tuple(part for part, _ in found)), tuple(places for _, places in found)
    )


def _flat(channels: Sequence[Tensor], shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Places along a side that runs along several axes."""
    flat = torch.zeros((), dtype=torch.long)
    for axis in axes:
        flat = flat[..., None] * shape[axis] + channels[axis]
    return flat.flatten()


def local_network(
    network: NetworkLayout, shapes: Mapping[str, Sequence[int]], boxes: Mapping[str, Box | None]
) -> list[LocalLayout]:
    """The layouts of the parts of all tensors whose norm counts.

    Args:
        network: the layouts of the whole tensors.
        shapes: of the whole tensors, by name.
        boxes: the parts; tensors that are missing are not counted by this process, and have empty blocks.
    """
    names = [layout.scaling.name for layout in network.layouts]
    return [
        localised(layout, shapes[name], boxes[name]) if name in boxes else _nothing(layout)
        for name, layout in zip(names, network.layouts, strict=True)
    ]


def _nothing(layout: TensorLayout) -> LocalLayout:
    """The layout of no part at all."""
    none = torch.zeros(0, dtype=torch.long)
    parts = []
    for part in layout.parts:
        sides = tuple(Side(side.family, none, side.exponent) for side in part.sides)
        parts.append(Part((slice(0, 0),) * len(part.picks), sides, None))
    return LocalLayout(replace(layout, parts=tuple(parts)), tuple((none,) * len(part.picks) for part in parts))


def _local_view(view: Sequence[int], shape: Sequence[int], box: Box) -> tuple[tuple[int, ...], list[Tensor]]:
    """The shape by which the part is looked at, and for each axis of it the places in the whole tensor's view."""
    sizes: list[int] = []
    channels: list[Tensor] = []
    axis = 0
    for size, first, count in zip(shape, box.offsets, box.sizes, strict=True):
        if view[axis] == size:
            sizes.append(count)
            channels.append(torch.arange(first, first + count))
            axis += 1
            continue
        run = size // view[axis]  # equal scales follow one another, and are an axis of their own
        if first % run or count % run:  # the part begins or ends within a run
            sizes += [count, 1]
            channels += [torch.arange(first, first + count) // run, torch.zeros(1, dtype=torch.long)]
        else:
            sizes += [count // run, run]
            channels += [torch.arange(first // run, (first + count) // run), torch.arange(run)]
        axis += 2
    return tuple(sizes), channels


def _part(part: Part, lines: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Part, tuple[Tensor, ...]]:
    """What of a block is on these lines, and where in the block."""
    picks: list[Pick] = []
    places: list[Tensor] = []
    for pick, line, size in zip(part.picks, lines, sizes, strict=True):
        where = torch.full((size,), -1)
        where[pick] = torch.arange(len(where[pick]))
        own = where[line]
        here = (own >= 0).nonzero().flatten()
        places.append(own[here])
        picks.append(pick_of(here))
    of_side = places if len(places) > 1 else places * len(part.sides)
    sides = tuple(Side(side.family, side.ids[own], side.exponent) for side, own in zip(part.sides, of_side, strict=True))
    loops = None if part.loops is None else self_loops(*sides)
    return Part(tuple(picks), sides, loops), tuple(places)
