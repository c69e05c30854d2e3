"""From labels to scalings: every label in the free classes, families of these, and pins with their reasons."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm._scaling import Family, Pin, Reason, Scaling
from equinorm.discovery.classes import PINNED, Classes
from equinorm.discovery.labels import Label, compact
from equinorm.discovery.values import Source

UNUSED = Reason("no operation", "the graph does not use it")
"""Why a tensor stays that no operation reads."""


def resolve(sources: Sequence[Source], classes: Classes) -> tuple[tuple[Scaling, ...], np.ndarray]:
    """Express every label in the free classes; returns the scalings of all sources, and the free classes that they use."""
    roots = _used_roots(sources, classes)
    index = numbering(roots, classes)
    scalings = (
        Scaling(
            *(s.names, s.shape, s.dtype, s.kind, s.role or "weight", s.depth),
            *(factors(s.label, classes, index) if s.label else (), s.offset, s.is_squared),
        )
        for s in sources
    )
    return tuple(scalings), roots


def _used_roots(sources: Sequence[Source], classes: Classes) -> np.ndarray:
    """Free classes that scale some tensor, ascending. Classes of intermediate values alone may be left over."""
    labels = [source.label for source in sources if source.label is not None]
    ids = [_distinct(factor.ids.numpy())[0] for label in labels for factor in label.factors]
    if not ids:
        return np.zeros(0, np.int64)
    roots, _ = _distinct(np.abs(classes.resolve(_distinct(np.concatenate(ids))[0])))
    dependent = classes.is_dependent(roots)
    used = sorted({root for id in roots[dependent].tolist() for root in classes.form(id)})
    free = classes.free_roots()
    is_used = np.zeros(max(roots[-1], free.max(initial=0), *used) + 1, bool)
    is_used[roots[~dependent]] = is_used[used] = True
    return free[is_used[free]]


def numbering(roots: np.ndarray, classes: Classes) -> np.ndarray:
    """The number from 1 of each of these free classes, by its id; 0 for all others."""
    index = np.zeros(max(int(roots.max(initial=1)), int(classes.free_roots().max(initial=1))) + 2, np.int64)
    index[roots] = np.arange(1, len(roots) + 1)
    return index


def factors(label: Label, classes: Classes, index: np.ndarray) -> tuple[tuple[float, Tensor], ...]:
    """Exponents and ids of a label in the free classes, which `index` numbers from 1."""
    factors: list[tuple[float, Tensor]] = []
    for factor in label.factors:
        ids, inverse = _distinct(factor.ids.numpy())
        slots: dict[tuple[float, int], np.ndarray] = {}
        roots = classes.resolve(ids)
        dependent = classes.is_dependent(roots)
        for sign in (1, -1):
            plain = (sign * roots > PINNED) & ~dependent
            if plain.any():
                slots[float(sign), 0] = np.where(plain, index[np.where(plain, np.abs(roots), 0)], 0)
        for place in np.flatnonzero(dependent):
            seen: dict[float, int] = {}
            for root, coefficient in classes.form(int(ids[place])).items():
                value = float(coefficient)
                seen[value] = seen.get(value, -1) + 1
                slot = value, seen[value]
                if slot not in slots:
                    slots[slot] = np.zeros(len(ids), np.int64)
                slots[slot][place] = index[root]
        for (coefficient, _), values in slots.items():
            found = compact(torch.from_numpy(values[inverse.reshape(-1)]).reshape(factor.ids.shape))
            exponent = float(factor.exponent) * coefficient
            twin = next((i for i, (_, other) in enumerate(factors) if torch.equal(other, found)), None)
            if twin is not None:  # in and out scales of one class cancel, or add up
                exponent += factors.pop(twin)[0]
            if exponent:
                factors.append((exponent, found))
    return tuple(factors)


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct ids, and the place of each entry among them, without sorting: ids are dense."""
    low = ids.min()
    present = np.zeros(ids.max() - low + 1, bool)
    present[ids - low] = True
    return np.flatnonzero(present) + low, (np.cumsum(present) - 1)[ids - low]


def families(
    sources: Sequence[Source], scalings: Sequence[Scaling], classes: Classes, roots: np.ndarray
) -> tuple[tuple[Family, ...], tuple[Pin, ...]]:
    """Free classes by the axis that introduced them, and pinned ones with their reasons."""
    owner: dict[int, tuple[str, int]] = {}
    members: dict[int, list[np.ndarray]] = {}
    for source in sources:
        for factor in source.label.factors if source.label is not None else ():
            ids, _ = _distinct(factor.ids.numpy())
            ids = ids[ids > PINNED]
            axis = next((axis for axis in range(factor.ids.dim()) if factor.ids.size(axis) > 1), 0)
            for family in np.flatnonzero(np.bincount(classes.family(ids))).tolist():
                owner.setdefault(family, (source.names[0], axis))
                members.setdefault(family, []).append(ids[classes.family(ids) == family])
    numbers = classes.family(roots)
    for scaling in scalings:  # a class that joins others is in no label itself
        for _, ids in scaling.factors:
            axis = next((axis for axis in range(ids.dim()) if ids.size(axis) > 1), 0)
            for family in np.flatnonzero(np.bincount(numbers[ids[ids > 0].numpy() - 1])).tolist():
                owner.setdefault(family, (scaling.name, axis))
    counts = np.bincount(numbers) if len(numbers) else numbers
    ends = 1 + np.cumsum(counts)  # ids ascend with families
    found = tuple(
        Family(*owner[number], range(int(ends[number] - counts[number]), int(ends[number])))
        for number in np.flatnonzero(counts).tolist()
    )
    unused = [source for source in sources if source.label is None and source.kind == "parameter"]
    pins = [Pin(source.names[0], 0, (source.shape or (1,))[0], UNUSED) for source in unused]
    for number, parts in members.items():
        ids, _ = _distinct(np.concatenate(parts))
        pins += [Pin(*owner[number], count, reason) for reason, count in classes.reasons(ids).items()]
    return found, tuple(pins)
