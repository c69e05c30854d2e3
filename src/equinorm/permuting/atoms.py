"""Axes in parts: an axis is a product of atoms and of sums, each atom a set of channels that may be permuted.

Where a network looks at an axis of 12 entries as (3, 4), its atom of 12 becomes a product of two; where it cuts it into 5 and
7, a sum. Where two axes must be permuted alike, their atoms become one. All three only make the group of permutations smaller,
so that a law that held before holds after.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from equinorm._scaling import Reason

_NUMBERS = itertools.count()


@dataclass(eq=False, slots=True)
class Atom:
    """Channels that are permuted among themselves.

    Attributes:
        size: how many.
        order: when it was made, parts of it after it; of two that became one, the earlier.
        pinned: why they cannot be permuted; None if they can.
        same: the atom that it has become one with.
        parts: the axis that it has turned out to be.
    """

    size: int
    order: tuple[int, ...] = field(default_factory=lambda: (next(_NUMBERS),))
    pinned: Reason | None = None
    same: "Atom | None" = None
    parts: "Axis | None" = None


@dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """Axes one after the other.

    Attributes:
        terms: each an axis.
        reason: the operation that cut it; None for axes that were joined.
    """

    terms: tuple["Axis", ...]
    reason: Reason | None = None

    @property
    def size(self) -> int:
        """Entries of all."""
        return sum(map(size_of, self.terms))


Factor = Atom | Sum
Axis = tuple[Factor, ...]
"""Factors, the slowest first. The empty product is an axis of size 1."""


def size_of(axis: Axis) -> int:
    """Entries of an axis."""
    return math.prod(factor.size for factor in axis)


def fresh(size: int, pinned: Reason | None = None) -> Axis:
    """An axis of one new atom."""
    return () if size == 1 else (Atom(size, pinned=pinned),)


def _parts_of(atom: Atom, sizes: Sequence[int]) -> list[Axis]:
    """Axes of new atoms that are parts of one."""
    return [() if size == 1 else (Atom(size, (*atom.order, place)),) for place, size in enumerate(sizes)]


def resolved(axis: Axis) -> Axis:
    """An axis in the atoms that are still whole; products in products and sums in sums are dissolved."""
    found: list[Factor] = []
    for factor in axis:
        if isinstance(factor, Sum):
            terms: list[Axis] = []
            for term in map(resolved, factor.terms):
                is_sum = len(term) == 1 and isinstance(term[0], Sum)
                terms += term[0].terms if is_sum else (term,)  # pyright: ignore[reportAttributeAccessIssue]
            found += terms[0] if len(terms) == 1 else (Sum(tuple(terms), factor.reason),)
        else:
            atom = representative(factor)
            if atom.parts is not None:
                found += resolved(atom.parts)
            elif atom.size != 1:
                found.append(atom)
    return tuple(found)


def representative(atom: Atom) -> Atom:
    """The atom that stands for all that have become one."""
    while atom.same is not None:
        if atom.same.same is not None:
            atom.same = atom.same.same
        atom = atom.same
    return atom


def atoms(axis: Axis) -> Iterator[Atom]:
    """Every atom that is still whole."""
    for factor in resolved(axis):
        if isinstance(factor, Sum):
            for term in factor.terms:
                yield from atoms(term)
        else:
            yield factor


def pin(axes: Iterable[Axis], reason: Reason) -> None:
    """Nothing in these axes is permuted."""
    for axis in axes:
        for atom in atoms(axis):
            atom.pinned = atom.pinned or reason


def is_pinned(axes: Iterable[Axis]) -> bool:
    """Is it known that nothing in these axes is permuted?"""
    return all(atom.pinned is not None for axis in axes for atom in atoms(axis))


def unify(one: Axis, other: Axis, reason: Reason) -> None:
    """Both axes are permuted alike; where their parts do not fit, not at all."""
    left, right = list(resolved(one)), list(resolved(other))
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a.size == b.size:
            _unify_factors(a, b, reason)
        elif a.size > b.size and (parts := _split_off(a, b.size, reason)):
            left[:0], right[:0] = parts, [b]
        elif a.size < b.size and (parts := _split_off(b, a.size, reason)):
            left[:0], right[:0] = [a], parts
        else:
            pin(((a, *left), (b, *right)), reason)
            return
        left, right = list(resolved(tuple(left))), list(resolved(tuple(right)))
    pin((tuple(left), tuple(right)), reason)  # sizes that do not match: of no well-formed operation


def _unify_factors(a: Factor, b: Factor, reason: Reason) -> None:
    """Two factors of one size."""
    if isinstance(a, Sum) and isinstance(b, Sum):
        _unify_sums(list(a.terms), list(b.terms), reason)
    elif isinstance(a, Atom) and isinstance(b, Atom):
        if a is not b:
            a, b = (a, b) if a.order < b.order else (b, a)
            b.same, a.pinned = a, a.pinned or b.pinned
    else:
        atom, parts = (a, b) if isinstance(a, Atom) else (b, a)
        assert isinstance(atom, Atom)
        _become(atom, (parts,))


def _become(atom: Atom, parts: Axis) -> None:
    """An atom turns out to be an axis of parts."""
    atom.parts = parts
    if atom.pinned is not None:
        pin([parts], atom.pinned)


def _unify_sums(left: list[Axis], right: list[Axis], reason: Reason) -> None:
    """Term by term, after cutting what reaches further than the other's."""
    while left and right:
        a, b = left.pop(0), right.pop(0)
        sizes = size_of(a), size_of(b)
        if sizes[0] != sizes[1]:
            longer, size = (a, sizes[1]) if sizes[0] > sizes[1] else (b, sizes[0])
            pieces = cut(longer, [size, abs(sizes[0] - sizes[1])], reason)
            if pieces is None:
                pin((a, b, *left, *right), reason)
                return
            if longer is a:
                a = pieces[0]
                left.insert(0, pieces[1])
            else:
                b = pieces[0]
                right.insert(0, pieces[1])
        unify(a, b, reason)


def _split_off(factor: Factor, size: int, reason: Reason) -> list[Factor] | None:
    """A factor as a product whose first has this size; None where it is no such product."""
    if factor.size % size or size == 0:
        return None
    if isinstance(factor, Atom):
        front, rest = _parts_of(factor, [size, factor.size // size])
        _become(factor, (*front, *rest))
        return list(resolved((factor,)))
    inner = factor.size // size
    if all(size_of(term) % inner == 0 for term in factor.terms):  # as (terms in steps of a product, what all have in common)
        halves = [split_front(term, size_of(term) // inner, reason) for term in factor.terms]
        for _, rest in halves[1:]:
            unify(halves[0][1], rest, reason)
        return [Sum(tuple(front for front, _ in halves), factor.reason or reason), *resolved(halves[0][1])]
    pieces = cut((factor,), [inner] * size, reason)
    if pieces is None:
        return None
    for piece in pieces[1:]:  # as many alike: each is permuted as the first
        unify(pieces[0], piece, reason)
    return [*fresh(size, reason), *resolved(pieces[0])]


def split_front(axis: Axis, size: int, reason: Reason) -> tuple[Axis, Axis]:
    """An axis as (size, rest); pinned where it is no such product."""
    front: list[Factor] = []
    rest, need = list(resolved(axis)), size
    while need > 1:
        if not rest:
            break
        head = rest.pop(0)
        if need % head.size == 0:
            front.append(head)
            need //= head.size
        elif parts := _split_off(head, need, reason):
            rest[:0] = parts
            rest = list(resolved(tuple(rest)))
        else:
            break
    if need == 1:
        return tuple(front), tuple(rest)
    pin([axis], reason)
    total = size_of(axis)
    return fresh(size, reason), fresh(total // size, reason)


def cut(axis: Axis, sizes: Sequence[int], reason: Reason) -> list[Axis] | None:
    """An axis as consecutive pieces of these sizes; None, with nothing changed, where parts would have to be torn."""
    sizes = list(sizes)
    if len(sizes) == 1:
        return [axis]
    found = resolved(axis)
    if not found:
        return None
    head, rest = found[0], found[1:]
    block = size_of(rest)
    if any(size % block for size in sizes):
        return None
    if rest:
        pieces = cut((head,), [size // block for size in sizes], reason)
        return None if pieces is None else [(*piece, *rest) for piece in pieces]
    if isinstance(head, Atom):
        terms = _parts_of(head, sizes)
        _become(head, (Sum(tuple(terms), reason),))
        return terms
    return _cut_sum(list(head.terms), sizes, reason)


def _cut_sum(terms: list[Axis], sizes: Sequence[int], reason: Reason) -> list[Axis] | None:
    """A sum as consecutive pieces."""
    pieces: list[Axis] = []
    for size in sizes:
        piece: list[Axis] = []
        while size:
            term = terms.pop(0)
            if size_of(term) > size:
                parts = cut(term, [size, size_of(term) - size], reason)
                if parts is None:
                    return None
                term = parts[0]
                terms.insert(0, parts[1])
            piece.append(term)
            size -= size_of(term)
        pieces.append(piece[0] if len(piece) == 1 else (Sum(tuple(piece)),))
    return pieces
