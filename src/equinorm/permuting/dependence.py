"""On which places an order of channels may depend: whole heads may be permuted, and the channels of each head by themselves.

An order may be another one at each place of a second axis only if every value in which its channels stand has that axis too,
once.
"""

from collections.abc import Iterable, Iterator, Sequence

from equinorm.permuting.atoms import Atom, Axis, Sum, resolved


class Dependence:
    """For every atom, those at each place of which its order may be another one.

    Args:
        spaces: the axes of every value of the network.
    """

    def __init__(self, spaces: Iterable[Sequence[Axis]]) -> None:
        self._around: dict[Atom, set[Atom]] = {}
        self._found: dict[Atom, tuple[Atom, ...]] = {}
        seen: set[tuple] = set()
        for space in spaces:
            axes = [resolved(axis) for axis in space]
            key = tuple(axes)
            if key in seen:
                continue
            seen.add(key)
            for atom, companions in _standing(axes):
                once = {other for other in companions if other is not atom and companions.count(other) == 1}
                self._around[atom] = self._around[atom] & once if atom in self._around else once

    def around(self, atom: Atom) -> set[Atom]:
        """The atoms that stand once in every value in which this one does."""
        return self._around.get(atom, set())

    def of(self, atom: Atom) -> tuple[Atom, ...]:
        """The atoms whose places an order of this one may depend on: pinned ones, and those that came before it.

        With each stand those that its own order depends on, so that one permutation after another is a permutation again.
        """
        if atom not in self._found:
            around = self.around(atom)
            earlier = sorted((o for o in around if o.pinned is not None or o.order < atom.order), key=lambda other: other.order)
            self._found[atom] = tuple(o for o in earlier if o.pinned is not None or {*self.of(o)} <= {*earlier})
        return self._found[atom]


def _standing(axes: Sequence[Axis]) -> Iterator[tuple[Atom, list[Atom]]]:
    """Every atom of a value, with those that have a place wherever it has one."""
    tops = [[factor for factor in axis if isinstance(factor, Atom)] for axis in axes]
    for place, axis in enumerate(axes):
        others = [atom for at, top in enumerate(tops) if at != place for atom in top]
        yield from _along(axis, others)


def _along(axis: Axis, others: list[Atom]) -> Iterator[tuple[Atom, list[Atom]]]:
    own = [factor for factor in axis if isinstance(factor, Atom)]
    for position, factor in enumerate(axis):
        if isinstance(factor, Sum):
            for term in factor.terms:
                yield from _along(term, [*others, *own])
        else:
            at = [other for where, other in enumerate(axis) if where != position and isinstance(other, Atom)]
            yield factor, [*others, *at]
