"""Which entries of a table a value shows, as labels; which are read, as boxes: all entries at some places along each axis."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from equinorm.discovery.classes import PINNED, ZERO
from equinorm.discovery.graph.nodes import CONSTANT_LIMIT
from equinorm.discovery.labels import Factor, Label, compact, numbered

Box = list[Tensor]
"""Along every axis of a table, at which places."""

_FIRST = PINNED + 1
"""Id of the first place along an axis; reserved ids stand for entries that are none of the table's."""


def entries(shape: Sequence[int]) -> Label:
    """All entries of a table: places along every axis on which there are several, to a power that tells the axis."""
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    places = {axis: numbered(shape[axis], axis, len(shape)) + _FIRST for axis in axes}
    return Label(tuple(shape), tuple(Factor(Fraction(axis + 1), ids) for axis, ids in places.items()))


def only(label: Label, mask: Tensor) -> Label:
    """The entries that a value shows where a mask, broadcast to it, holds."""
    mask = mask.reshape((1,) * (len(label.shape) - mask.dim()) + tuple(mask.shape))
    return Label(label.shape, tuple(Factor(f.exponent, compact(torch.where(mask, f.ids, ZERO))) for f in label.factors))


def shows_any(label: Label) -> bool:
    """Does a value show entries of the table?"""
    return any(bool((factor.ids >= _FIRST).any()) for factor in label.factors)


def are_same(one: Label, other: Label) -> bool:
    """Do two values show the same entries?"""
    if one.shape != other.shape or len(one.factors) != len(other.factors):
        return False
    pairs = zip(one.factors, other.factors, strict=True)
    return all(left.exponent == right.exponent and torch.equal(left.ids, right.ids) for left, right in pairs)


def box(shape: Sequence[int], label: Label) -> Box | None:
    """The entries of a table of this shape that a value shows; None if they are no box, or too many to tell."""
    places = {int(factor.exponent) - 1: factor.ids for factor in label.factors}
    if all(sum(ids.size(axis) > 1 for ids in places.values()) < 2 for axis in range(len(label.shape))):
        masks = [torch.full((size,), size == 1) for size in shape]
        for axis, ids in places.items():
            masks[axis][ids[ids >= _FIRST] - _FIRST] = True
        return masks
    sizes = torch.broadcast_shapes(*(ids.shape for ids in places.values()))
    if max(math.prod(sizes), math.prod(shape)) > CONSTANT_LIMIT:
        return None
    numbers, is_there = torch.zeros(sizes, dtype=torch.long), torch.ones(sizes, dtype=torch.bool)
    for axis in sorted(places):
        numbers, is_there = numbers * shape[axis] + places[axis] - _FIRST, is_there & (places[axis] >= _FIRST)
    shown = torch.zeros(math.prod(shape), dtype=torch.bool)
    shown[numbers[is_there]] = True
    shown = shown.reshape(tuple(shape))
    masks = [shown.movedim(axis, 0).reshape(size, -1).any(1) for axis, size in enumerate(shape)]
    return masks if int(shown.sum()) == _count(masks) else None


def unread(shape: Sequence[int], boxes: Sequence[Box]) -> list[Tensor]:
    """Along each axis, at which places nothing is read; at all places if what is read is no box."""
    seen = [torch.stack(masks).any(0) for masks in zip(*boxes, strict=True)]
    if not boxes or not _cover(boxes, seen):
        return [torch.full((size,), size > 1) for size in shape]
    return [~mask for mask in seen]


def _count(masks: Box) -> int:
    return math.prod(int(mask.sum()) for mask in masks)


def _cover(boxes: Sequence[Box], whole: Box) -> bool:
    """Is each entry of a box in one of these?"""
    if any(_count(part) == _count(whole) for part in boxes):
        return True
    kinds: list[Tensor] = []
    for axis, seen in enumerate(whole):  # places that are in the same boxes count once
        masks = torch.stack([part[axis] for part in boxes])[:, seen].numpy()
        _, first = np.unique(np.packbits(masks, axis=0).T, axis=0, return_index=True)
        kinds.append(torch.from_numpy(masks[:, first]))
    if math.prod(kind.shape[1] for kind in kinds) > CONSTANT_LIMIT:
        return False
    covered = torch.zeros([kind.shape[1] for kind in kinds], dtype=torch.bool)
    for number in range(len(boxes)):
        part = torch.ones((), dtype=torch.bool)
        for kind in kinds:
            part = part[..., None] & kind[number]
        covered |= part
    return bool(covered.all())
