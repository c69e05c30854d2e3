"""Components: tensors that share classes, one after another, belong together; the objective is a sum over them.

In a decoder each attention block and each feed-forward block is one, with the gain in front. Each can be solved by itself, so
that the weights of one at a time are enough.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from equinorm._class_ids import distinct
from equinorm._scaling import Scaling
from equinorm.balancing.layout import lay_out
from equinorm.balancing.minimum import minimum
from equinorm.balancing.norm import exp
from equinorm.balancing.options import BalanceOptions
from equinorm.balancing.scope import counted
from equinorm.rescaling.powers_of_two import round_to_unit


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """Tensors that no others share classes with.

    Two layers with a normalization of their own in front, as decoders have them, are two components:

    >>> ids = torch.arange(1, 5)
    >>> def weight(name, *factors):
    ...     return Scaling((name,), (2, 2), torch.float32, "parameter", "weight", 1, factors)
    >>> up, down = weight("up", (1.0, ids[:2, None])), weight("down", (-1.0, ids[None, :2]))
    >>> other, held = weight("other", (1.0, ids[2:, None])), torch.zeros(5, dtype=torch.bool)
    >>> found = [*components([up, down, other], [(1, 3), (3, 5)], held)]
    >>> [([scaling.name for scaling in part.scalings], part.classes.tolist()) for part in found]
    [(['up', 'down'], [1, 2]), (['other'], [3, 4])]
    >>> found[1].scalings[0].factors[0][1].flatten().tolist(), found[1].families
    ([1, 2], ((1, 3),))

    Attributes:
        scalings: of its tensors, in classes of its own, from 1.
        families: first and last + 1 id of every family of these.
        classes: class of the network, from 1, of each of its own.
    """

    scalings: tuple[Scaling, ...]
    families: tuple[tuple[int, int], ...]
    classes: Tensor = field(repr=False)

    @property
    def num_free(self) -> int:
        """Number of its classes."""
        return len(self.classes)


def components(scalings: Sequence[Scaling], families: Sequence[tuple[int, int]], held: Tensor) -> Iterator[Component]:
    """Part tensors by the classes that move them, in the order of their first tensor; each is made when its turn comes.

    Args:
        scalings: of all tensors.
        families: first and last + 1 id of every family, ascending.
        held: mask over 0..num_free of classes that must not move; tensors that only these move belong nowhere.
    """
    still = held.numpy()
    moving: list[Scaling] = []
    parent: list[int] = []
    first = np.full(len(still), -1, np.int32)  # the first tensor that a class moves
    for scaling in scalings:
        ids = _used(scaling, still)
        if not len(ids):
            continue
        number = len(moving)
        moving.append(scaling)
        parent.append(number)
        known = first[ids]
        for other in distinct(known[known >= 0]).tolist():
            parent[_root(parent, number)] = _root(parent, other)
        first[ids[known < 0]] = number
    groups: dict[int, list[int]] = {}
    for number in range(len(moving)):
        groups.setdefault(_root(parent, number), []).append(number)
    place = np.zeros(len(still), np.int32)
    starts = np.array([start for start, _ in families])
    for group in groups.values():
        yield _component([moving[number] for number in group], still, starts, place)


def _component(members: Sequence[Scaling], still: np.ndarray, starts: np.ndarray, place: np.ndarray) -> Component:
    """Its tensors in classes of its own; `place`, all zeros, is lent for the while."""
    classes = distinct(np.concatenate([_used(scaling, still) for scaling in members]))
    place[classes] = np.arange(1, len(classes) + 1)
    scalings = []
    renumbered: dict[int, Tensor] = {}  # ids that share memory still do
    for scaling in members:
        for _, ids in scaling.factors:
            if id(ids) not in renumbered:
                renumbered[id(ids)] = torch.from_numpy(place[ids.numpy()].astype(np.int64))
        own = [(exponent, renumbered[id(ids)]) for exponent, ids in scaling.factors]
        scalings.append(replace(scaling, factors=tuple(factor for factor in own if bool(factor[1].any()))))
    place[classes] = 0
    family = np.searchsorted(starts, classes, side="right")
    ends = [*(np.flatnonzero(np.diff(family)) + 1).tolist(), len(classes)]
    ranges = tuple((start + 1, end + 1) for start, end in zip([0, *ends[:-1]], ends, strict=True))
    return Component(tuple(scalings), ranges, torch.from_numpy(classes))


def _used(scaling: Scaling, still: np.ndarray) -> np.ndarray:
    """The classes that move a tensor, some twice."""
    found = [distinct(ids.numpy()) for _, ids in scaling.factors]
    ids = np.concatenate([np.zeros(0, np.int64), *found])
    return ids[(ids > 0) & ~still[ids]]


def _root(parent: list[int], number: int) -> int:
    while parent[number] != number:
        parent[number] = number = parent[parent[number]]
    return number


@dataclass(frozen=True, slots=True, eq=False)
class ComponentBalance:
    """One component at its balanced point.

    Attributes:
        log_scales: natural logarithms for its classes.
        before: Σ_k c_k ‖W_k‖_p^p of its weights as they are (the largest c_k ‖W_k‖_∞ if p = ∞).
        after: the same at the balanced point.
        residuals: before the first cycle and after the last; that of real scales, where these are rounded.
        cycles: how many ran.
        dead: number of channels without a path of nonzero weights.
    """

    log_scales: Tensor = field(repr=False)
    before: float
    after: float
    residuals: tuple[float, float]
    cycles: int
    dead: int


def balanced(component: Component, tensors: Mapping[str, Tensor], options: BalanceOptions, unit: float) -> ComponentBalance:
    """Solve one component.

    Args:
        component: of a network.
        tensors: its tensors by name; each is asked for once, and only matrices that move on both sides are held on to.
        options: of the balance.
        unit: of log-scales that are rounded to multiples of it; 0 to leave them as they are. Where rounding leaves no smaller
            norm, nothing moves.

    Raises:
        BalanceError: if a weight is not finite.
    """
    scalings = counted(component.scalings, options.biases)
    still = torch.zeros(component.num_free, dtype=torch.float64)
    if not scalings:
        return ComponentBalance(still, 0.0, 0.0, (0.0, 0.0), 0, 0)
    held = torch.zeros(component.num_free + 1, dtype=torch.bool)
    network = lay_out(scalings, component.families, component.num_free, held)
    found = minimum(network, tensors, options)
    residuals, z = found.solution.residuals, found.solution.z[1:].clone()
    before, after = _total(found.before.values(), options), _total(found.after.values(), options)
    if unit:
        z = round_to_unit(z, unit)
        padded = torch.cat([torch.zeros(1, dtype=torch.float64), z])
        after = _total(found.solution.problem.log_energies(padded).values(), options)
        if not after < before:
            z, after = still, before
    return ComponentBalance(z, before, after, (residuals[0], residuals[-1]), len(residuals) - 1, int(found.solution.dead.sum()))


def _total(logs: Iterable[float], options: BalanceOptions) -> float:
    return exp(options.norm.join(list(logs)))
