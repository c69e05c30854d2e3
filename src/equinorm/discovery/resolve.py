"""From labels to scalings: every label in the free classes, families of these, and pins with their reasons."""

import hashlib
from collections.abc import Container, Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm._class_ids import distinct
from equinorm._scaling import Family, Pin, Reason, Scaling
from equinorm.discovery.classes import PINNED, Classes
from equinorm.discovery.labels import Label, compact
from equinorm.discovery.values import Source

UNUSED = Reason("no operation", "the graph does not use it")
"""Why a tensor stays that no operation reads."""


def resolve(
    sources: Sequence[Source], classes: Classes, drop: Container[Source] = ()
) -> tuple[tuple[Scaling, ...], np.ndarray]:
    """Express every label in the free classes; returns the scalings of all sources, and the free classes that they use.

    Args:
        sources: the tensors.
        classes: after all laws.
        drop: those whose label nobody reads any more; it makes room for their scaling.
    """
    roots = _used_roots(sources, classes)
    known: dict[bytes, Tensor] = {}
    scalings: list[Scaling] = []
    for source in sources:
        found = _shared(factors(source.label, classes, roots), known) if source.label else ()
        facts = (source.names, source.shape, source.dtype, source.kind, source.role or "weight", source.depth)
        scalings.append(Scaling(*facts, found, source.offset, source.is_squared))
        if source in drop:
            source.label = Label(source.shape)
    return tuple(scalings), roots


def _shared(factors: tuple[tuple[float, Tensor], ...], known: dict[bytes, Tensor]) -> tuple[tuple[float, Tensor], ...]:
    """The same factors, in one memory for equal ids: what one layer writes, others read."""
    found = []
    for exponent, ids in factors:
        twin = known.setdefault(hashlib.blake2b(ids.contiguous().numpy().data, digest_size=16).digest(), ids)
        found.append((exponent, twin.reshape(ids.shape) if twin.numel() == ids.numel() else ids))
    return tuple(found)


def _used_roots(sources: Sequence[Source], classes: Classes) -> np.ndarray:
    """Free classes that scale some tensor, ascending. Classes of intermediate values alone may be left over."""
    is_used = np.zeros(classes.size, bool)
    for source in sources:
        for factor in source.label.factors if source.label is not None else ():
            roots = np.abs(classes.resolve(distinct(factor.ids.numpy())))
            dependent = classes.is_dependent(roots)
            is_used[roots[~dependent]] = True
            for id in roots[dependent].tolist():
                is_used[[*classes.form(id)]] = True
    return classes.free_roots(is_used)


def _numbers(ids: np.ndarray, roots: np.ndarray) -> np.ndarray:
    """The number from 1 of each of these ids among the free classes; 0 for all others."""
    places = np.searchsorted(roots, ids)
    is_one = places < len(roots)
    is_one[is_one] = roots[places[is_one]] == ids[is_one]
    return np.where(is_one, places + 1, 0)


def factors(label: Label, classes: Classes, free: np.ndarray) -> tuple[tuple[float, Tensor], ...]:
    """Exponents and ids of a label in these free classes, which ascend and are numbered from 1."""
    factors: list[tuple[float, Tensor]] = []
    for factor in label.factors:
        ids, inverse = _places(factor.ids.numpy())
        slots: dict[tuple[float, int], np.ndarray] = {}
        roots = classes.resolve(ids)
        dependent = classes.is_dependent(roots)
        for sign in (1, -1):
            plain = (sign * roots > PINNED) & ~dependent
            if plain.any():
                slots[float(sign), 0] = np.where(plain, _numbers(np.abs(roots), free), 0)
        for place in np.flatnonzero(dependent):
            seen: dict[float, int] = {}
            for root, coefficient in classes.form(int(ids[place])).items():
                value = float(coefficient)
                seen[value] = seen.get(value, -1) + 1
                slot = value, seen[value]
                if slot not in slots:
                    slots[slot] = np.zeros(len(ids), np.int64)
                slots[slot][place] = _numbers(np.array([root]), free)[0]
        for (coefficient, _), values in slots.items():
            found = compact(torch.from_numpy(values[inverse.reshape(-1)]).reshape(factor.ids.shape))
            exponent = float(factor.exponent) * coefficient
            twin = next((i for i, (_, other) in enumerate(factors) if torch.equal(other, found)), None)
            if twin is not None:  # in and out scales of one class cancel, or add up
                exponent += factors.pop(twin)[0]
            if exponent:
                factors.append((exponent, found))
    return tuple(_joined(factors))


_MOST_JOINED = 8
"""Factors that are looked at together."""


def _joined(factors: list[tuple[float, Tensor]]) -> list[tuple[float, Tensor]]:
    """Factors that vary along one axis, and those that do not vary, as one factor where each place is left with one class.

    A class that the first places of an axis share with the others, as z₁ · (1, z₂/z₁, z₃/z₁), is told by z₁, z₂, z₃.
    """
    if len(factors) < 2:
        return factors
    axes = [[axis for axis, size in enumerate(ids.shape) if size > 1] for _, ids in factors]
    for axis in sorted({own[0] for own in axes if len(own) == 1}):
        along, still = ([i for i, own in enumerate(axes) if own == place] for place in ([axis], []))
        for chosen in (along + still, along) if still else (along,):
            if 1 < len(chosen) <= _MOST_JOINED and (one := _one_class([factors[i] for i in chosen])) is not None:
                return _joined([*one, *(factor for i, factor in enumerate(factors) if i not in chosen)])
    return factors


def _one_class(factors: Sequence[tuple[float, Tensor]]) -> list[tuple[float, Tensor]] | None:
    """The product of factors along one axis as one factor, or as none where all cancels; None if it is more."""
    exponents, shape = [exponent for exponent, _ in factors], torch.broadcast_shapes(*(ids.shape for _, ids in factors))
    ids = torch.stack([ids.expand(shape) for _, ids in factors])
    alike = (ids[:, None] == ids).double()
    total = torch.einsum("f,fg...->g...", torch.tensor(exponents, dtype=torch.float64), alike)
    repeats = torch.stack([(ids[:number] == own).any(0) for number, own in enumerate(ids)])
    left = (ids > 0) & (total != 0) & ~repeats
    exponent = total[left].unique()
    if len(exponent) > 1 or bool((left.sum(0) > 1).any()):
        return None
    return [(float(exponent), compact((ids * left).sum(0)))] if len(exponent) else []


def _places(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct ids, and the place of each entry among them."""
    low, high = int(ids.min()), int(ids.max())
    if high - low >= 8 * ids.size:
        return np.unique(ids, return_inverse=True)
    present = np.zeros(high - low + 1, bool)
    present[ids - low] = True
    return np.flatnonzero(present) + low, (np.cumsum(present, dtype=np.int32) - 1)[ids - low]


def introduced(sources: Sequence[Source], classes: Classes) -> tuple[dict[int, tuple[str, int]], tuple[Pin, ...]]:
    """The first tensor and axis of every family in the labels of these tensors, and pinned classes with their reasons."""
    owner: dict[int, tuple[str, int]] = {}
    is_member = np.zeros(classes.size, bool)
    for source in sources:
        for factor in source.label.factors if source.label is not None else ():
            ids = distinct(factor.ids.numpy())
            ids = ids[ids > PINNED]
            is_member[ids] = True
            for family in np.flatnonzero(np.bincount(classes.family(ids))).tolist():
                owner.setdefault(family, (source.names[0], _axis(factor.ids)))
    unused = [source for source in sources if source.label is None and source.kind == "parameter"]
    pins = [Pin(source.names[0], 0, (source.shape or (1,))[0], UNUSED) for source in unused]
    for family, place in owner.items():
        members = classes.members(family)
        ids = np.flatnonzero(is_member[members.start : members.stop]) + members.start
        pins += [Pin(*place, count, reason) for reason, count in classes.reasons(ids).items()]
    return owner, tuple(pins)


def _axis(ids: Tensor) -> int:
    return next((axis for axis in range(ids.dim()) if ids.size(axis) > 1), 0)


def families(
    owner: dict[int, tuple[str, int]], scalings: Sequence[Scaling], classes: Classes, roots: np.ndarray
) -> tuple[Family, ...]:
    """Free classes by the axis that introduced them; `owner` has the first tensor of families that labels hold."""
    owner = dict(owner)
    numbers = classes.family(roots)
    for scaling in scalings:  # a class that joins others is in no label itself
        for _, ids in scaling.factors:
            for family in np.flatnonzero(np.bincount(numbers[ids[ids > 0].numpy() - 1])).tolist():
                owner.setdefault(family, (scaling.name, _axis(ids)))
    counts = np.bincount(numbers) if len(numbers) else numbers
    ends = 1 + np.cumsum(counts)  # ids ascend with families
    return tuple(
        Family(*owner[number], range(int(ends[number] - counts[number]), int(ends[number])))
        for number in np.flatnonzero(counts).tolist()
    )
