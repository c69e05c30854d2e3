"""The blocks of a network's energies as a training step reads them, on the device where the weights are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm.balancing.layout import NetworkLayout, Part
from equinorm.balancing.sides import GROUND, Side

SCATTERED = 4
"""Channels that are not contiguous are copied where they are less than one in so many of a side."""


@dataclass(frozen=True, slots=True, eq=False)
class RecordedBlock:
    """One block of a tensor's energies.

    Attributes:
        tensor: index of the tensor's layout.
        part: the block itself.
        places: for each side where its channels lie in their family; None where they are the family in order, or on the ground.
        scattered: for each side of a matrix where its channels lie among all, if products with all take the place of a copy.
    """

    tensor: int
    part: Part
    places: tuple[Tensor | None, ...]
    scattered: tuple[Tensor | None, ...]

    @property
    def is_empty(self) -> bool:
        """Has it no entries?"""
        return not all(side.ids.numel() for side in self.part.sides)


@dataclass(frozen=True, slots=True, eq=False)
class SweepEdge:
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


Edges = tuple[list[SweepEdge], list[SweepEdge]]
"""Into a family, and out of it."""


def recorded(tensor: int, part: Part, network: NetworkLayout, device: torch.device) -> RecordedBlock:
    """One part that moves, on the device."""
    moved, layout = _moved(part, device), network.layouts[tensor]
    scattered: list[Tensor | None] = [None] * len(moved.picks)
    for side, pick in enumerate(moved.picks if layout.is_matrix and part.loops is None else ()):
        if not isinstance(pick, slice) and len(pick) * SCATTERED >= layout.sizes[side]:
            scattered[side] = pick
    return RecordedBlock(tensor, moved, tuple(_places(side, network.families) for side in moved.sides), tuple(scattered))


def edges_of(
    blocks: Sequence[RecordedBlock], families: Sequence[tuple[int, int]]
) -> list[tuple[list[SweepEdge], list[SweepEdge]]]:
    """What enters each family, and what leaves it."""
    edges: list[Edges] = [([], []) for _ in families]
    for number, block in enumerate(blocks):
        for place, side in enumerate(block.part.sides):
            if side.family != GROUND and not block.is_empty:
                edge = SweepEdge(number, place, *_gathering(block.places[place], *families[side.family]))
                edges[side.family][side.exponent < 0].append(edge)
    return edges


def _moved(part: Part, device: torch.device) -> Part:
    picks = tuple(pick if isinstance(pick, slice) else pick.to(device) for pick in part.picks)
    sides = tuple(Side(side.family, side.ids.to(device), side.exponent) for side in part.sides)
    return Part(picks, sides, None if part.loops is None else part.loops.to(device))


def _places(side: Side, families: Sequence[tuple[int, int]]) -> Tensor | None:
    """Where the channels of a side lie in their family; None if they are the family in order."""
    if side.family == GROUND:
        return None
    first, last = families[side.family]
    places = side.ids - first
    return None if torch.equal(places, torch.arange(last - first, device=places.device)) else places


def _gathering(places: Tensor | None, first: int, last: int) -> tuple[Tensor | None, Tensor | None]:
    """Where in a side each channel of its family lies; sums over these places come out the same in every run."""
    if places is None:
        return None, None
    device, places = places.device, places.cpu()
    order = torch.argsort(places, stable=True)
    counts = torch.bincount(places, minlength=last - first)
    most = int(counts.max())
    slots = torch.arange(most)
    starts = counts.cumsum(0) - counts
    mask = slots < counts[:, None]
    gather = order[(starts[:, None] + slots).clamp_(max=len(order) - 1)]
    return gather.to(device), None if bool(mask.all()) else mask.to(device)
