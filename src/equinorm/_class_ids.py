"""What is worked out from the ids of classes that scale tensors: of many small tensors at once, and without sorting."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm._scaling import Scaling

AT_ONCE = 1 << 16
"""Numbers that are worked out together: many small tensors take one operation, and a large one no more memory than its own."""


def slices_at_once(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of neighbours that hold at most `AT_ONCE` numbers together, or one that holds more."""
    first, held = 0, 0
    for place, size in enumerate(sizes):
        if place > first and held + size > AT_ONCE:
            yield slice(first, place)
            first, held = place, 0
        held += size
    if first < len(sizes):
        yield slice(first, len(sizes))


def moving_log_factors(scalings: Sequence[Scaling], z: Tensor) -> list[list[Tensor]]:
    """`Scaling.log_factors` of several tensors, without those that are all 0."""
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), z.to("cpu", torch.float64)])
    sizes = [sum(ids.numel() for _, ids in scaling.factors) for scaling in scalings]
    return [logs for here in slices_at_once(sizes) for logs in _moving(scalings[here], z, padded)]


def _moving(scalings: Sequence[Scaling], z: Tensor, padded: Tensor) -> list[list[Tensor]]:
    """The same, all at once."""
    factors = [factor for scaling in scalings for factor in scaling.factors]
    sizes = [1, *(ids.numel() for _, ids in factors)]
    ids = torch.cat([torch.zeros(1, dtype=torch.long), *(ids.reshape(-1) for _, ids in factors)])
    if len(padded) <= int(ids.max()):
        return [scaling.log_factors(z) for scaling in scalings]  # refuses
    exponents = torch.tensor([0.0, *(exponent for exponent, _ in factors)], dtype=torch.float64)
    logs = exponents.repeat_interleave(torch.tensor(sizes)) * padded[ids]
    moves = np.logical_or.reduceat(np.append(logs.numpy() != 0, False), np.cumsum([0, *sizes[:-1]])) & (np.array(sizes) > 0)
    parts = logs.split(sizes)
    found, place = [], 1
    for scaling in scalings:
        own = enumerate(scaling.factors, place)
        found.append([parts[at].view(ids.shape) for at, (_, ids) in own if moves[at]])
        place += len(scaling.factors)
    return found


def firsts_of_runs(ids: Sequence[Tensor]) -> list[int | None]:
    """The first of some ids, where they are one free class after the other; None for others."""
    return [first for here in slices_at_once([own.numel() for own in ids]) for first in _firsts(ids[here])]


def _firsts(ids: Sequence[Tensor]) -> list[int | None]:
    """The same, all at once."""
    flat = torch.cat([*(own.reshape(-1) for own in ids), torch.zeros(1, dtype=torch.long)]).numpy()
    starts = np.cumsum([0, *(own.numel() for own in ids)])  # and the one that ends the last
    follows = np.empty(len(flat), bool)
    np.equal(flat[1:], flat[:-1] + 1, out=follows[1:])
    follows[starts] = flat[starts] > 0
    are_runs = np.logical_and.reduceat(follows, starts)[:-1] & (np.diff(starts) > 0)
    return [first if is_run else None for first, is_run in zip(flat[starts[:-1]].tolist(), are_runs.tolist(), strict=True)]


def add_to_classes_(totals: Tensor, ids: Tensor, values: Tensor, factor: float = 1.0) -> None:
    """Add values of a tensor's entries, times a factor, to the totals of the classes that scale these.

    Args:
        totals: of classes 0..num_free.
        ids: of one factor of the tensor, with as many axes or fewer.
        values: of all entries.
        factor: a number.
    """
    whole = ids.reshape((1,) * (values.dim() - ids.dim()) + tuple(ids.shape))
    axes = [axis for axis in range(values.dim()) if whole.shape[axis] == 1 != values.shape[axis]]
    summed = values.sum(axes, keepdim=True) if axes else values
    totals.index_add_(0, ids.flatten(), summed.flatten(), alpha=factor)


def joint_log_scales(factors: Sequence[tuple[float, Tensor]], padded: Tensor) -> Tensor:
    """Σ_f exponent_f · padded[ids_f], with 0 in front of the free log-scales."""
    return sum((exponent * padded[ids] for exponent, ids in factors), start=torch.zeros((), dtype=torch.float64))


def distinct(ids: np.ndarray) -> np.ndarray:
    """Sorted distinct ids, without sorting where they lie close together, as those of one axis do."""
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if high - low >= 8 * ids.size:
        return np.unique(ids)
    present = np.zeros(high - low + 1, bool)
    present[ids.reshape(-1) - low] = True
    return np.flatnonzero(present) + low
