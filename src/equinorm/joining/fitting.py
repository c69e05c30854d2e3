"""Log-scales that take the weights of one network to those of another: by least squares, or by medians that few outvote."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.balancing.balance import Balance
from equinorm.rescaling.least_squares import Equations, conjugate_gradients

_PASSES = 3
"""Most turns of medians once every class has one."""

_ENOUGH = 0.5
"""Classes are settled together whose known weights are this part of what the best known class knows."""


Medians = tuple[Tensor, Tensor]
"""Log-scales, and the number of weights that tell each."""


def settled(found: Symmetries, balance: Balance) -> tuple[Tensor, Tensor]:
    """Log-scales that every member of a network's orbit comes to one point by, and a mask of its dead classes.

    No path tells the scale of a dead class, so that a balance leaves it as it was: least squares on log |w| settle it.
    """
    dead = torch.zeros(found.num_free, dtype=torch.bool)
    dead[[id - 1 for id in balance.dead]] = True
    if not bool(dead.any()):
        return balance.log_scales, dead
    known, tensors = torch.where(dead, 0.0, balance.log_scales), found.tensors
    return _least_squares(found.scalings, lambda own: -_logarithms(own, tensors), known, dead), dead


def joining(
    scalings: Sequence[Scaling], a: Mapping[str, Tensor], b: Mapping[str, Tensor], known: Tensor, dead: Tensor
) -> Tensor:
    """Fill in the log-scales of dead classes by least squares on log |b / a|, where both are nonzero."""
    return _least_squares(scalings, lambda own: _logarithms(own, b) - _logarithms(own, a), known, dead)


def telling(scalings: Sequence[Scaling], logarithms: Mapping[str, Tensor], num_free: int) -> Tensor:
    """Log-scales that multiply tensors by exp of these logarithms, where any do; of the least squares else.

    Solved twice, the second time for what the first left: powers of two must be known to 1e-12.
    """
    none, free = torch.zeros(num_free, dtype=torch.float64), torch.ones(num_free, dtype=torch.bool)
    first = _least_squares(scalings, lambda own: logarithms[own.name], none, free)
    return first + _least_squares(scalings, lambda own: logarithms[own.name] - own.log_scales(first), none, free)


def _logarithms(scaling: Scaling, tensors: Mapping[str, Tensor]) -> Tensor:
    """log |w| of a tensor with its offset."""
    return scaling.effective(tensors[scaling.name]).cpu().to_dense().abs().double().log()


def _least_squares(scalings: Sequence[Scaling], wanted: Callable[[Scaling], Tensor], known: Tensor, dead: Tensor) -> Tensor:
    """Fill in the log-scales of dead classes so that tensors grow by wanted logarithms, where these are finite."""
    place = torch.zeros(len(dead) + 1, dtype=torch.int64)  # by id; 0 is known
    place[1:][dead] = torch.arange(1, int(dead.sum()) + 1)
    equations = [
        _equations(scaling, place, wanted(scaling) - scaling.log_scales(known))
        for scaling in scalings
        if any(bool(place[ids].any()) for _, ids in scaling.factors)
    ]
    filled = known.clone()
    filled[dead] = conjugate_gradients(equations, int(dead.sum()))
    return filled


def _equations(scaling: Scaling, place: Tensor, ratio: Tensor) -> Equations:
    """Those of one tensor, in dead classes by their places."""
    usable, shape = ratio.isfinite(), ratio.shape
    factors = tuple((e, place[ids].reshape((1,) * (len(shape) - ids.dim()) + ids.shape)) for e, ids in scaling.factors)
    return Equations(factors, usable.double(), torch.where(usable, ratio, 0.0))


def medians(scalings: Sequence[Scaling], a: Mapping[str, Tensor], b: Mapping[str, Tensor], start: Tensor) -> Tensor:
    """Log-scales each of which is the median of log |b / a| over the weights that it scales.

    Classes are settled from the network's ends inwards, by weights whose other scales are known already; then all take their
    medians once more, by all weights. Where less than half of the weights of each class differ, these change nothing.

    Args:
        scalings: how tensors move.
        a: tensors of one network by name, offsets included.
        b: of the other.
        start: log-scales of classes of which no weight says anything.
    """
    readings = [
        _Reading(exponent, ids, ratio, tuple((e, own) for at, (e, own) in enumerate(scaling.factors) if at != place))
        for scaling in scalings
        for ratio in ([_log_ratio(a[scaling.name], b[scaling.name])] if scaling.factors and scaling.numel else [])
        for place, (exponent, ids) in enumerate(scaling.factors)
    ]
    whole = torch.zeros(len(start) + 1, dtype=torch.float64)
    for reading in readings:
        whole.index_add_(0, reading.ids.flatten(), reading.by_entry(reading.ratio).isfinite().sum(1).double())
    z = torch.full_like(whole, torch.nan)
    z[0] = 0.0
    told = [reading.medians(z) for reading in readings]
    while bool((wanted := z.isnan()).any()):
        found, known = _agreed(readings, told, z, wanted)
        evidence = known / whole.clamp_min(1)
        if not bool((evidence > 0).any()):
            break
        settled = evidence >= _ENOUGH * evidence.max()
        z = torch.where(settled, found, z)
        told = [
            reading.medians(z) if reading.tells(wanted) and reading.depends_on(settled) else own
            for reading, own in zip(readings, told, strict=True)
        ]
    z[1:] = torch.where(z[1:].isnan(), start, z[1:])
    every = torch.arange(len(z)) > 0
    for _ in range(_PASSES):
        found, known = _agreed(readings, [reading.medians(z) for reading in readings], z, every)
        before, z = z, torch.where(known > 0, found, z)
        if torch.equal(before, z):
            break
    return z[1:]


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log |b / a|; NaN where that is not finite."""
    ratio = b.abs().log() - a.abs().log()
    return torch.where(ratio.isfinite(), ratio, torch.nan)


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """What the weights of one tensor say of the classes of one of its factors.

    Attributes:
        exponent: of these classes.
        ids: of them, with as many axes as the tensor.
        ratio: log |b / a| of every weight.
        others: all other factors.
    """

    exponent: float
    ids: Tensor
    ratio: Tensor
    others: tuple[tuple[float, Tensor], ...]

    def by_entry(self, ratio: Tensor) -> Tensor:
        """Weights of each entry of the ids, of shape (entries, weights)."""
        ratio = ratio.expand(self.ratio.shape)
        missing = self.ratio.dim() - self.ids.dim()
        own = [axis for axis in range(missing, ratio.dim()) if self.ids.shape[axis - missing] > 1]
        rest = [axis for axis in range(ratio.dim()) if axis not in own]
        return ratio.permute((*own, *rest)).reshape(self.ids.numel(), -1)

    def tells(self, wanted: Tensor) -> bool:
        """Is it of one of these classes?"""
        return bool(wanted[self.ids].any())

    def depends_on(self, changed: Tensor) -> bool:
        """Does another factor hold one of these classes?"""
        return any(bool(changed[ids].any()) for _, ids in self.others)

    def medians(self, z: Tensor) -> Medians:
        """What each entry of the ids is by the weights whose other scales are known, and how many these are."""
        known = [exponent * z[ids] for exponent, ids in self.others]
        if any(bool(part.isnan().all()) for part in known):
            return torch.zeros(self.ids.numel(), dtype=z.dtype), torch.zeros(self.ids.numel(), dtype=z.dtype)
        rest = self.by_entry(sum((-part.to(self.ratio.dtype) for part in known), start=self.ratio))
        return rest.nanmedian(1).values.double() / self.exponent, rest.isfinite().sum(1).double()


def _agreed(readings: Sequence[_Reading], told: Sequence[Medians], z: Tensor, wanted: Tensor) -> Medians:
    """For each class that is wanted, by id, the median of what tensors tell, and by how many weights."""
    found, total = z.clone(), torch.zeros_like(z)
    if not readings:
        return found, total
    ids = torch.cat([reading.ids.flatten() for reading in readings])
    values, weights = (torch.cat(part) for part in zip(*told, strict=True))
    usable = (weights > 0) & wanted[ids]
    ids, values, weights = ids[usable], values[usable], weights[usable]
    by_value = values.argsort()
    order = by_value[ids[by_value].argsort(stable=True)]
    ids, values, weights = ids[order], values[order], weights[order]
    total.index_add_(0, ids, weights)
    before = total.cumsum(0) - total  # of classes with smaller ids
    is_half = weights.cumsum(0) - before[ids] >= total[ids] / 2
    first = is_half & ~(torch.cat([torch.zeros(1, dtype=torch.bool), is_half[:-1] & (ids[1:] == ids[:-1])]))
    found[ids[first]] = values[first]
    return found, total
