"""Where each tensor's energies lie, and which channels move them: everything about a problem but the numbers.

|w|^p is summed over the axes that no scale tells apart, and over runs of equal scales along an axis, which become an axis of
their own (a linear layer behind a flattened image). What remains between out-channels and in-channels is a matrix. A side of
it runs along one axis, or along several if scales tell their indices apart together, as experts and their channels. With one
side only it is a matrix of one column on the ground; with more, or with several scales on one channel, a list of terms. It is
cut where families of channels change. A training hook works this out once and reads the weights many times.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from equinorm._class_ids import firsts_of_runs
from equinorm._scaling import Scaling
from equinorm.balancing.sides import GROUND, Side, family_of_classes, self_loops
from equinorm.rescaling.last_answers import LastAnswers

Pick = slice | Tensor
"""Places along one axis; a slice where they are contiguous, which copies nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One block of a tensor's energies.

    A linear layer behind a concatenation of 3 channels of family 0 and 2 of family 1, whose 4 outputs are family 2, is cut in
    two: `picks` (0:4, 0:3) and (0:4, 3:5), `sides` (family 2, exponent 1; family 0, exponent −1) and (2, 1; 1, −1).

    Attributes:
        picks: rows and columns of the matrix, or places in the list of terms.
        sides: who moves them.
        loops: mask of entries that join a class to itself, whose energy never changes; None if there are none.
    """

    picks: tuple[Pick, ...]
    sides: tuple[Side, ...]
    loops: Tensor | None

    @property
    def is_still(self) -> bool:
        """Does nothing move it?"""
        return all(side.family == GROUND for side in self.sides)


@dataclass(frozen=True, slots=True, eq=False)
class TensorLayout:
    """How one tensor's energies are laid out.

    The second of three convolutions, of 16 outputs, 8 inputs and a kernel of 3 by 3, is a matrix of 16 rows and 8 columns, each
    entry the sum of |w|^p over 9 weights. Classes 1 to 8 move its columns, and 9 to 24 its rows:

    >>> columns, rows = torch.arange(1, 9).reshape(1, 8, 1, 1), torch.arange(9, 25).reshape(16, 1, 1, 1)
    >>> scaling = Scaling(("1.weight",), (16, 8, 3, 3), torch.float32, "parameter", "weight", 2, ((-1.0, columns), (1.0, rows)))
    >>> network = lay_out([scaling], [(1, 9), (9, 25)], 24, torch.zeros(25, dtype=torch.bool))
    >>> (layout,) = network.layouts
    >>> layout.along, layout.others, layout.is_matrix
    (((0,), (1,)), (2, 3), True)
    >>> (part,) = layout.parts
    >>> [(side.family, side.exponent, len(side.ids)) for side in part.sides]
    [(1, 1.0, 16), (0, -1.0, 8)]

    Attributes:
        scaling: of the tensor, as `view` shows it.
        along: axes that stay apart, those of rows and those of columns (none for one column); of a list of terms, all.
        is_matrix: is it one, or a list of terms?
        parts: its blocks.
    """

    scaling: Scaling
    along: tuple[tuple[int, ...], ...]
    is_matrix: bool
    parts: tuple[Part, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that stay apart, side by side."""
        return tuple(itertools.chain(*self.along))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Channels along each side; of a list of terms, how many there are."""
        return tuple(math.prod(self.scaling.shape[axis] for axis in side) for side in self.along)

    @property
    def others(self) -> tuple[int, ...]:
        """The axes to sum over."""
        return tuple(axis for axis in range(len(self.scaling.shape)) if axis not in self.axes)

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor without gradient, with an axis for every run of equal scales."""
        weight = tensor.detach()
        return weight if weight.shape == self.scaling.shape else weight.view(self.scaling.shape)

    def effective(self, tensor: Tensor) -> Tensor:
        """The same plus the offset: what scales."""
        return self.view(tensor) + self.scaling.offset if self.scaling.offset else self.view(tensor)


@dataclass(frozen=True, slots=True, eq=False)
class NetworkLayout:
    """The layouts of a network's tensors.

    Attributes:
        layouts: of the tensors whose norm counts.
        families: first and last + 1 id of every family.
        num_free: number of free classes.
        kept: what solvers have worked out from this, for the next time.
    """

    layouts: tuple[TensorLayout, ...]
    families: tuple[tuple[int, int], ...]
    num_free: int
    kept: LastAnswers = field(default_factory=LastAnswers)

    @property
    def moving(self) -> list[tuple[int, Part]]:
        """Every part that moves, with the index of its layout."""
        return [(index, part) for index, layout in enumerate(self.layouts) for part in layout.parts if not part.is_still]

    def weights(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors themselves, one for each layout, from all by name."""
        return [tensors[layout.scaling.name] for layout in self.layouts]


def lay_out(scalings: Sequence[Scaling], families: Sequence[tuple[int, int]], num_free: int, held: Tensor) -> NetworkLayout:
    """Lay out the energies of tensors.

    Args:
        scalings: of the tensors whose norm counts.
        families: first and last + 1 id of every family.
        num_free: number of free classes.
        held: mask over 0..num_free of classes that must not move; they count as ground.
    """
    family_of = family_of_classes(families, num_free)
    family_of[held] = GROUND
    is_all_free = not bool((family_of[1:] == GROUND).any())
    plain = _plain_layouts(scalings, family_of) if is_all_free else [None] * len(scalings)
    pairs = zip(scalings, plain, strict=True)
    layouts = tuple(_layout(scaling, family_of, is_all_free) if own is None else own for scaling, own in pairs)
    return NetworkLayout(layouts, tuple(families), num_free)


_Channels = tuple[Tensor, Tensor]
"""Free class (0: none) and exponent of each channel along one side."""

_Kind = tuple[int, float]
"""Family and exponent."""


def _layout(scaling: Scaling, family_of: Tensor, is_all_free: bool) -> TensorLayout:
    factors = [*scaling.factors]
    if not is_all_free:
        factors = [(exponent, torch.where(family_of[ids] == GROUND, 0, ids)) for exponent, ids in factors]
    scaling, factors = _split(scaling, factors)
    along = _sides(factors)
    sides = [_joined(factors, axes, scaling.shape) for axes in along]
    sides = [channels for channels in sides if channels is not None]
    is_separate = all(ids.numel() > 1 for _, ids in factors)
    if is_separate and len(along) in (1, 2) and len(sides) == len(along) and not _add_up(sides):
        if len(along) == 1:
            one = torch.zeros(1, dtype=torch.float64)
            sides.append((one.long(), one))
        return TensorLayout(scaling, along, True, tuple(_matrix_parts(sides, family_of)))
    axes = tuple(sorted(itertools.chain(*along)))
    return TensorLayout(scaling, (axes,), False, tuple(_term_parts(_terms(scaling, factors, axes), family_of)))


def _plain_layouts(scalings: Sequence[Scaling], family_of: Tensor) -> list[TensorLayout | None]:
    """Those of tensors which one whole family moves along one axis, as most do in deep networks; None for others."""
    families, found = family_of.numpy(), list[TensorLayout | None]([None] * len(scalings))
    ground = Side(GROUND, torch.zeros(1, dtype=torch.long), 1.0)
    alone = [(place, *scaling.factors[0]) for place, scaling in enumerate(scalings) if _is_along_one_axis(scaling)]
    for (place, exponent, ids), first in zip(alone, firsts_of_runs([ids for *_, ids in alone]), strict=True):
        size = ids.numel()
        if first is not None and families[first] == families[first + size - 1]:
            sides = (Side(int(families[first]), ids.reshape(-1), exponent), ground)
            part = Part((slice(0, size), slice(0, 1)), sides, None)
            found[place] = TensorLayout(scalings[place], ((ids.shape.index(size),),), True, (part,))
    return found


def _is_along_one_axis(scaling: Scaling) -> bool:
    """Has it one factor, of two channels at least?"""
    if len(scaling.factors) != 1:
        return False
    ids = scaling.factors[0][1]
    size = ids.numel()
    return size > 1 and size in ids.shape and ids.dim() == len(scaling.shape)


def _sides(factors: Sequence[tuple[float, Tensor]]) -> tuple[tuple[int, ...], ...]:
    """Axes that scales tell apart; those that one factor does together are one side."""
    sides: list[set[int]] = []
    for _, ids in factors:
        own = {axis for axis, size in enumerate(ids.shape) if size > 1}
        joined = [side for side in sides if side & own]
        sides = [side for side in sides if not side & own] + ([own.union(*joined)] if own else [])
    return tuple(sorted(tuple(sorted(side)) for side in sides))


def _split(scaling: Scaling, factors: list[tuple[float, Tensor]]) -> tuple[Scaling, list[tuple[float, Tensor]]]:
    """Make an axis of (channels · n) where scales repeat n times each into two axes, of the channels and of n."""
    shape: list[int] = []
    for size in scaling.shape:
        axis = len(shape)
        run = math.gcd(size, *(_run(ids, axis) for _, ids in factors if ids.size(axis) > 1))
        is_split = 1 < run < size
        shape += [size // run, run] if is_split else [size]
        if is_split:
            ones = (size // run, run)
            factors = [
                (e, ids.unsqueeze(axis) if ids.size(axis) == 1 else ids.unflatten(axis, ones).narrow(axis + 1, 0, 1))
                for e, ids in factors
            ]
    return (scaling, factors) if len(shape) == len(scaling.shape) else (replace(scaling, shape=tuple(shape)), factors)


def _run(ids: Tensor, axis: int) -> int:
    """Largest number of entries along an axis that any run of equal ids is a multiple of; 0 if they are all equal."""
    after, before = ids.narrow(axis, 1, ids.size(axis) - 1), ids.narrow(axis, 0, ids.size(axis) - 1)
    if not torch.equal(after.narrow(axis, 0, 1), before.narrow(axis, 0, 1)):
        return 1
    changes = (after != before).movedim(axis, 0).reshape(ids.size(axis) - 1, -1).any(1).nonzero()[:, 0] + 1
    return math.gcd(*changes.tolist())


def _joined(factors: Sequence[tuple[float, Tensor]], axes: Sequence[int], shape: Sequence[int]) -> _Channels | None:
    """One class and exponent for each channel of a side, or None if several move one channel."""
    sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    own = [factor for factor in factors if any(factor[1].size(axis) > 1 for axis in axes)]
    if len(own) == 1:
        ((exponent, ids),) = own
        found = ids.expand(sizes).flatten()
        return found, (found > 0).double() * exponent
    found, exponents = torch.zeros(sizes, dtype=torch.long), torch.zeros(sizes, dtype=torch.float64)
    for exponent, ids in own:
        if bool(((found > 0) & (ids > 0)).any()):
            return None
        found, exponents = found + ids, exponents + (ids > 0) * exponent
    return found.flatten(), exponents.flatten()


def _add_up(sides: Sequence[_Channels]) -> bool:
    """Does some class enter one entry with exponents of both signs that do not cancel? A matrix would count it twice."""
    if len(sides) < 2:
        return False
    (rows, up), (columns, across) = sides
    pairs = itertools.product(up[rows > 0].unique().tolist(), across[columns > 0].unique().tolist())
    apart = [(a, b) for a, b in pairs if a * b < 0 and a + b != 0]
    return any(bool(torch.isin(rows[up == a], columns[across == b]).any()) for a, b in apart)


def _terms(scaling: Scaling, factors: Sequence[tuple[float, Tensor]], axes: Sequence[int]) -> list[_Channels]:
    """The classes of every entry between the axes, one side for each factor; the exponents of one class are added."""
    shape = [scaling.shape[axis] for axis in axes]
    ids = [ids.reshape([ids.size(axis) for axis in axes]).expand(shape).flatten() for _, ids in factors]
    exponents = [torch.full(part.shape, e, dtype=torch.float64) for part, (e, _) in zip(ids, factors, strict=True)]
    for i, j in itertools.combinations(range(len(ids)), 2):
        same = ids[i] == ids[j]
        exponents[i] = exponents[i] + torch.where(same, exponents[j], 0.0)
        ids[j] = torch.where(same, 0, ids[j])
    return [(torch.where(e == 0, 0, part), e) for part, e in zip(ids, exponents, strict=True)]


def _matrix_parts(sides: Sequence[_Channels], family_of: Tensor) -> Iterator[Part]:
    """Cut a matrix where families or exponents change, so that every side of a block has one of each."""
    rows, columns = (_picks(*side, family_of) for side in sides)
    for (row_kind, row_pick), (column_kind, column_pick) in itertools.product(rows, columns):
        found = (_side(row_kind, sides[0][0][row_pick]), _side(column_kind, sides[1][0][column_pick]))
        yield Part((row_pick, column_pick), found, self_loops(*found))


def _picks(ids: Tensor, exponents: Tensor, family_of: Tensor) -> list[tuple[_Kind, Pick]]:
    """The kinds of channels along one side, and where they are."""
    families = family_of[ids]
    if len(ids) and bool((families == families[0]).all() & (exponents == exponents[0]).all()):  # nearly always
        return [((int(families[0]), float(exponents[0]) if int(ids[0]) else 1.0), slice(0, len(ids)))]
    codes, legend = _kinds(ids, exponents, family_of)
    return [(legend[code], pick_of((codes == code).nonzero().flatten())) for code in legend]


def _term_parts(sides: Sequence[_Channels], family_of: Tensor) -> Iterator[Part]:
    """The same for a list of terms."""
    kinds = [_kinds(ids, exponents, family_of) for ids, exponents in sides]
    patterns, inverse = torch.unique(torch.stack([codes for codes, _ in kinds]), dim=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T.tolist()):
        pick = (inverse == number).nonzero().flatten()
        found = tuple(_side(kinds[i][1][code], sides[i][0][pick]) for i, code in enumerate(pattern))
        yield Part((pick,), found, None)


def _side(kind: _Kind, ids: Tensor) -> Side:
    return Side(kind[0], ids, kind[1])


def _kinds(ids: Tensor, exponents: Tensor, family_of: Tensor) -> tuple[Tensor, dict[int, _Kind]]:
    """A code for the family and exponent of each channel, and what the codes mean. The ground has exponent 1."""
    values, which = torch.unique(torch.where(ids > 0, exponents, 1.0), return_inverse=True)
    codes = (family_of[ids] - GROUND) * len(values) + which
    present = torch.unique(codes).tolist()
    return codes, {code: (code // len(values) + GROUND, float(values[code % len(values)])) for code in present}


def pick_of(places: Tensor) -> Pick:
    """Ascending places; a slice where they are contiguous."""
    first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
    return slice(first, last) if last - first == len(places) else places
