"""Which flips of sign make given numbers positive: a choice that no other choice of classes changes.

Signs are a vector space over GF(2), and each entry of a tensor flips by a product of classes: by a vector. Numbers of one
vector are summed, and the largest sum is made positive. That settles one class by others, so that more vectors are one, and the
next sum is taken, as long as there are any. Where the sign of one channel follows from others, none of them is special.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_ENOUGH = 0.5
"""Sums are made positive together that are this part of the largest."""

_MOST = 4096
"""And at most so many."""

Part = tuple[Sequence[Tensor], Tensor]
"""Ids of the classes that flip numbers, which broadcast to them (0: none), and these numbers."""


def positive_signs(parts: Iterable[Part], num_free: int) -> Tensor:
    """Signs that make sums of numbers positive, the largest first.

    Args:
        parts: numbers, of one tensor after the other.
        num_free: how many classes there are.

    Returns:
        A 1, then −1 or 1 for each class; float64. Classes of which no number says anything are 1.
    """
    summed = [_summed(*part) for part in parts]
    number = torch.cat([torch.zeros(0, dtype=torch.float64), *(values.flatten() for _, values in summed)])
    relations = _Relations(num_free)
    while True:
        keys, signs = (torch.from_numpy(table) for table in (relations.keys, relations.signs))
        kinds = _of_entries(summed, keys, torch.bitwise_xor)
        sign = _of_entries(summed, signs, torch.mul)
        places = ((kinds != 0) & (number != 0)).nonzero()[:, 0]
        found, group = kinds[places].unique(return_inverse=True)
        sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, group, (number * sign)[places])
        if not bool(sums.any()):
            return signs
        first = torch.zeros(len(found), dtype=torch.int64)
        first[group] = places
        order = sums.abs().argsort(descending=True)[:_MOST]
        order = order[sums[order].abs() >= _ENOUGH * sums.abs().max()]
        wanted = sums[order].sign() * sign[first[order]]
        for classes, product in zip(_classes(summed, first[order]), wanted.tolist(), strict=True):
            relations.add(classes, product)


def _summed(ids: Sequence[Tensor], values: Tensor) -> Part:
    """The same with sums along axes that no class varies along."""
    shape = values.shape or (1,)
    whole = [own.reshape((1,) * (len(shape) - own.dim()) + tuple(own.shape)) for own in ids]
    axes = [axis for axis, _ in enumerate(shape) if all(own.shape[axis] == 1 for own in whole)]
    values = values.double().reshape(shape)
    return whole, values.sum(axes, keepdim=True) if axes else values


def _of_entries(parts: Sequence[Part], table: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """For every number what its classes have in a table, joined."""
    found = [table[:0]]
    for ids, values in parts:
        total = table[ids[0]]
        for own in ids[1:]:
            total = join(total, table[own])
        found.append(total.expand(values.shape).flatten())
    return torch.cat(found)


def _classes(parts: Sequence[Part], places: Tensor) -> list[list[int]]:
    """The classes of some of all numbers."""
    found = torch.zeros(len(places), max(len(ids) for ids, _ in parts), dtype=torch.int64)
    start = 0
    for ids, values in parts:
        mine = ((places >= start) & (places < start + values.numel())).nonzero()[:, 0]
        at = torch.unravel_index(places[mine] - start, values.shape)
        for column, own in enumerate(ids):
            found[mine, column] = own.expand(values.shape)[at]
        start += values.numel()
    return found.tolist()


class _Relations:
    """What is settled: each class is ±1, times a product of open classes.

    Attributes:
        keys: for each class a number of this product: the exclusive or of random ones; 0 for the empty product.
        signs: for each class the ±1.
    """

    def __init__(self, num_free: int) -> None:
        self.keys = np.random.default_rng(0).integers(1, 1 << 62, num_free + 1)
        self.keys[0] = 0
        self.signs = np.ones(num_free + 1)
        self._products: dict[int, set[int]] = {0: set()}  # of classes that are not open
        self._holders: dict[int, set[int]] = {}  # for each open class those whose products hold it

    def add(self, classes: Sequence[int], product: float) -> None:
        """Settle that the product of some classes is 1 or −1, if it is open."""
        vector: set[int] = set()
        for own in classes:
            product *= self.signs[own]
            vector = vector ^ self._products.get(own, {own})
        if not vector:
            return
        pivot, key = max(vector), np.bitwise_xor.reduce(self.keys[[*vector]])
        for holder in (pivot, *self._holders.pop(pivot, ())):
            self._products[holder] = self._products.get(holder, {holder}) ^ vector
            self.signs[holder] *= product
            self.keys[holder] ^= key
            for own in vector - {pivot}:
                self._holders.setdefault(own, set()).symmetric_difference_update({holder})
