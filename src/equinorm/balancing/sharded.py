"""The convex problem where tensors are sharded: each process sums over its parts, and sums of vectors are shared.

Log-energies of all matrices, along both sides, are one vector: a reading at new log-scales is one sum of it over processes.
What no reading changes, as energies of gains and biases and of grouped convolutions, is summed once. No weight travels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._errors import BalanceError
from equinorm._memory import local
from equinorm.balancing.assemble import problem_of
from equinorm.balancing.blocks import AnyBlock, Block
from equinorm.balancing.layout import NetworkLayout
from equinorm.balancing.local_layout import local_network
from equinorm.balancing.norm import Norm
from equinorm.balancing.options import BalanceOptions
from equinorm.balancing.problem import Problem
from equinorm.balancing.sides import Side
from equinorm.sharding.boxes import box_of
from equinorm.sharding.processes import Processes

FAR = 300.0
"""Logarithm by which energies may have moved since the last reading so that sums cannot over- or underflow."""


@dataclass(slots=True, eq=False)
class _Held:
    """What this process holds of one block: its own block, None for nothing, and its places in the whole."""

    block: AnyBlock | None
    places: tuple[Tensor, ...]

    def logs(self, side: int, z: Tensor, norm: Norm, size: int) -> Tensor:
        """Log-energies along one side of the whole block from what is held; −inf where that is nothing."""
        if self.block is None or self.block.is_empty:
            return torch.full((size,), -math.inf, dtype=torch.float64)
        return norm.join_by(self.places[side], self.block.log_energies(side, z, norm), size)


class Reader:
    """Reads all matrices at the same log-scales.

    Args:
        processes: that hold the parts.
        norm: whose energies these are.
        blocks: the whole blocks' sides, and what this process holds of each.
        local: the problem of this process alone.

    Attributes:
        precise: take sums in float64.
    """

    def __init__(
        self, processes: Processes, norm: Norm, blocks: Sequence[tuple[tuple[Side, ...], _Held]], local: Problem
    ) -> None:
        self._processes, self._norm, self._blocks, self._local = processes, norm, blocks, local
        sides = [side for found, _ in blocks for side in found]
        self._sizes = [len(side.ids) for side in sides]
        self._ids = torch.cat([torch.zeros(0, dtype=torch.long), *(side.ids for side in sides)])
        powers = [torch.full((len(side.ids),), norm.q * side.exponent, dtype=torch.float64) for side in sides]
        self._powers = torch.cat([torch.zeros(0, dtype=torch.float64), *powers])
        self.precise = not bool(processes.largest(torch.tensor([not local.is_precise], dtype=torch.int32)))
        self._at: Tensor | None = None
        self._logs = torch.zeros(0, dtype=torch.float64)
        self._is_valid, self._is_fine = False, self.precise

    def agreed(self, z: Tensor) -> Tensor:
        """The log-scales of the first process: others may have rounded theirs differently."""
        return self._processes.of_the_first(z)

    def joined(self, slack: Tensor) -> Tensor:
        """The least of all processes, entry by entry."""
        return -self._processes.largest(-slack)

    def forget(self) -> None:
        """Energies have changed."""
        self._is_valid = False

    def side(self, number: int, z: Tensor) -> Tensor:
        """Log-energies along one of all sides, at log-scales z."""
        self.read(z)
        return self._logs.split(self._sizes)[number]

    def read(self, z: Tensor) -> None:
        """One reading, unless the last was at these log-scales."""
        if self._is_valid and self._is_fine >= self.precise and self._at is not None and torch.equal(self._at, z):
            return
        if self.precise:
            self._local.refine()
        sizes = iter(self._sizes)
        own = [held.logs(place, z, self._norm, next(sizes)) for sides, held in self._blocks for place in range(len(sides))]
        logs = torch.cat([torch.zeros(0, dtype=torch.float64), *own])
        if self._at is not None and self._is_near(z - self._at):
            expected = self._logs + self._powers * (z - self._at)[self._ids]
            self._logs = _summed(self._processes, logs, expected)
        else:
            self._logs = summed(self._processes, logs)
        self._at, self._is_valid, self._is_fine = z.clone(), True, self.precise

    def _is_near(self, shift: Tensor) -> bool:
        """Can no energy be far from what it was, its own channel's scale aside?"""
        return float(self._powers.abs().max() if len(self._powers) else 0.0) * float(shift.max() - shift.min()) < FAR


def summed(processes: Processes, logs: Tensor) -> Tensor:
    """log Σ exp over processes, entry by entry."""
    return _summed(processes, logs, processes.largest(logs))


def _summed(processes: Processes, logs: Tensor, about: Tensor) -> Tensor:
    """The same, where the result is known to be near `about`."""
    safe = torch.where(about.isfinite(), about, 0.0)
    return processes.sum(torch.exp(logs - safe)).log() + safe


@dataclass(eq=False)
class SharedBlock(AnyBlock):
    """A matrix of which processes hold parts.

    Attributes:
        tensor: index of the scaling that it comes from.
        sides: who moves the energies.
        held: what this process holds.
        reader: of all of them.
        first: number of its first side among all sides.
    """

    tensor: int
    sides: tuple[Side, ...]
    held: _Held
    reader: Reader
    first: int

    def log_energies(self, side: int, z: Tensor, norm: Norm) -> Tensor:
        """Logarithm of the energy of each channel along one side, at log-scales z."""
        return self.reader.side(self.first + side, z)

    def hits(self, place: int, ready: Tensor) -> Tensor:
        """Which channels of one side a nonzero energy that this process holds joins to a channel of the other that is ready."""
        found = torch.zeros(len(self.sides[place].ids), dtype=torch.bool)
        if self.held.block is not None and not self.held.block.is_empty:
            own, other = self.held.places[place], self.held.places[1 - place]
            found[own[self.held.block.hits(place, ready[other])]] = True
        return found

    def without(self, dead: Tensor) -> "SharedBlock":
        """The same block with no energy where a dead class takes part."""
        self.held.block = None if self.held.block is None else self.held.block.without(dead)
        self.reader.forget()
        return self


def shared_problem(
    network: NetworkLayout, tensors: Mapping[str, Tensor], options: BalanceOptions, processes: Processes
) -> Problem:
    """Set up the energies of every weight, each process those of its parts.

    Args:
        network: of the tensors whose norm counts.
        tensors: the model's tensors by name.
        options: the norm, the asymmetry, and how to read.
        processes: that hold them.

    Raises:
        BalanceError: in every process, if one of them holds a weight that is on the meta device or not finite, or entries
            whose powers underflow beside others of their matrix.
    """
    counted = {name: tensor for name, tensor in tensors.items() if processes.counts(tensor) and local(tensor).numel()}
    boxes = {name: box_of(name, tensor) for name, tensor in counted.items()}
    layouts = local_network(network, {name: tensor.shape for name, tensor in tensors.items()}, boxes)
    here = [index for index, found in enumerate(layouts) if found.layout.scaling.name in counted]
    with processes.agreeing(BalanceError):
        parts = NetworkLayout(tuple(layouts[index].layout for index in here), network.families, network.num_free)
        own = problem_of(parts, {name: local(tensor) for name, tensor in counted.items()}, options)
        _check_range(own, parts, options)
    blocks = iter(own.blocks)
    held: list[tuple[int, int, _Held]] = []  # layout and part of every block that moves
    for index, found in enumerate(layouts):
        for number, (part, places) in enumerate(zip(found.layout.parts, found.places, strict=True)):
            if not part.is_still:
                held.append((index, number, _Held(next(blocks) if index in here else None, places)))
    constants = {here[index]: log for index, log in own.constants.items()}
    return _joined(network, held, constants, own, processes)


def _check_range(own: Problem, parts: NetworkLayout, options: BalanceOptions) -> None:
    """Refuse what a matrix of float64 cannot hold: sums over processes take no lists of single entries."""
    moving = sum(not part.is_still for layout in parts.layouts for part in layout.parts)
    for block in own.blocks[moving:]:
        name = parts.layouts[block.tensor].scaling.name
        raise BalanceError(
            f"at p = {options.p:g} entries of {name} underflow beside its largest ones, and it is sharded. Balance with a "
            "smaller p, or the whole model in one process."
        )


def _joined(
    network: NetworkLayout,
    held: Sequence[tuple[int, int, _Held]],
    constants: Mapping[int, float],
    own: Problem,
    processes: Processes,
) -> Problem:
    """The problem of all processes."""
    sides = [network.layouts[index].parts[number].sides for index, number, _ in held]
    is_two_sided = [network.layouts[index].is_matrix and len(network.layouts[index].along) == 2 for index, _, _ in held]
    pairs = [(found, one) for found, (_, _, one), is_shared in zip(sides, held, is_two_sided, strict=True) if is_shared]
    reader = Reader(processes, own.norm, pairs, own)
    start = torch.zeros(network.num_free + 1, dtype=torch.float64)
    once = [(found, one) for found, (_, _, one), is_shared in zip(sides, held, is_two_sided, strict=True) if not is_shared]
    logs = [one.logs(0, start, own.norm, len(found[0].ids)) for found, one in once]
    still = torch.tensor([constants.get(index, -math.inf) for index in range(len(network.layouts))], dtype=torch.float64)
    *static, still = summed(processes, torch.cat([*logs, still])).split([*map(len, logs), len(still)])
    read, first, blocks = iter(static), 0, list[AnyBlock]()
    for found, (index, _, one), is_shared in zip(sides, held, is_two_sided, strict=True):
        if is_shared:
            blocks.append(SharedBlock(index, found, one, reader, first))
            first += 2
        else:
            blocks.append(_known(index, found[:1] if network.layouts[index].is_matrix else found, next(read)))
    found = {index: float(log) for index, log in enumerate(still) if log > -math.inf}
    return Problem(tuple(blocks), network.families, found, network.num_free, own.norm, (reader,), reader)


def _known(index: int, sides: tuple[Side, ...], logs: Tensor) -> Block:
    """A list of terms whose energies every process knows."""
    top = torch.where(logs.isfinite(), logs, 0.0)
    return Block(index, torch.exp(logs - top), (top,), sides)
