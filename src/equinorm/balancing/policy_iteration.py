"""The least maximum of differences, max_e L_e + c_e · (u_head − u_tail), by Howard's policy iteration.

Its value is the largest ratio Σ L_e / c_e : Σ 1 / c_e along a cycle: no choice of u gets below it, and some reaches it. A
policy is one edge out of every node; its cycles are lower bounds, and the values that they give show where another edge raises
them. Everything is a few operations on whole vectors; cycles are found by doubling paths.

Sources: Howard, 1960; Cochet-Terrasson, Cohen, Gaubert, McGettrick, Quadrat, 1998; Dasdan, 2004.
"""

from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-13
"""Improvements that are smaller, beside the values that they change, are taken to be rounding."""

MOST = 10_000
"""Policies that are tried; some ten are enough."""


@dataclass(frozen=True, slots=True, eq=False)
class Differences:
    """Edges between nodes 0, 1, …; each node has one that leaves it.

    Attributes:
        tails: node whose value is subtracted, ascending.
        heads: node whose value is added.
        lengths: L / c.
        times: 1 / c, positive.
    """

    tails: np.ndarray
    heads: np.ndarray
    lengths: np.ndarray
    times: np.ndarray

    @property
    def turned(self) -> "Differences":
        """The same with all edges turned around."""
        order = np.argsort(self.heads, kind="stable")
        return Differences(self.heads[order], self.tails[order], self.lengths[order], self.times[order])

    def best(self, values: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
        """max over the edges that leave each node of u_head + L / c − ratio / c, and this for every edge."""
        reached = values[self.heads] + (self.lengths - ratio * self.times)
        starts = np.flatnonzero(np.diff(self.tails, prepend=-1))
        return np.maximum.reduceat(reached, starts), reached


def largest_ratio(edges: Differences, values: np.ndarray, start: float) -> float:
    """The largest ratio of a cycle; `values` and `start` are where to begin, close to a solution if possible."""
    values, ratio = values.copy(), -np.inf
    best, reached = edges.best(values, start)
    policy = _chosen(edges, best, reached)
    for _ in range(MOST):
        before = ratio
        ratio, values = _evaluated(edges, policy, values)
        best, reached = edges.best(values, ratio)
        better = best > values + ROUNDING * max(1.0, np.abs(values).max())
        if not better.any() or ratio < before:  # a policy that lowers it is one of rounding
            return max(ratio, before)
        policy = np.where(better, _chosen(edges, best, reached), policy)
        values = np.where(better, best, values)
    return ratio


def lifted(edges: Differences, values: np.ndarray, ratio: float) -> np.ndarray:
    """The least values above these with u_tail ≥ u_head + L / c − ratio / c along all edges."""
    found, stays = values, np.arange(len(values))
    policy, rests = np.zeros(len(values), np.int64), np.ones(len(values), bool)
    for _ in range(MOST):
        best, reached = edges.best(found, ratio)
        better = best > found + ROUNDING * max(1.0, np.abs(found).max())
        if not better.any():
            break
        policy = np.where(better, _chosen(edges, best, reached), policy)
        rests &= ~better
        steps = np.where(rests, 0.0, edges.lengths[policy] - ratio * edges.times[policy])
        ends, sums = _followed(np.where(rests, stays, edges.heads[policy]), steps)
        found = np.maximum(np.where(rests[ends], values[ends] + sums, best), found)  # cycles of no length lead nowhere
    return found


def _chosen(edges: Differences, best: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """The edge that each node takes."""
    hits = np.flatnonzero(reached == best[edges.tails])[::-1]
    policy = np.empty(len(best), np.int64)
    policy[edges.tails[hits]] = hits
    return policy


def _evaluated(edges: Differences, policy: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest ratio of a policy's cycles, and the values of all nodes from which it leads there."""
    after, lengths, times = edges.heads[policy], edges.lengths[policy], edges.times[policy]
    ahead, lowest = after, np.arange(len(after))
    for _ in range(_doublings(len(after))):
        lowest = np.minimum(lowest, lowest[ahead])
        ahead = ahead[ahead]
    on_cycle = np.unique(ahead)
    names = lowest[on_cycle]
    length, time = (np.bincount(names, amounts[on_cycle], len(after)) for amounts in (lengths, times))
    ratios = np.where(time > 0, length / np.where(time > 0, time, 1.0), -np.inf)
    root = int(ratios.argmax())
    ratio, ahead = float(ratios[root]), after.copy()
    steps = lengths - ratio * times
    ahead[root], steps[root] = root, 0.0
    ends, sums = _followed(ahead, steps)
    return ratio, np.where(ends == root, values[root] + sums, values)


def _followed(ahead: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the way from each node ends, and the sum of its steps; a node that is ahead of itself ends it."""
    for _ in range(_doublings(len(ahead))):
        sums = sums + sums[ahead]
        ahead = ahead[ahead]
    return ahead, sums


def _doublings(count: int) -> int:
    """After which a way has led through all nodes."""
    return max(1, count.bit_length())
