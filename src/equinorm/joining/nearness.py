"""How near one network comes to another that no rescaling, permutation or flip of signs makes it: what is left, and where."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._symmetries import Symmetries
from equinorm.joining.differences import Change, Tolerance, changes
from equinorm.joining.fitting import medians
from equinorm.joining.forms import Forms, dtype_of, forms, real, rescaled
from equinorm.joining.moves import Moves, Orders

Both = tuple[Symmetries, Symmetries]


_ROUNDS = 3
"""Most turns of matching channels and fitting scales."""

_FEW = 1e-3
"""Share of entries that may differ where no further turn is taken."""


@dataclass(frozen=True, slots=True, eq=False)
class Nearness:
    """What takes the first network near to the second, and what differs then.

    Attributes:
        log_scales: that come last.
        order: of the channels of each family, by name; of those that move.
        signs: that come first.
        difference: the largest.
        changes: tensors above the tolerance, worst first.
    """

    log_scales: Tensor
    order: Orders
    signs: Tensor
    difference: float
    changes: tuple[Change, ...]

    @property
    def entries(self) -> int:
        """How many differ."""
        return sum(change.entries for change in self.changes)


def nearest(both: Both, moves: Moves, scales: Sequence[Tensor], tolerance: Tolerance) -> Nearness:
    """The first network as near to the second as is found: fewest entries that differ by more than the tolerance.

    Scales are medians of ratios, which a few changed weights do not move; channels are matched by weights within bounds. Both
    are exact where most weights around every channel are copies.

    Args:
        both: the networks.
        moves: flips and permutations of the first.
        scales: canonical log-scales of both.
        tolerance: on differences.
    """
    ours, theirs = (forms(found, dtype=dtype_of(found)) for found in both)
    still = torch.ones(moves.flips.num_free, dtype=torch.int64)
    found = [_scaled(both, moves, (still, {}), (ours, theirs), scales, tolerance)]
    if not moves.is_trivial:
        rough = (own.balance(p=1, tol=1e-4, biases=True).log_scales for own in both)
        one, other = (rescaled(own.scalings, side, z) for own, side, z in zip(both, (ours, theirs), rough, strict=True))
        size = sum(scaling.numel for scaling in both[0].scalings)
        for _ in range(_ROUNDS):
            signs, order = moves.settled(real(one), real(other))
            found.append(_scaled(both, moves, (signs, order), (ours, theirs), scales, tolerance))
            if found[-1].entries <= _FEW * size or (len(found) > 2 and found[-1].entries >= found[-2].entries):
                break
            z = medians(both[0].scalings, moves.moved(one, signs, order), theirs, torch.zeros_like(scales[0]))
            other = rescaled(both[1].scalings, theirs, -z)
    return min(found, key=lambda nearness: nearness.entries)


def _scaled(
    both: Both,
    moves: Moves,
    by: tuple[Tensor, Orders],
    sides: tuple[Forms, Forms],
    scales: Sequence[Tensor],
    tolerance: Tolerance,
) -> Nearness:
    """What is left after flips, a permutation, and the scales that fit them best."""
    (signs, order), (ours, theirs) = by, sides
    moved = moves.moved(ours, signs, order)
    z = medians(both[0].scalings, moved, theirs, scales[0] - scales[1])
    one, other = rescaled(both[0].scalings, moved, z + scales[1]), rescaled(both[1].scalings, theirs, scales[1])
    compared = zip(one.values(), other.values(), strict=True)
    return Nearness(z, moves.named(order), signs, *changes(both[0].scalings, compared, (z + scales[1], scales[1]), tolerance))
