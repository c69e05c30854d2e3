"""How each tensor of a model moves with the free log-scales: what solving and rescaling need to know of a network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equinorm._classes import PINNED, Classes, Reason
from equinorm._errors import RescaleError
from equinorm._labels import compact
from equinorm._values import Source


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """One tensor w ↦ (w + offset) · exp(log_scales(z)) − offset.

    Attributes:
        names: dotted names in the model, several if tied.
        shape: of the tensor.
        dtype: of the tensor.
        kind: "parameter" or "buffer".
        role: "weight", or "bias" if the network adds it to an activation.
        depth: number of weights on the longest path from an input up to and with this one.
        factors: exponent and ids, one pair for each factor; ids broadcast to `shape`. Ids count from 1: 0 is pinned, and j
            moves with the free log-scale z[j − 1] of a vector z of shape (num_free,), such as `Balance.log_scales`.
        offset: number that the network adds before it uses the tensor (1 for gains written 1 + w), otherwise 0.
        is_squared: does the network take norms of it, as weight normalization does?
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    role: str
    depth: int
    factors: tuple[tuple[float, Tensor], ...]
    offset: float = 0.0
    is_squared: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def moving_share(self) -> float:
        """Share of its entries that move."""
        groups: list[tuple[set[int], Tensor]] = []  # axes, and where nothing moves along them: masks of other axes multiply
        for _, ids in self.factors:
            axes, still = {axis for axis, size in enumerate(ids.shape) if size > 1}, ids == 0
            for other, mask in [group for group in groups if group[0] & axes]:
                axes, still = axes | other, still & mask
            groups = [group for group in groups if not group[0] & axes] + [(axes, still)]
        return 1.0 - math.prod(float(still.double().mean()) for _, still in groups)

    def log_scales(self, z: Tensor) -> Tensor:
        """Log-scale of every entry, Σ_f exponent_f · z[ids_f − 1], 0 where it is pinned; float64, broadcasts to `shape`.

        Args:
            z: free log-scales of shape (num_free,). Gradients pass.

        Raises:
            RescaleError: if z has another shape.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4))
        >>> symmetries = equinorm.symmetries(net, (torch.randn(1, 8),))
        >>> symmetries.scalings[2].name, symmetries.scalings[2].log_scales(torch.tensor([0.5, 2.0]))
        ('2.weight', tensor([[-0.5000, -2.0000]], dtype=torch.float64))
        """
        return sum(self.log_factors(z), start=torch.zeros((), dtype=torch.float64))

    def log_factors(self, z: Tensor) -> list[Tensor]:
        """The summands of `log_scales`, one for each factor."""
        z = z.to("cpu", torch.float64)
        highest = max((int(ids.max()) for _, ids in self.factors if ids.numel()), default=0)
        if z.dim() != 1 or len(z) < highest:
            needed = f"(num_free,), at least {highest}"
            raise RescaleError(f"the log-scales of {self.name} need free log-scales of shape {needed}, not {tuple(z.shape)}.")
        if not len(z):
            return []
        return [torch.where(ids > 0, exponent * z[(ids - 1).clamp(min=0)], 0.0) for exponent, ids in self.factors]

    def effective(self, tensor: Tensor) -> Tensor:
        """What scales: the tensor plus the offset, without gradient."""
        return tensor.detach() + self.offset if self.offset else tensor.detach()

    def free(self) -> Tensor:
        """Sorted ids of the free classes that move this tensor."""
        ids = torch.cat([torch.unique(ids) for _, ids in self.factors]) if self.factors else torch.zeros(0, dtype=torch.long)
        ids = torch.unique(ids)
        return ids[ids > 0]


@dataclass(frozen=True, slots=True)
class Family:
    """Channels of one axis: the classes that one operation introduced.

    Attributes:
        tensor: name of the first tensor that moves with them.
        axis: the axis of that tensor.
        ids: the free classes, among 1..num_free; those of a family follow one another.
    """

    tensor: str
    axis: int
    ids: range


_UNUSED = Reason("no operation", "the graph does not use it")


@dataclass(frozen=True, slots=True)
class Pin:
    """Channels that cannot scale, and why.

    Attributes:
        tensor: name of the first tensor that would have moved with them.
        axis: the axis of that tensor.
        channels: how many.
        reason: what pins them.
    """

    tensor: str
    axis: int
    channels: int
    reason: Reason


def resolve(sources: Sequence[Source], classes: Classes) -> tuple[tuple[Scaling, ...], np.ndarray]:
    """Express every label in the free classes; returns the scalings of all sources, and the free classes that they use."""
    roots = _used_roots(sources, classes)
    index = np.zeros(int(roots.max(initial=1)) + 2, np.int64)
    index[roots] = np.arange(1, len(roots) + 1)
    scalings = (
        Scaling(
            *(s.names, s.shape, s.dtype, s.kind, s.role or "weight", s.depth),
            *(factors(s, classes, index), s.offset, s.is_squared),
        )
        for s in sources
    )
    return tuple(scalings), roots


def _used_roots(sources: Sequence[Source], classes: Classes) -> np.ndarray:
    """Free classes that move some tensor, ascending. Classes of intermediate values alone may be left over."""
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


def factors(source: Source, classes: Classes, index: np.ndarray) -> tuple[tuple[float, Tensor], ...]:
    """Exponents and ids of a label in the free classes, which `index` numbers from 1."""
    factors: list[tuple[float, Tensor]] = []
    for factor in source.label.factors if source.label is not None else ():
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
            moved = compact(torch.from_numpy(values[inverse.reshape(-1)]).reshape(factor.ids.shape))
            exponent = float(factor.exponent) * coefficient
            twin = next((i for i, (_, other) in enumerate(factors) if torch.equal(other, moved)), None)
            if twin is not None:  # in and out scales of one class cancel, or add up
                exponent += factors.pop(twin)[0]
            if exponent:
                factors.append((exponent, moved))
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
    pins = [Pin(source.names[0], 0, (source.shape or (1,))[0], _UNUSED) for source in unused]
    for number, parts in members.items():
        ids, _ = _distinct(np.concatenate(parts))
        pins += [Pin(*owner[number], count, reason) for reason, count in classes.reasons(ids).items()]
    return found, tuple(pins)
