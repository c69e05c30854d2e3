"""Cycles recorded for the compiled kernels, which run them in one call."""

import ctypes
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equinorm import native
from equinorm.balancing.dense_blocks import LEAST, DenseMatrix, dense, stretches
from equinorm.balancing.layout import NetworkLayout, Part, Pick, TensorLayout
from equinorm.balancing.norm import Norm
from equinorm.balancing.sides import GROUND, Side

MOST_PIECES = 64
"""Into how many one block may be cut; into more, if the weight has `LEAST` entries for each."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """In what order a cycle moves families, and how far.

    Attributes:
        order: of the families in a sweep.
        steps: by what log(out / in) of each family is multiplied.
        levels: minimise over one scalar for each family before each sweep.
        newton_steps: of which so many are taken.
        longest_step: of one of them.
    """

    order: Sequence[int]
    steps: Sequence[float]
    levels: bool
    newton_steps: int
    longest_step: float


@dataclass(frozen=True, slots=True, eq=False)
class PartMatrix:
    """A part of the layouts, or a piece of one, as a matrix in memory.

    Attributes:
        part: number of the part, among those that move.
        tensor: index of its weight.
        matrix: how it lies in memory.
        sides: who moves it.
    """

    part: int
    tensor: int
    matrix: DenseMatrix
    sides: tuple[Side, ...]


class NativeProgram:
    """Cycles of Algorithm 1 or of the two-level method.

    Args:
        kernels: that run it.
        pieces: of all parts that move, in their order.
        tensors: the weights.
        families: first and last + 1 id of every family.
        norm: p = 1 or 2.
        schedule: of a cycle.
    """

    def __init__(
        self,
        kernels: native.Kernels,
        pieces: Sequence[PartMatrix],
        tensors: Sequence[Tensor],
        families: Sequence[tuple[int, int]],
        norm: Norm,
        schedule: Schedule,
    ) -> None:
        self._kernels, self._tensors, self._levels = kernels, tensors, schedule.levels
        self._parts = torch.tensor([piece.part for piece in pieces])
        self._kept: list[object] = []  # memory that structures point into
        self._edges: list[list[native.Edge]] = [[] for _ in families]
        self._ids = max(last for _, last in families)
        records = [self._block(number, piece) for number, piece in enumerate(pieces)]
        rows = [
            native.Family(*families[number], len(edges), self._at(native.Edge, edges), schedule.steps[number])
            for number, edges in enumerate(self._edges)
        ]
        self._program = native.Program(
            len(records), len(rows), self._at(native.Block, records), self._at(native.Family, rows),
            self._at(ctypes.c_int64, schedule.order), int(norm.p), self._ids, schedule.newton_steps, schedule.longest_step,
        )  # fmt: skip

    def run_cycles(self, weights: Tensor, cycles: int) -> Tensor:
        """Log-scales of classes 0..num_free after so many cycles, in float64.

        Args:
            weights: by which the energy of each part counts that moves, float64, one layout after the other.
            cycles: how many.
        """
        z, weights = torch.zeros(self._ids, dtype=torch.float64), weights[self._parts]
        pointers = (ctypes.c_void_p * len(self._tensors))(*(tensor.data_ptr() for tensor in self._tensors))
        self._kernels.cycle(self._program, pointers, weights, z, cycles, self._levels)
        return z

    def _block(self, number: int, piece: PartMatrix) -> native.Block:
        matrix = piece.matrix
        factors: tuple[list[native.Factor], list[native.Factor]] = ([], [])
        for place, side in enumerate(piece.sides):
            if side.family == GROUND:
                continue
            line = matrix.lines[min(place, len(matrix.lines) - 1)]
            ids = line.spread(side.ids.cpu()).to(torch.int32).contiguous()
            self._kept.append(ids)
            own = factors[not line.is_row]
            self._edges[side.family].append(native.Edge(number, not line.is_row, len(own)))
            own.append(native.Factor(ids.data_ptr(), side.exponent, side.family))
        return native.Block(
            piece.tensor, matrix.first, matrix.pitch, (native.Line * 2)(*map(self._line, matrix.shape, factors))
        )

    def _line(self, size: int, factors: list[native.Factor]) -> native.Line:
        base = torch.zeros(size, dtype=torch.float64) if self._levels and factors else None
        self._kept.append(base)
        return native.Line(size, len(factors), self._at(native.Factor, factors), None if base is None else base.data_ptr())

    def _at(self, kind: type, records: Sequence) -> int:
        """Where they lie in memory, end to end."""
        found = native.array(kind, records)
        self._kept.append(found)
        return ctypes.addressof(found)


def program(
    network: NetworkLayout, tensors: Mapping[str, Tensor], norm: Norm, dtype: torch.dtype, schedule: Schedule
) -> NativeProgram | None:
    """Record the cycles of a problem; None where the kernels do not know its norm, a dtype, or how a weight lies in memory.

    Args:
        network: of the tensors whose norm counts.
        tensors: by name.
        norm: whose energies are summed.
        dtype: of the sums.
        schedule: of a cycle.

    Raises:
        EquinormError: if the kernels cannot be compiled on this machine.
    """
    weights = network.weights(tensors)
    dtypes = {weight.dtype for weight in weights}
    kernels = native.kernels_for(dtypes.pop(), dtype) if norm.is_cheap and len(dtypes) == 1 else None
    if kernels is None:
        return None
    pieces: list[PartMatrix] = []
    for number, (index, part) in enumerate(network.moving):
        layout, weight = network.layouts[index], weights[index]
        found = _grouped(layout, part, weight)
        if not found:
            found = [(dense(layout, picks, weight), sides) for picks, sides in _pieces(layout, part, weight)]
        if part.loops is not None or len(found) > max(MOST_PIECES, weight.numel() // LEAST):
            return None
        for matrix, sides in found:
            if matrix is None:
                return None
            pieces.append(PartMatrix(number, index, matrix, sides))
    return NativeProgram(kernels, pieces, weights, network.families, norm, schedule)


def _grouped(layout: TensorLayout, part: Part, weight: Tensor) -> list[tuple[DenseMatrix | None, tuple[Side, ...]]]:
    """The terms of a grouped convolution as a matrix for each group; nothing for other lists of terms."""
    if layout.is_matrix or len(layout.axes) != 2:
        return []
    width, found = layout.scaling.shape[layout.axes[1]], []
    matrices = replace(layout, along=tuple((axis,) for axis in layout.axes), is_matrix=True)
    for (place,), sides in _pieces(layout, part, weight):
        if place.start % width or place.stop % width:
            return []
        ids = [side.ids.view(-1, width) for side in sides]
        across = [bool((own != own[:, :1]).any()) for own in ids]
        changes = [(own.diff(dim=0) != 0).any(1) for own, is_across in zip(ids, across, strict=True) if is_across]
        starts = (torch.stack(changes).any(0).nonzero()[:, 0] + 1).tolist() if changes else []
        for first, last in itertools.pairwise([0, *starts, place.stop // width - place.start // width]):
            rows = slice(place.start // width + first, place.start // width + last)
            matrix = dense(matrices, (rows, slice(None)), weight)
            if matrix is None:
                return []
            lines = tuple(matrix.lines[is_across] for is_across in across)
            own = [own[first] if is_across else own[first:last, 0] for own, is_across in zip(ids, across, strict=True)]
            moved = tuple(Side(side.family, part, side.exponent) for side, part in zip(sides, own, strict=True))
            found.append((replace(matrix, lines=lines), moved))
    return found if len(found) <= MOST_PIECES else []


_Cut = tuple[tuple[slice, ...], tuple[Side, ...]]
"""Contiguous channels along each side, and who moves them."""


def _pieces(layout: TensorLayout, part: Part, weight: Tensor) -> list[_Cut]:
    """A block, cut where its channels are not contiguous in the weight."""
    if not layout.is_matrix:  # terms, of all sides
        return [((pick,), tuple(_some(side, here) for side in part.sides)) for pick, here in _runs(part.picks[0])]
    rows, columns = part.sides
    height, width = stretches(layout, weight)
    return [
        ((down, across), (_some(rows, here), _some(columns, there)))
        for down, here in _runs(part.picks[0], height)
        for across, there in _runs(part.picks[1], width)
    ]


def _some(side: Side, here: slice) -> Side:
    return Side(side.family, side.ids[here], side.exponent)


def _runs(pick: Pick, most: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Contiguous places, in none of which a multiple of `most` lies but at its start, and where they are among all."""
    if isinstance(pick, slice) and (most is None or pick.stop <= most):
        yield pick, slice(None)
        return
    places = torch.arange(pick.start, pick.stop) if isinstance(pick, slice) else pick.cpu()
    ends = places.diff() != 1
    if most is not None:
        ends |= places[1:] % most == 0
    starts = [0, *(ends.nonzero().flatten() + 1).tolist(), len(places)]
    for first, last in itertools.pairwise(starts):
        place = int(places[first])
        yield slice(place, place + last - first), slice(first, last)
