"""Cycles of Algorithm 1 recorded for the compiled kernels: one call sweeps over all families."""

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equinorm._blocks import GROUND, Side, stiffness
from equinorm._layout import Layout, Part
from equinorm.native import Edge, Factor, Family, Kernels, Order, array, kernels
from equinorm.native._dense import Dense, Line, dense


class _Block(NamedTuple):
    tensor: int
    matrix: Dense
    sides: tuple[Side, ...]


class Program:
    """Sweeps over all families. Blocks are numbered in the order of `layouts` and of their parts that move.

    Args:
        found: the kernels.
        blocks: all of them.
        tensors: the weights.
        families: first and last + 1 id of every family.
        order: of the families in a sweep.
        p: 1 or 2.
    """

    def __init__(
        self,
        found: Kernels,
        blocks: Sequence[_Block],
        tensors: Sequence[Tensor],
        families: Sequence[tuple[int, int]],
        order: Sequence[int],
        p: int,
    ) -> None:
        self._kernels, self._tensors, self._p = found, tensors, p
        self._kept: list[object] = []  # memory that structures point into
        edges: list[list[Edge]] = [[] for _ in families]
        stiff = [1.0] * len(families)
        for number, block in enumerate(blocks):
            for place, side in enumerate(block.sides):
                if side.family != GROUND:
                    edges[side.family].append(self._edge(number, block, place))
                    stiff[side.family] = max(stiff[side.family], stiffness(block.sides, side.family))
        records = [
            Family(*families[number], len(edges[number]), self._at(array(Edge, edges[number])), 0.5 / (p * stiff[number]))
            for number in order
        ]
        self._order = Order(len(records), self._at(array(Family, records)), p, max(last for _, last in families))
        every = sorted(itertools.chain(*edges), key=lambda edge: edge.block)
        self._edges = array(Edge, [next(group) for _, group in itertools.groupby(every, lambda edge: edge.block)])
        self._count = len(blocks)

    def sweep(self, weights: Tensor, z: Tensor, u: Tensor) -> None:
        """Coordinate steps of every family in order, in place.

        Args:
            weights: by which the energy of each block counts, float64.
            z: log-scales of classes 0..num_free, float64.
            u: exp(pz), likewise.
        """
        self._kernels.sweep(self._order, self._pointers(), weights, z, u)

    def totals(self, u: Tensor) -> Tensor:
        """Energy of every block, in float64."""
        out = torch.zeros(self._count, dtype=torch.float64)
        self._kernels.totals(self._edges, self._p, self._pointers(), u, out)
        return out

    def _pointers(self) -> ctypes.Array:
        """Where the weights are now: a parameter's memory may have been replaced."""
        return (ctypes.c_void_p * len(self._tensors))(*(tensor.data_ptr() for tensor in self._tensors))

    def _edge(self, number: int, block: _Block, place: int) -> Edge:
        matrix, sides = block.matrix, block.sides
        line = matrix.lines[place if len(matrix.lines) > 1 else 0]
        others = [side for other, side in enumerate(sides) if other != place and side.family != GROUND]
        is_matrix = len(matrix.lines) > 1
        across = self._factor(others[0], matrix.lines[1 - place]) if is_matrix and others else Factor(None, 0)
        along = [self._factor(side, line) for side in (sides[place], *(() if is_matrix else others))]
        return Edge(
            block.tensor, matrix.first, *matrix.shape, matrix.pitch,
            line.is_row, sides[place].exponent < 0, number, len(along), self._at(array(Factor, along)), across,
        )  # fmt: skip

    def _factor(self, side: Side, line: Line) -> Factor:
        ids = line.spread(side.ids.cpu()).to(torch.int32).contiguous()
        self._kept.append(ids)
        return Factor(ids.data_ptr(), side.exponent)

    def _at(self, records: ctypes.Array) -> int:
        self._kept.append(records)
        return ctypes.addressof(records)


def program(
    layouts: Sequence[Layout],
    tensors: Mapping[str, Tensor],
    families: Sequence[tuple[int, int]],
    order: Sequence[int],
    p: float,
    dtype: torch.dtype,
) -> Program | None:
    """Record the sweeps of a problem; None where the kernels do not know its norm, a dtype, or how a weight lies in memory.

    Raises:
        EquinormError: if the kernels cannot be compiled on this machine.
    """
    weights = [tensors[layout.scaling.name] for layout in layouts]
    dtypes = {weight.dtype for weight in weights}
    found = kernels(dtypes.pop(), dtype) if p in (1, 2) and len(dtypes) == 1 else None
    if found is None:
        return None
    blocks = [block for index, layout in enumerate(layouts) for block in _blocks(index, layout, weights[index])]
    if None in blocks:
        return None
    return Program(found, [block for block in blocks if block is not None], weights, families, order, int(p))


def _blocks(index: int, layout: Layout, weight: Tensor) -> list[_Block | None]:
    return [_block(index, layout, part, weight) for part in layout.parts if not part.is_still]


def _block(index: int, layout: Layout, part: Part, weight: Tensor) -> _Block | None:
    matrix = dense(layout, part.picks, weight)
    return None if matrix is None or part.loops is not None else _Block(index, matrix, part.sides)
