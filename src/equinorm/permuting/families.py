"""Families: channels that are permuted among themselves, and how each axis of a tensor follows them. Plain data."""

import math
from dataclasses import dataclass

from equinorm._scaling import Pin


@dataclass(frozen=True, slots=True)
class AxisPart:
    """Where the channels of a family stand in one axis of a tensor.

    Entries offset + i·inner + k, for k < inner, belong to channel i; and the same again in steps of `outer`.

    Attributes:
        tensor: first name of the tensor.
        axis: of the tensor.
        size: how many channels.
        offset: where the segment begins.
        inner: consecutive entries that belong to each channel.
        outer: how often the channels come anew, and after how many entries; one pair for each loop around them.
        is_whole: is the axis nothing but these channels?
    """

    tensor: str
    axis: int
    size: int
    offset: int = 0
    inner: int = 1
    outer: tuple[tuple[int, int], ...] = ()
    is_whole: bool = True

    def __str__(self) -> str:
        place = f"{self.tensor}[{self.axis}]"
        if self.is_whole:
            return place
        segment = f"[{self.offset}:]" if self.offset else ""
        around = "".join(f"{count}×" for count, _ in self.outer)
        return f"{place}{segment} as {around}[{self.size}]{f'×{self.inner}' if self.inner > 1 else ''}"


@dataclass(frozen=True, slots=True)
class ChannelFamily:
    """Channels that may be permuted in any order.

    Attributes:
        name: the first tensor and axis in which they stand.
        size: how many channels.
        within: sizes of the axes at each place of which the order may be another one: heads around the channels of a head,
            groups around the channels of a group. Empty for most.
        axes: all that moves along.
    """

    name: str
    size: int
    within: tuple[int, ...]
    axes: tuple[AxisPart, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its part of a permutation: an order of the channels for each place in `within`."""
        return (*self.within, self.size)

    @property
    def orders(self) -> int:
        """Number of orders in its part of a permutation."""
        return math.prod(self.within)

    def __str__(self) -> str:
        times = f"{' × '.join(map(str, self.within))} times " if self.within else ""
        shown = [str(part) for part in self.axes]
        return f"{times}{self.size} channels: {', '.join(shown)}"


@dataclass(frozen=True, slots=True)
class AxisPin(Pin):
    """Entries of one axis that cannot be permuted.

    Attributes:
        tensor: first name of the tensor.
        axis: of the tensor.
        channels: how many.
        reason: the operation and source line that says so.
    """

    def __str__(self) -> str:
        return f"{self.tensor}[{self.axis}]: {self.channels} channels by {self.reason}"


@dataclass(frozen=True, slots=True)
class PermutationSpec:
    """Which axes move with which family, in both directions.

    Attributes:
        perm_to_axes: (tensor, axis) of all that each family moves.
        axes_to_perm: for every axis of each tensor its family, None where it does not move, or a tuple of several.
    """

    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: dict[str, tuple[str | tuple[str, ...] | None, ...]]
