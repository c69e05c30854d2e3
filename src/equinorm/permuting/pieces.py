"""Tensors in pieces: views whose every axis is one atom, so that channels are rows of matrices without any table of entries."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from equinorm.permuting.atoms import Atom, Axis, Factor, Sum, resolved, size_of

_Path = tuple[int, ...]
"""The axis that an atom stands in, and which term of every sum around it."""


class _Cut(NamedTuple):
    """Entries of one term of a sum, then seen in the factors of the term."""

    axis: int
    start: int
    length: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of a tensor, seen with an axis for each atom.

    Attributes:
        tensor: its number.
        atoms: of each axis.
    """

    tensor: int
    atoms: tuple[Atom, ...]
    _paths: tuple[_Path, ...]
    _shape: tuple[int, ...]
    _cuts: tuple[_Cut, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The piece as a view of a contiguous tensor."""
        view = tensor.view(self._shape)
        for cut in self._cuts:
            view = view.narrow(cut.axis, cut.start, cut.length).view(cut.shape)
        return view

    def axes_of(self, places: Mapping[Atom, tuple[Atom, ...]]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Every axis of a free atom, with those of the atoms around it.

        Args:
            places: for each free atom, those at each place of which its order may be another one.
        """
        for axis, atom in enumerate(self.atoms):
            if atom in places:
                yield axis, tuple(self._around(axis, other) for other in places[atom])

    def _around(self, axis: int, other: Atom) -> int:
        """The axis of an atom around one: in the same term, or outside of all sums."""
        path = self._paths[axis]
        return next(
            at
            for at, (atom, own) in enumerate(zip(self.atoms, self._paths, strict=True))
            if atom is other and at != axis and (len(own) == 1 or path[: len(own)] == own)
        )


def pieces(tensors: Sequence[Sequence[Axis]], places: Mapping[Atom, tuple[Atom, ...]]) -> list[Piece]:
    """All pieces of tensors with these axes in which something may be permuted."""
    found: list[Piece] = []
    for number, axes in enumerate(tensors):
        factors = [(factor, (place,)) for place, axis in enumerate(axes) for factor in resolved(axis)]
        shape = tuple(factor.size for factor, _ in factors)
        if 0 in shape:
            continue
        for atoms, paths, cuts in _cut(factors, ()):
            if any(atom in places for atom in atoms):
                found.append(Piece(number, atoms, paths, shape, cuts))
    return found


def _cut(
    factors: Sequence[tuple[Factor, _Path]], cuts: tuple[_Cut, ...]
) -> Iterator[tuple[tuple[Atom, ...], tuple[_Path, ...], tuple[_Cut, ...]]]:
    """Atoms, paths and cuts of every piece: sums are taken apart, the first one first."""
    for axis, (factor, path) in enumerate(factors):
        if not isinstance(factor, Sum):
            continue
        start = 0
        for number, term in enumerate(factor.terms):
            inside = [(part, (*path, axis, number)) for part in resolved(term)]
            whole = [*factors[:axis], *inside, *factors[axis + 1 :]]
            length = size_of(term)
            yield from _cut(whole, (*cuts, _Cut(axis, start, length, tuple(part.size for part, _ in whole))))
            start += length
        return
    atoms = tuple(factor for factor, _ in factors if isinstance(factor, Atom))
    yield atoms, tuple(path for _, path in factors), cuts


def rows(view: Tensor, axis: int, around: Sequence[int]) -> Tensor:
    """Entries of every channel, of shape (places around it, channels, entries)."""
    front = (*around, axis)
    rest = [at for at in range(view.dim()) if at not in front]
    orders = math.prod(view.shape[at] for at in around)
    return view.permute(*front, *rest).reshape(orders, view.shape[axis], -1)


def reorder_(view: Tensor, axis: int, around: Sequence[int], order: Tensor) -> None:
    """Permute the channels along an axis in place.

    Args:
        view: a piece.
        axis: of the channels.
        around: axes at each place of which the order is another one.
        order: of shape (*sizes of these axes, channels).
    """
    if not around:
        view.copy_(view.index_select(axis, order))
        return
    front = (*around, axis)
    index = order.permute(*(front.index(at) for at in sorted(front)))
    index = index.reshape([size if at in front else 1 for at, size in enumerate(view.shape)])
    view.copy_(view.gather(axis, index.expand(view.shape)))
