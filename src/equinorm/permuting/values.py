"""What the edges of a graph carry while it is looked at: axes of a value in parts, stacks, chosen rows, and constants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from equinorm._scaling import Reason
from equinorm.permuting.atoms import Axis, fresh, size_of


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """How the axes of a value are permuted.

    Attributes:
        axes: each as a product of parts.
        number: of a value that no input and no weight can change.
        names: the axis along which its entries, whole numbers, are places: whatever channel came there, they go on naming it.
    """

    axes: tuple[Axis, ...]
    number: Tensor | None = None
    names: Axis | None = None

    @property
    def parts(self) -> tuple["Laid", ...]:
        """Itself."""
        return (self,)

    @property
    def touched(self) -> tuple[Axis, ...]:
        """Its axes, and the one that it names."""
        return self.axes if self.names is None else (*self.axes, self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return tuple(map(size_of, self.axes))

    def with_axis(self, place: int, *axes: Axis) -> "Laid":
        """Its axes with these in the place of one."""
        place %= len(self.axes)
        return Laid((*self.axes[:place], *axes, *self.axes[place + 1 :]))


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """Values of one shape, stacked along a new axis that will be taken apart again, as packed queries, keys and values.

    Attributes:
        dim: place of the new axis.
        parts: the values.
    """

    dim: int
    parts: tuple[Laid, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        inner = self.parts[0].shape
        return (*inner[: self.dim], len(self.parts), *inner[self.dim :])

    @property
    def touched(self) -> tuple[Axis, ...]:
        """Axes of all parts."""
        return tuple(axis for part in self.parts for axis in part.touched)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Entries each of which is a row of a table, or was computed from one; see `selected_rows`.

    Attributes:
        table: how the axes of all rows are permuted.
        place: of the axis of rows.
        entries: the axis that stands in its place.
        index: what chooses; the same object, the same choices.
        by: "index", or "groups" if the index holds the ends of groups of entries.
    """

    table: Laid
    place: int
    entries: Axis
    index: Laid
    by: str = "index"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Its axes, if rows are not told apart."""
        return self.table.with_axis(self.place, self.entries).axes

    @property
    def parts(self) -> tuple[Laid, ...]:
        """The table."""
        return (self.table,)

    @property
    def touched(self) -> tuple[Axis, ...]:
        """Axes of the table, and of the entries."""
        return (*self.table.axes, self.entries)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return tuple(map(size_of, self.axes))


Value = Laid | Stacked | Chosen


def pinned(result: Any, reason: Reason) -> Any:
    """Values of results in which nothing is permuted."""
    if isinstance(result, Tensor):
        return Laid(tuple(fresh(int(size) if isinstance(size, int) else 0, reason) for size in result.shape))
    if isinstance(result, (list, tuple)):
        return [pinned(part, reason) for part in result]
    return result


def constant(number: Tensor, reason: Reason) -> Laid:
    """A tensor of known numbers: pinned along axes along which it varies."""
    return Laid(tuple(fresh(size, _varying(number, axis, reason)) for axis, size in enumerate(number.shape)), number)


def _varying(number: Tensor, axis: int, reason: Reason) -> Reason | None:
    if number.shape[axis] < 2 or not number.numel() or number.stride(axis) == 0:
        return None
    first = number.narrow(axis, 0, 1)
    return None if bool((number == first).all()) else reason


def flat(values: Any) -> list[Value]:
    """Every tensor value in nested lists and dicts."""
    if isinstance(values, Value):
        return [values]
    parts: Sequence[Any] = list(values.values()) if isinstance(values, dict) else values
    return [found for part in parts for found in flat(part)] if isinstance(parts, (list, tuple)) else []
