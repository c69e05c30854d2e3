"""Which flips of sign make given numbers positive: a choice that no other choice of classes changes.

Signs are a vector space over GF(2), and each entry of a tensor flips by a product of classes: by a vector. Numbers of one
vector are summed, and the largest sum is made positive. That settles one class by others, so that more vectors are one, and the
next sum is taken, as long as there are any. Where the sign of one channel follows from others, none of them is special.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_ENOUGH = 0.1
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
    ids, numbers = _listed([_summed(*part) for part in parts])
    relations = _Relations(num_free)
    while True:
        keys, signs = (torch.from_numpy(table) for table in (relations.keys, relations.signs))
        kinds, sign = keys[ids[0]], signs[ids].prod(0)
        for own in ids[1:]:
            kinds = kinds ^ keys[own]
        places = ((kinds != 0) & (numbers != 0)).nonzero()[:, 0]
        found, group = kinds[places].unique(return_inverse=True)
        first = torch.zeros(len(found), dtype=torch.int64)
        first[group] = places
        sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, group, (numbers * sign)[places])
        if not bool(sums.any()):
            return signs
        ids, sign = ids[:, first], sign[first]  # what is summed once stays one number
        numbers = sums * sign
        order = sums.abs().argsort(descending=True)[:_MOST]
        order = order[sums[order].abs() >= _ENOUGH * sums.abs().max()]
        for classes, product in zip(ids[:, order].T.tolist(), (sums.sign() * sign)[order].tolist(), strict=True):
            relations.add(classes, product)


def _summed(ids: Sequence[Tensor], values: Tensor) -> Part:
    """The same with sums along axes that no class varies along."""
    shape = values.shape or (1,)
    whole = [own.reshape((1,) * (len(shape) - own.dim()) + tuple(own.shape)) for own in ids]
    axes = [axis for axis, _ in enumerate(shape) if all(own.shape[axis] == 1 for own in whole)]
    values = values.double().reshape(shape)
    return whole, values.sum(axes, keepdim=True) if axes else values


def _listed(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """All numbers in one list, and the classes of each in a column, 0 where there are fewer."""
    most = max((len(ids) for ids, _ in parts), default=1)
    none = torch.zeros(1, dtype=torch.int64)
    columns = [
        torch.stack([own.expand(values.shape).flatten() for own in (*ids, *[none] * (most - len(ids)))])
        for ids, values in parts
    ]
    numbers = torch.cat([torch.zeros(0, dtype=torch.float64), *(values.flatten() for _, values in parts)])
    return torch.cat([none.expand(most, 0), *columns], 1), numbers


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
