"""Labels: how every entry of a value scales, as integer tensors of the value's own shape.

A label is a product of factors. Each factor is an exponent and an int64 tensor of class ids that broadcasts to the shape of
the value; entry i of the value scales by exp(Σ_f exponent_f · z[ids_f[i]]). Axes along which a factor does not vary are
kept at size 1, so that labels stay small whatever the batch. A label without factors is pinned everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from equinorm.discovery.classes import PINNED, ZERO


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """`ids` to the power `exponent`; ids has size 1 along every axis on which it does not vary."""

    exponent: Fraction
    ids: Tensor

    def varies(self, axes: Sequence[int]) -> bool:
        """Do its ids differ along any of these axes?"""
        return any(self.ids.size(axis) > 1 for axis in axes)

    @property
    def has_zero(self) -> bool:
        """Is an entry the constant zero?"""
        return bool((self.ids == ZERO).any())


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """The scaling of a value of this shape; see the module's docstring.

    An example: a layer of 2 channels, ReLU, a layer of 4, on 5 inputs of size 3. Ids 0 and 1 are reserved for the constant zero
    and for pinned entries, so that the channels get the ids 2 and 3. The input must not scale: its label has no factors.

    >>> from equinorm.discovery.rules import Label, Trace, contract
    >>> from equinorm.discovery.values import Source
    >>> up, down = (Source((name,), shape, "parameter", torch.float32) for name, shape in (("up", (2, 3)), ("down", (4, 2))))
    >>> trace = Trace()
    >>> hidden = contract(trace, "bi,oi->bo", Label((5, 3)), up)  # x·Wᵀ; ReLU hands labels through
    >>> up.label.factors[0].ids.tolist()  # row i scales by exp(z[2 + i]); size 1 along the inputs, which do not matter
    [[2], [3]]
    >>> hidden.factors[0].ids.tolist()  # so do the columns of the result, whatever the row
    [[2, 3]]

    What the second layer reads has scaled, so that its weight takes the inverse along its columns. Its rows are new classes; at
    the end of a network the output pins them.

    >>> output = contract(trace, "bi,oi->bo", hidden, down)
    >>> [(int(factor.exponent), factor.ids.tolist()) for factor in down.label.factors]
    [(1, [[4], [5], [6], [7]]), (-1, [[2, 3]])]
    >>> [(int(factor.exponent), factor.ids.tolist()) for factor in output.factors]
    [(1, [[4, 5, 6, 7]])]
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()

    @staticmethod
    def of(shape: Sequence[int], ids: Tensor, exponent: Fraction = Fraction(1)) -> "Label":
        """A label of one factor; `ids` must broadcast to `shape`."""
        ids = compact(ids.reshape((1,) * (len(shape) - ids.dim()) + tuple(ids.shape)))
        if ids.numel() == 1 and ids.item() == PINNED:
            return Label(tuple(shape))
        return Label(tuple(shape), (Factor(exponent, ids),))

    @property
    def is_zero(self) -> bool:
        """Is the value the constant zero everywhere?"""
        return any(bool((factor.ids == ZERO).all()) for factor in self.factors)

    def zeros(self) -> Tensor | None:
        """Where the value is the constant zero, at sizes that broadcast to its shape; None if nowhere."""
        masks = [factor.ids == ZERO for factor in self.factors if factor.has_zero]
        if not masks:
            return None
        sizes = torch.broadcast_shapes(*(mask.shape for mask in masks))
        return torch.stack([mask.expand(sizes) for mask in masks]).any(0)

    def definite(self) -> "Label":
        """The label of a value that has numbers of its own where this one is the constant zero: pinned there."""
        factors = (Factor(f.exponent, torch.where(f.ids == ZERO, PINNED, f.ids)) if f.has_zero else f for f in self.factors)
        return Label(self.shape, tuple(factors))

    def times(self, other: "Label") -> "Label":
        """Entrywise product of two values, broadcast against each other."""
        shape = torch.broadcast_shapes(self.shape, other.shape)
        return Label(tuple(shape), self.expand(shape).factors + other.expand(shape).factors)

    def power(self, exponent: Fraction | int) -> "Label":
        """Entrywise positively homogeneous function of this degree."""
        if exponent == 0:
            return Label(self.shape)
        return Label(self.shape, tuple(Factor(f.exponent * exponent, f.ids) for f in self.factors))

    def expand(self, shape: Sequence[int]) -> "Label":
        """Broadcast to `shape`: sizes change, ids do not."""
        lead = (1,) * (len(shape) - len(self.shape))
        return Label(tuple(shape), tuple(Factor(f.exponent, f.ids.reshape(lead + tuple(f.ids.shape))) for f in self.factors))

    def reshape(self, shape: Sequence[int]) -> "Label":
        """The label of the value's entries in the same order, in another shape. Only axes that vary are written out."""
        runs = axis_runs(self.shape, shape)
        factors = []
        for exponent, ids in ((factor.exponent, factor.ids) for factor in self.factors):
            before, after = [], []
            for old, new in runs:
                varies = any(ids.size(axis) > 1 for axis in old)
                before += [self.shape[axis] if varies else 1 for axis in old]
                after += [shape[axis] if varies else 1 for axis in new]
            factors.append(Factor(exponent, compact(ids.expand(before).reshape(after))))
        return Label(tuple(shape), tuple(factors))

    def ids(self) -> list[Tensor]:
        """Ids of every factor at the value's full shape; axes that do not vary have stride 0."""
        return [factor.ids.expand(self.shape) for factor in self.factors]


def axis_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Runs of axes that hold the same entries in both shapes, as short as can be."""
    if 0 in old:
        return [(range(len(old)), range(len(new)))]
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, second, left, right = i, j, 1, 1
        while True:
            if left <= right and i < len(old):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
            if left == right:
                break
        groups.append((range(first, i), range(second, j)))
    return groups


def numbered(count: int, axis: int, rank: int) -> Tensor:
    """0, 1, …, count − 1 along one axis of `rank`."""
    return torch.arange(count).reshape([-1 if other == axis else 1 for other in range(rank)])


def compact(ids: Tensor) -> Tensor:
    """Narrow every axis along which `ids` is constant to size 1, and leave the memory of what repeats."""
    if ids.numel() == 0:
        return torch.full((1,) * ids.dim(), PINNED)
    for axis in range(ids.dim()):  # axes of stride 0 first: they cost nothing and shrink the comparisons
        if ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, 1)
    for axis in range(ids.dim()):
        if ids.size(axis) > 1:
            first = ids.narrow(axis, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids.clone() if ids.untyped_storage().nbytes() > 4 * ids.numel() * ids.element_size() else ids


def move(operation: Callable[..., Any], labels: Sequence[Label]) -> Label | list[Label]:
    """Apply a data movement to labels by applying it to their ids: no rule needed.

    Args:
        operation: takes one id tensor for each label, at the label's full shape, and returns one tensor or several. Entries
            that it fills with 0 become the constant zero, those filled with 1 become pinned.
        labels: the labels of its tensor arguments.
    """
    slots: list[tuple[Fraction, list[Tensor]]] = []
    for position, label in enumerate(labels):
        used: set[int] = set()
        for factor, ids in zip(label.factors, label.ids(), strict=True):
            slot = next((i for i, (e, _) in enumerate(slots) if e == factor.exponent and i not in used), None)
            if slot is None:
                slot = len(slots)
                slots.append((factor.exponent, [torch.tensor(PINNED).expand(other.shape) for other in labels]))
            used.add(slot)
            slots[slot][1][position] = ids
    if not slots:  # the movement may still bring in zeros
        slots = [(Fraction(1), [torch.tensor(PINNED).expand(label.shape) for label in labels])]
    moved = [(exponent, _on_any_dtype(operation, ids)) for exponent, ids in slots]
    if isinstance(moved[0][1], Tensor):
        return _join([(exponent, ids) for exponent, ids in moved if isinstance(ids, Tensor)])
    return [_join([(exponent, ids[i]) for exponent, ids in moved]) for i in range(len(moved[0][1]))]


def move_one(operation: Callable[[Tensor], Tensor], label: Label) -> Label:
    """Apply a data movement of one tensor to its label."""
    return _join(
        [(f.exponent, operation(ids)) for f, ids in zip(label.factors, label.ids(), strict=True)]
        or [(Fraction(1), operation(torch.tensor(PINNED).expand(label.shape)))]
    )


def _on_any_dtype(operation: Callable[..., Any], ids: Sequence[Tensor]) -> Any:
    try:
        return operation(*ids)
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented for" not in str(error):
            raise
    moved = operation(*(part.double() for part in ids))  # some movements exist for floats only; ids are exact in float64
    return moved.long() if isinstance(moved, Tensor) else [part.long() for part in moved]


def _join(factors: Sequence[tuple[Fraction, Tensor]]) -> Label:
    shape = tuple(factors[0][1].shape)
    kept = []
    for exponent, ids in factors:
        ids = compact(ids)
        if ids.numel() > 1 or ids.item() != PINNED:
            kept.append(Factor(exponent, ids))
    return Label(shape, tuple(kept))
