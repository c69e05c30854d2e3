"""Layouts that are worked out once for an orbit: its scalings never change, and layouts hold no numbers of the weights."""

from collections.abc import Sequence

from torch import Tensor

from equinorm._scaling import Scaling
from equinorm.balancing.layout import NetworkLayout, TensorLayout, lay_out
from equinorm.rescaling.orbit import Orbit

LARGEST = 1 << 22
"""Entries of ids and masks up to which layouts are kept."""


def kept_layout(orbit: Orbit, scalings: Sequence[Scaling], held: Tensor) -> NetworkLayout:
    """The layouts of some tensors of an orbit, as the last call left them or anew.

    Args:
        orbit: whose scalings these are.
        scalings: of the tensors whose norm counts.
        held: mask over 0..num_free of classes that must not move.
    """
    key = (tuple(map(id, scalings)), held.numpy().tobytes())  # an orbit keeps its scalings alive

    def laid_out() -> NetworkLayout:
        return lay_out(scalings, orbit.family_ranges, orbit.num_free, held)

    return orbit.kept.once(NetworkLayout, key, laid_out, lambda network: sum(map(_entries, network.layouts)) <= LARGEST)


def _entries(layout: TensorLayout) -> int:
    """How much it holds."""
    sides = sum(side.ids.numel() for part in layout.parts for side in part.sides)
    return sides + sum(part.loops.numel() for part in layout.parts if part.loops is not None)
