"""Scale classes: the linear algebra of log-scales.

A class is a variable z_c, the natural logarithm of a positive scale. Every law that a network imposes on scales is a
linear equation over the rationals,

    Σ_k e_k · z[c_k] = 0,

because scales multiply. `Classes` keeps the solution space of all equations seen so far. Almost all of them say that two
classes are equal, that one is the inverse of another, or that one is zero; these go through an array union-find with signs,
thousands at a time. Whatever is left (monomials) is eliminated one row at a time with exact fractions. A contradiction such
as z = 2z needs no special case: its solution is z = 0, a pinned class.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from equinorm._scaling import Reason
from equinorm.discovery.rows import distinct_rows, unique_rows
from equinorm.discovery.shorter_forms import shorter

ZERO = 0
"""Reserved id of the constants 0 and ±inf, which fit any scale. It is 0 so that zero-filling operations fill with it."""

PINNED = 1
"""Reserved id of the log-scale that is always 0."""

_DEPENDENT = -1
"""State of a root that a form expresses in other roots."""

_AT_ONCE = 1 << 20
"""Classes that are looked at together."""

Term = tuple[Fraction, np.ndarray]

Rational = int | Fraction
"""Exact numbers; whole ones as int, which is many times faster."""


_CANCELS = Reason("a product", "scales that cancel")


class Classes:
    """The solution space of all equations between classes imposed so far."""

    def __init__(self) -> None:
        self.size = 2  # how many ids there are, reserved ones included
        self._parent = np.arange(1024, dtype=np.int32)  # z[c] = z[parent[c]]; a negative parent stands for its inverse
        self._state = np.zeros(1024, np.int16)  # of a root: 0 free, place of the reason that pins it, _DEPENDENT
        self._starts: list[int] = []  # first id of each family
        self._forms: dict[int, dict[int, Rational]] = {}
        self._changes = 0
        self._current: dict[int, int] = {}  # after how many changes a form was last expressed in free roots
        self._reasons: list[Reason | None] = [None]

    def fresh(self, count: int) -> np.ndarray:
        """`count` new unconstrained classes, one family."""
        start, self.size = self.size, self.size + count
        if self.size > len(self._parent):
            self._grow(self.size + self.size // 4)
        self._starts.append(start)
        return np.arange(start, self.size)

    def _grow(self, length: int) -> None:
        """Make room, in the memory that there is where the system can enlarge it."""
        old = len(self._parent)
        for array in (self._parent, self._state):
            array.resize(length, refcheck=False)
        self._parent[old:] = np.arange(old, length, dtype=np.int32)

    def resolve(self, ids: np.ndarray) -> np.ndarray:
        """The representative of every id: its root, negative if the class is the root's inverse; PINNED; or ZERO."""
        above = self._find(ids)
        root = np.abs(above)
        return np.where(self._state[root] > 0, PINNED, np.where(root > PINNED, above, root)).astype(np.int64)

    def equate(self, terms: Sequence[Term], reason: Reason) -> None:
        """Impose Σ_k e_k·z[ids_k] = 0 on every row; rows that meet the constant zero say nothing and are dropped.

        Rows are settled in three ways. One class by itself is pinned, and two of one exponent are united, thousands at a time.
        A row with a class that no other row has is solved for it. The others are eliminated one by one.
        """
        exponents = [_simple(abs(exponent)) for exponent, _ in terms]
        rows = self._open_rows(exponents, terms)
        rows = rows[~self._unite(exponents, rows, reason)]
        rows = rows[~self._solve(exponents, rows)]
        for row in rows.tolist():
            self._eliminate(zip(exponents, row, strict=True), reason)

    def _open_rows(self, exponents: Sequence[Rational], terms: Sequence[Term]) -> np.ndarray:
        """Distinct rows of representatives that say something new; negative where a class enters inversely."""
        distinct = distinct_rows([ids for _, ids in terms])
        columns = [self.resolve(ids) * (1 if e > 0 else -1) for (e, _), ids in zip(terms, distinct, strict=True)]
        is_sound = np.logical_and.reduce([column != ZERO for column in columns])
        for i, j in _alike(exponents):
            cancel = self._cancel(columns[i], columns[j])
            columns[i], columns[j] = np.where(cancel, PINNED, columns[i]), np.where(cancel, PINNED, columns[j])
        is_open = is_sound & np.logical_or.reduce([np.abs(column) > PINNED for column in columns])  # most laws hold already
        return unique_rows(np.stack([column[is_open] for column in columns], axis=1))

    def _unite(self, exponents: Sequence[Rational], rows: np.ndarray, reason: Reason) -> np.ndarray:
        """Pin the class of rows with one, unite the two of rows with two of one exponent; says which rows are settled."""
        live = np.abs(rows) > PINNED
        count = live.sum(axis=1)
        independent = self._are_independent(rows)
        settled = count == 0
        for i, j in _alike(exponents):
            pair = independent & (count == 2) & live[:, i] & live[:, j]
            if pair.any():
                self._union(rows[pair, i], -rows[pair, j], reason)
            settled |= pair
        alone = independent & (count == 1)
        if alone.any():  # after the unions: a pin belongs to the root that they leave
            self._pin(np.abs(rows[alone][live[alone]]), reason)
        return settled | alone

    def _solve(self, exponents: Sequence[Rational], rows: np.ndarray) -> np.ndarray:
        """Solve rows of independent classes, each for a class that is in no other of them; says which have one."""
        ids = np.abs(rows)
        simple = self._are_independent(rows) & (self.resolve(ids) == ids).all(axis=1)
        if not simple.any():
            return simple
        uses = np.bincount(ids[simple].ravel())
        alone = simple[:, None] & (ids > PINNED)
        alone[alone] = uses[ids[alone]] == 1
        pivots = np.where(alone, ids, 0).max(axis=1)
        solved = pivots > 0
        for pivot, row in zip(pivots[solved].tolist(), rows[solved].tolist(), strict=True):
            form: dict[int, Rational] = {}
            for exponent, id in zip(exponents, row, strict=True):
                if abs(id) > PINNED:
                    self._accumulate(form, exponent if id > 0 else -exponent, {abs(id): 1})
            self._forms[pivot] = self._rest(form, pivot)
        self._state[pivots[solved]] = _DEPENDENT
        self._changes += 1
        return solved

    def _are_independent(self, rows: np.ndarray) -> np.ndarray:
        """In which rows is no class expressed in others?"""
        return np.logical_not(np.any(self.is_dependent(rows), axis=1))

    def form(self, id: int) -> dict[int, Rational]:
        """z[id] as a linear form in free roots; empty for pinned classes and the constant zero."""
        above = self._find_one(id)
        root, sign = abs(above), 1 if above > 0 else -1
        if root <= PINNED or self._state[root] > 0:
            return {}
        if root not in self._forms:
            return {root: sign}
        total = self._forms[root]
        if self._current.get(root) != self._changes:
            total = {}
            for other, coefficient in self._forms[root].items():
                self._accumulate(total, coefficient, self.form(other))
            self._current[root] = self._changes
        if not total:  # pinned: whatever pins a part of it, or its parts cancel
            places = [int(self._state[abs(self._find_one(other))]) for other in self._forms[root]]
            place = next((place for place in places if place > 0), 0) or self._place(_CANCELS)
            self._state[root] = place
        self._forms[root] = total
        return total if sign > 0 else {other: -coefficient for other, coefficient in total.items()}

    def simplify(self) -> None:
        """Take other free classes where forms get shorter by that: t = u/v for u where most forms with u hold v⁻¹ too.

        A layer that is applied several times is scaled by s_j·t/s_i; with the scale u of its first row as a free class
        that reads s_j·u/(s_1·s_i).
        """
        while swaps := shorter([self.form(id) for id in [*self._forms]]):
            for old, (other, power) in swaps.items():
                (new,) = self.fresh(1).tolist()
                self._forms[old] = {new: 1, other: power}
                self._state[old] = _DEPENDENT
            self._changes += 1

    def reasons(self, ids: np.ndarray) -> dict[Reason, int]:
        """How many of these classes each reason pins; free ones are not counted."""
        roots = np.abs(self._find(ids))
        for root in roots[self.is_dependent(roots)].tolist():
            self.form(root)
        counts = np.bincount(self._state[roots].clip(min=0), minlength=1)
        found = [(self._reasons[place], int(counts[place])) for place in np.flatnonzero(counts)]
        total: dict[Reason, int] = {}
        for reason, count in found:
            if reason is not None:
                total[reason] = total.get(reason, 0) + count
        return total

    def is_dependent(self, roots: np.ndarray) -> np.ndarray:
        """Which of these representatives are expressed in others."""
        return self._state[np.abs(roots)] == _DEPENDENT

    def free_roots(self, among: np.ndarray) -> np.ndarray:
        """Ids of the independent unpinned classes, ascending, of those in a mask: a basis of what they span."""
        is_free = among.copy()
        is_free[:2] = False
        for start in range(0, self.size, _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, self.size))
            is_free[part] &= self._parent[part] == np.arange(part.start, part.stop)
            is_free[part] &= self._state[part] == 0
        return np.flatnonzero(is_free)

    def family(self, ids: np.ndarray) -> np.ndarray:
        """Number of the `fresh` call that made each class: channels of one axis share it."""
        return np.searchsorted(self._starts, ids, side="right") - 1

    def members(self, family: int) -> range:
        """The classes that one `fresh` call made."""
        return range(*[*self._starts, self.size][family : family + 2])

    def _find(self, ids: np.ndarray) -> np.ndarray:
        """The root of each class, negative if the class is its inverse."""
        found = self._parent[ids]
        while True:
            above = self._parent[np.abs(found)]
            above = np.where(found < 0, -above, above)
            if np.array_equal(above, found):
                break
            found = above
        self._parent[ids] = found
        return found

    def _find_one(self, id: int) -> int:
        found = int(self._parent[id])
        while (above := int(self._parent[abs(found)])) != abs(found):
            found = above if found > 0 else -above
        return found

    def _pin(self, ids: np.ndarray, reason: Reason) -> None:
        place = self._place(reason)
        self._state[np.abs(self._find(ids))] = place
        self._changes += 1

    def _place(self, reason: Reason) -> int:
        if self._reasons[-1] != reason:
            self._reasons.append(reason)
            if len(self._reasons) > np.iinfo(self._state.dtype).max:
                self._state = self._state.astype(np.int32)
        return len(self._reasons) - 1

    def _union(self, left: np.ndarray, right: np.ndarray, reason: Reason) -> None:
        """Make classes equal; a negative id stands for the inverse."""
        self._changes += 1
        relation = np.sign(left) * np.sign(right)
        left, right = np.abs(left), np.abs(right)
        while len(left):
            left, right = self._find(left), self._find(right)
            relation = relation * np.sign(left) * np.sign(right)  # z[left] = relation · z[right] for the roots
            left, right = np.abs(left), np.abs(right)
            against = (left == right) & (relation < 0)
            if against.any():  # z = −z
                self._pin(left[against], reason)
            apart = left != right
            left, right, relation = left[apart], right[apart], relation[apart]
            low, high = np.minimum(left, right), np.maximum(left, right)
            high, first = np.unique(high, return_index=True)  # one row hooks each root, the others come again
            low = low[first]
            pinned = self._state[high] > 0
            self._state[low[pinned]] = self._state[high[pinned]]
            self._parent[high] = low * relation[first]

    def _eliminate(self, row: Iterable[tuple[Rational, int]], reason: Reason) -> None:
        form: dict[int, Rational] = {}
        for exponent, id in row:
            self._accumulate(form, exponent if id > 0 else -exponent, self.form(abs(id)))
        if not form:
            return
        pivot = max(form)
        rest = self._rest(form, pivot)
        if not rest:
            self._pin(np.array([pivot]), reason)
        elif len(rest) == 1 and abs(next(iter(rest.values()))) == 1:
            other, ratio = next(iter(rest.items()))
            self._union(np.array([pivot]), np.array([other * int(ratio)]), reason)
        else:
            self._forms[pivot] = rest
            self._state[pivot] = _DEPENDENT
            self._changes += 1

    def _accumulate(self, total: dict[int, Rational], factor: Rational, form: dict[int, Rational]) -> None:
        """total ← total + factor · form."""
        for id, coefficient in form.items():
            value = self._reduced(total.get(id, 0) + factor * coefficient)
            if value:
                total[id] = value
            else:
                total.pop(id, None)

    def _rest(self, form: dict[int, Rational], pivot: int) -> dict[int, Rational]:
        """What the pivot is, if the form is zero: the form in the others."""
        coefficient = form.pop(pivot)
        if abs(coefficient) == 1:
            return {other: self._reduced(-c * coefficient) for other, c in form.items()}
        return {other: _simple(Fraction(-c) / coefficient) for other, c in form.items()}

    def _reduced(self, coefficient: Rational) -> Rational:
        """The number that stands for a coefficient and all that count alike."""
        return coefficient

    def _cancel(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Which of these representatives add up to zero?"""
        return left == -right


def _simple(value: Rational) -> Rational:
    return value.numerator if value.denominator == 1 else value


def _alike(exponents: Sequence[Rational]) -> list[tuple[int, int]]:
    """Pairs of places with equal exponents."""
    return [(i, j) for j in range(len(exponents)) for i in range(j) if exponents[i] == exponents[j]]
