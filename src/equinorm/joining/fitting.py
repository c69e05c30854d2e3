"""Log-scales that take the weights of one network to those of another: by least squares, or by medians that few outvote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._scaling import Scaling

_PASSES = 3
"""Most turns of medians once every class has one."""

_ENOUGH = 0.5
"""Classes are settled together whose known weights are this part of what the best known class knows."""


def least_squares(
    scalings: Sequence[Scaling], a: Mapping[str, Tensor], b: Mapping[str, Tensor], known: Tensor, dead: Tensor
) -> Tensor:
    """Fill in the log-scales of dead classes by least squares on log |b / a|, where both are nonzero."""
    size = int(dead.sum())
    place = torch.full((len(dead) + 1,), -1)  # by id: 0 is pinned
    place[1:][dead] = torch.arange(size)
    normal, right = torch.zeros(size * size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for scaling in scalings:
        if not any(bool((place[ids] >= 0).any()) for _, ids in scaling.factors):
            continue
        one, other = (scaling.effective(tensors[scaling.name]).cpu().double().abs() for tensors in (a, b))
        ratio = (other / one).log() - scaling.log_scales(known)
        usable = ratio.isfinite()
        for exponent, ids in scaling.factors:
            row = place[ids].expand(scaling.shape)
            picked = usable & (row >= 0)
            right.scatter_add_(0, row[picked], exponent * ratio[picked])
            for other, other_ids in scaling.factors:
                column = place[other_ids].expand(scaling.shape)
                pair = picked & (column >= 0)
                weight = torch.full((int(pair.sum()),), exponent * other, dtype=torch.float64)
                normal.scatter_add_(0, row[pair] * size + column[pair], weight)
    solution = torch.linalg.lstsq(normal.reshape(size, size), right[:, None], driver="gelsd").solution[:, 0]
    filled = known.clone()
    filled[dead] = solution
    return filled


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
        whole.index_add_(0, reading.ids.flatten(), reading.within(reading.ratio).isfinite().sum(1).double())
    z = torch.full_like(whole, torch.nan)
    z[0] = 0.0
    for _ in range(len(z)):
        found, known = _medians(readings, z, z.isnan())
        evidence = known / whole.clamp_min(1)
        if not bool((evidence > 0).any()):
            break
        z = torch.where(evidence >= _ENOUGH * evidence.max(), found, z)
    z[1:] = torch.where(z[1:].isnan(), start, z[1:])
    every = torch.arange(len(z)) > 0
    for _ in range(_PASSES):
        found, known = _medians(readings, z, every)
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

    def within(self, ratio: Tensor) -> Tensor:
        """Weights of each entry of the ids, of shape (entries, weights)."""
        ratio = ratio.expand(self.ratio.shape)
        missing = self.ratio.dim() - self.ids.dim()
        own = [axis for axis in range(missing, ratio.dim()) if self.ids.shape[axis - missing] > 1]
        rest = [axis for axis in range(ratio.dim()) if axis not in own]
        return ratio.permute((*own, *rest)).reshape(self.ids.numel(), -1)

    def medians(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What each entry of the ids is by the weights whose other scales are known, and how many these are."""
        known = [exponent * z[ids] for exponent, ids in self.others]
        if any(bool(part.isnan().all()) for part in known):
            return torch.zeros(self.ids.numel(), dtype=z.dtype), torch.zeros(self.ids.numel(), dtype=z.dtype)
        rest = self.within(sum((-part.to(self.ratio.dtype) for part in known), start=self.ratio))
        return rest.nanmedian(1).values.double() / self.exponent, rest.isfinite().sum(1).double()


def _medians(readings: Sequence[_Reading], z: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For each class that is wanted, by id, the median of what tensors say, and by how many weights."""
    parts = [(reading.ids.flatten(), *reading.medians(z)) for reading in readings if bool(wanted[reading.ids].any())]
    found, total = z.clone(), torch.zeros_like(z)
    if not parts:
        return found, total
    ids, values, weights = (torch.cat(part) for part in zip(*parts, strict=True))
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
