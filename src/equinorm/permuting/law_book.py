"""The laws gathered so far, and the operation that is being looked at; what each law states, in the words of axes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from equinorm._scaling import Reason
from equinorm.permuting.atoms import Axis, fresh, pin, size_of, unify
from equinorm.permuting.own_orders import OwnOrder
from equinorm.permuting.values import Chosen, Laid, Value, flat


@dataclass(eq=False)
class LawBook:
    """Laws on axes.

    Attributes:
        reason: the operation that is being looked at.
        spaces: axes of every value, and of every sum of products before it is summed. What is permuted in one axis may depend
            on places in another only where both stand in each of these.
        own_orders: axes whose entries come in an order of the operation's own.
    """

    reason: Reason = field(default_factory=lambda: Reason("model"))
    spaces: list[tuple[Axis, ...]] = field(default_factory=list)
    own_orders: list[OwnOrder] = field(default_factory=list)

    def because(self, detail: str) -> Reason:
        """The operation, and the law that it breaks."""
        return replace(self.reason, detail=detail)

    def see(self, axes: Iterable[Axis]) -> None:
        """A value has these axes."""
        self.spaces.append(tuple(axes))

    def pin(self, values: Any, detail: str = "") -> None:
        """Nothing in these values is permuted."""
        for value in flat(values):
            pin(self.whole(value).touched, self.because(detail) if detail else self.reason)

    def pin_axis(self, axis: Axis, detail: str) -> None:
        """Nothing along this axis is permuted."""
        pin([axis], self.because(detail))

    def fixed(self, size: int, detail: str = "tells positions apart") -> Axis:
        """A new axis along which nothing is permuted."""
        return fresh(int(size), self.because(detail))

    def all_fixed(self, shape: Iterable[int]) -> Laid:
        """A new value in which nothing is permuted."""
        return Laid(tuple(map(self.fixed, shape)))

    def names(self, axes: Sequence[Axis], named: Axis) -> Laid:
        """Whole numbers that are places along an axis, whose order then is the same at all places of others."""
        self.see((named,))
        return Laid(tuple(axes), names=named)

    def named(self, axis: Axis, index: Laid) -> Axis:
        """An axis at whose places an index chooses, permuted as the one that the index names."""
        names = () if index.names is None else index.names
        if size_of(axis) != size_of(names):
            pin((axis, names), self.because("an index of other places tells its entries apart"))
            return axis
        self.see((axis,))
        return self.same(axis, names)

    def own_order(self, axes: Sequence[Axis], place: int, size: int) -> Axis:
        """A new axis of entries that an operation chose along an old one, and returns as it likes, otherwise in each row."""
        new = fresh(size)
        rows = tuple(axis for at, axis in enumerate(axes) if at != place)
        self.own_orders.append(OwnOrder(new, rows, axes[place], self.because("returns entries in an order of its own")))
        return new

    def free(self, size: int) -> Axis:
        """A new axis along which nothing varies, so that any permutation of it changes nothing."""
        return fresh(int(size))

    def same(self, one: Axis, other: Axis) -> Axis:
        """Axes that meet are permuted alike; one of size 1 is broadcast."""
        if size_of(one) == 1 or size_of(other) == 1:
            return other if size_of(one) == 1 else one
        unify(one, other, self.because("parts of its axes do not fit"))
        return one

    def join(self, *values: Laid) -> tuple[Axis, ...]:
        """Axes of what is computed entry by entry from values that broadcast."""
        rank = max(len(value.axes) for value in values)
        found: list[Axis] = [()] * rank
        for value in values:
            for place, axis in enumerate(value.axes, rank - len(value.axes)):
                found[place] = self.same(found[place], axis)
        return tuple(found)

    def mixes(self, axes: Sequence[Axis], mixed: Iterable[int]) -> None:
        """Entries along some axes are mixed: what is permuted in the others must not depend on places in these."""
        mixed = {place % len(axes) for place in mixed} if axes else set()
        self.see(axis for place, axis in enumerate(axes) if place not in mixed)

    def whole(self, value: Value) -> Laid:
        """A stack, or chosen rows, as one value: all parts and all rows are permuted alike."""
        if isinstance(value, Laid):
            return value
        if isinstance(value, Chosen):
            self.mixes(value.table.axes, [value.place])
            return Laid(value.axes)
        axes = self.join(*value.parts)
        new = self.fixed(len(value.parts), "a stack that is not taken apart again")
        return Laid((*axes[: value.dim], new, *axes[value.dim :]))
