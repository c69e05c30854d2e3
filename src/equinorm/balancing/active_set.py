"""The least maximum of any linear functions, max_e L_e + a_e · z, by an active set.

All entries that are as large as the maximum sink together, by the shortest move that does so, until another one is in the way
and joins them. Where no move lowers all of them, some combination Σ y_e a_e vanishes with Σ y_e = 1. If all y_e ≥ 0 it proves
the minimum, since then max_e L_e + a_e · z ≥ Σ y_e L_e for every z; else an entry with y_e < 0 need not be held and leaves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

TIES = 1e-11
"""By so much entries are raised at random, so that no two are in the way at once."""

DEPENDENT = 1e-11
"""A row this close to the span of others, beside its own square, lies in it."""

MOST = 20_000
"""Entries that join."""

FRESH = 100
"""Changes of the set after which the inverse is computed anew."""


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Linear functions L_e + Σ_k exponents[e, k] · z[ids[e, k]].

    Attributes:
        ids: places in z; 0 is fixed.
        exponents: by which these enter; 0 for the ground.
        logs: L.
    """

    ids: np.ndarray
    exponents: np.ndarray
    logs: np.ndarray

    def moved(self, shift: np.ndarray) -> np.ndarray:
        """a_e · shift."""
        return np.einsum("ek,ek->e", self.exponents, shift[self.ids])


def least(entries: Entries, z: np.ndarray) -> tuple[float, np.ndarray]:
    """A lower bound of the least maximum that the entries prove, and log-scales near z that reach it.

    The bound is −∞ where `MOST` steps do not lead there.
    """
    if not len(entries.logs):
        return -np.inf, z
    raised = entries.logs + TIES * np.random.default_rng(0).random(len(entries.logs))
    values = raised + entries.moved(z)
    active = _Active(entries, len(z))
    newcomer = int(values.argmax())
    for _ in range(MOST):
        for weights in active.join(newcomer):
            members = [*active.members, newcomer]
            if weights.min() >= -1e-9:
                weights = np.maximum(weights, 0.0)
                return float(weights @ entries.logs[members] / weights.sum()), z
            active.leave(int(weights[:-1].argmin()))
        direction = active.direction()
        top = float(values[active.members].max())
        rates = entries.moved(direction) + 1.0  # at which others come closer while the active ones sink by 1
        rates[active.members] = 0.0
        steps = np.where(rates > 1e-9, np.maximum(top - values, 0.0) / np.where(rates > 1e-9, rates, 1.0), np.inf)
        newcomer = int(steps.argmin())
        if not np.isfinite(steps[newcomer]):
            break
        z = z + steps[newcomer] * direction
        values = raised + entries.moved(z)
    return -np.inf, z


class _Active:
    """Entries whose rows are linearly independent, and the inverse of the rows' products with one another."""

    def __init__(self, entries: Entries, size: int) -> None:
        self._entries, self._row = entries, np.zeros(size)
        self._inverse, self._changes = np.zeros((0, 0)), 0
        self.members: list[int] = []

    def join(self, entry: int) -> Iterator[np.ndarray]:
        """Take in an entry; as long as it depends on the others, give the weights, of sum 1, by which all of them cancel."""
        while True:
            ids, exponents = self._entries.ids[self.members], self._entries.exponents[self.members]
            own, factors = self._entries.ids[entry], self._entries.exponents[entry]
            np.add.at(self._row, own, factors)
            products = np.einsum("ek,ek->e", exponents, self._row[ids]) if self.members else np.zeros(0)
            square = float(factors @ self._row[own])
            self._row[own] = 0.0
            combination = self._inverse @ products
            rest = square - float(products @ combination)
            if rest > DEPENDENT * square:
                self._append(entry, combination, rest)
                return
            excess = 1.0 - combination.sum()
            yield np.append(-combination, 1.0) / excess

    def leave(self, place: int) -> None:
        """Let a member go."""
        column = np.delete(self._inverse[:, place], place)
        kept = np.delete(np.delete(self._inverse, place, 0), place, 1)
        self._inverse = kept - np.outer(column, column / self._inverse[place, place])
        del self.members[place]
        self._refresh()

    def direction(self) -> np.ndarray:
        """The shortest move that lowers every member by 1."""
        weights = self._inverse.sum(1)
        move = np.zeros_like(self._row)
        ids, exponents = self._entries.ids[self.members], self._entries.exponents[self.members]
        np.add.at(move, ids, -exponents * weights[:, None])
        move[0] = 0.0
        return move

    def _append(self, entry: int, combination: np.ndarray, rest: float) -> None:
        size = len(self.members)
        inverse = np.empty((size + 1, size + 1))
        inverse[:size, :size] = self._inverse + np.outer(combination, combination / rest)
        inverse[:size, size] = inverse[size, :size] = -combination / rest
        inverse[size, size] = 1.0 / rest
        self._inverse = inverse
        self.members.append(entry)
        self._refresh()

    def _refresh(self) -> None:
        """Compute the inverse anew from time to time."""
        self._changes += 1
        if self._changes % FRESH or not self.members:
            return
        ids, exponents = self._entries.ids[self.members], self._entries.exponents[self.members]
        used, places = np.unique(ids, return_inverse=True)
        rows = np.zeros((len(self.members), len(used)))
        np.add.at(rows, (np.arange(len(self.members))[:, None], places.reshape(ids.shape)), exponents)
        self._inverse = np.linalg.inv(rows @ rows.T)
