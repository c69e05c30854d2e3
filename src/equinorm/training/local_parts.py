"""A model that several processes train together: what this one holds of it, and sums over all."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from equinorm._memory import local
from equinorm._scaling import Scaling
from equinorm.balancing.layout import NetworkLayout
from equinorm.balancing.local_layout import local_network
from equinorm.sharding.boxes import box_of
from equinorm.sharding.processes import Processes, processes_of

Ends = tuple[Tensor | None, Tensor | None]
"""Energies into and out of the channels of a family; None where nothing enters or leaves it."""


class LocalParts:
    """What this process holds of a model: all of it, or shards.

    Args:
        tensors: the model's tensors by name.

    Attributes:
        processes: that hold the others; None where this one holds all.
        tensors: the parts by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.processes: Processes | None = processes_of(tensors)
        self._whole, self._counted = tensors, tensors
        if self.processes is not None:
            self._counted = {n: t for n, t in tensors.items() if self.processes.counts(t) and local(t).numel()}
        self.tensors = {name: local(tensor) for name, tensor in tensors.items()} if self.processes else tensors

    def scalings(self, scalings: Sequence[Scaling]) -> list[Scaling]:
        """How the parts move."""
        if self.processes is None:
            return [*scalings]
        boxes = [box_of(scaling.name, self._whole[scaling.name]) for scaling in scalings]
        return [scaling if box is None else box.scaling(scaling) for scaling, box in zip(scalings, boxes, strict=True)]

    def network(self, network: NetworkLayout) -> NetworkLayout:
        """The layouts of the parts that this process counts; the others have empty blocks."""
        if self.processes is None:
            return network
        shapes = {name: tensor.shape for name, tensor in self._whole.items()}
        found = local_network(network, shapes, {name: box_of(name, tensor) for name, tensor in self._counted.items()})
        return NetworkLayout(tuple(one.layout for one in found), network.families, network.num_free)

    def counts(self, name: str) -> bool:
        """Does this process count what it holds of a tensor?"""
        return name in self._counted

    def any(self, value: bool) -> bool:
        """Is this so in any process?"""
        if self.processes is None:
            return value
        return bool(self.processes.largest(torch.tensor([value], dtype=torch.int32)))


def summed_ends(processes: Processes, ends: Sequence[Ends], empty: Sequence[Tensor], is_max: bool) -> list[Ends]:
    """Energies over all processes, in one sum (maximum).

    Args:
        processes: that hold parts.
        ends: of some families, as this process has them.
        empty: zeros for the channels of each of these families.
        is_max: take maxima.
    """
    parts = [zeros if end is None else end for pair, zeros in zip(ends, empty, strict=True) for end in pair]
    joined = torch.cat(parts)
    joined = processes.largest(joined) if is_max else processes.sum(joined)
    found = joined.split([len(part) for part in parts])
    return list(zip(found[::2], found[1::2], strict=True))


def levels(order: Sequence[int], neighbours: Sequence[set[int]]) -> list[list[int]]:
    """Families that can be swept at once so that all comes out as if they were swept in this order.

    A family waits for those before it that share a block with it.

    >>> levels([0, 1, 2, 3], [{1}, {0}, {3}, {2}])
    [[0, 2], [1, 3]]
    """
    found: list[list[int]] = []
    level: dict[int, int] = {}
    for family in order:
        level[family] = 1 + max((level[other] for other in neighbours[family] if other in level), default=-1)
        if level[family] == len(found):
            found.append([])
        found[level[family]].append(family)
    return found
