"""What the edges of a graph carry: labels, tensors of the model, views of them, and constants."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from equinorm.discovery.labels import Factor, Label


@dataclass(eq=False)
class Source:
    """A tensor of the model that the graph reads: a parameter or a floating-point buffer.

    Attributes:
        names: every dotted name under which the model holds it (several if tied).
        shape: its shape.
        kind: "parameter" or "buffer".
        label: how it scales; None until its first use.
        role: "weight", or "bias" if its first use adds it to an activation.
        depth: number of weights on the longest path from an input up to and with this one.
        offset: number that the network adds before it uses the tensor, as in gains written 1 + w, or 10 for 1 + 0.1·w; what
            scales is w + offset.
        is_squared: does the network take norms of it, whose squares leave the dtype before its entries do?
        is_scalable: is it a buffer that may scale as a parameter does, because its module says so?
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype
    label: Label | None = None
    role: str | None = None
    depth: int = 0
    offset: float = 0.0
    is_squared: bool = False
    is_scalable: bool = False

    @property
    def may_scale(self) -> bool:
        """Does its first use decide how it scales? If not, it is a buffer, and pinned unless a rule moves it."""
        return self.kind == "parameter" or self.is_scalable


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A value that no input and no weight can change."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return tuple(self.value.shape)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A parameter without a label, its axes in another order, times a number: what it needs is decided where it is used.

    Attributes:
        source: the parameter.
        order: its axis for each axis of the view; −1 for a new one of size 1. Axes of size 1 may be missing.
        factor: finite, not 0.
        is_itself: are its entries those of the parameter, but for the factor? False behind a function of degree 1, such as |w|,
            which scales as the parameter does but is another number.
    """

    source: Source
    order: tuple[int, ...]
    factor: float = 1.0
    is_itself: bool = True

    @staticmethod
    def through(value: "Source | View") -> "View":
        """What a function of degree 1 makes of each entry."""
        view = value if isinstance(value, View) else View(value, tuple(range(len(value.shape))))
        return replace(view, is_itself=False)

    @staticmethod
    def of(value: "Source | View", operation: Callable[[Tensor], Any]) -> "View | None":
        """What a data movement makes; None if it does more than to permute axes and to add or drop ones of size 1."""
        given = torch.empty(value.shape, device="meta")
        result = operation(given)
        if not isinstance(result, Tensor) or result._base is not given or result.numel() != given.numel() or 0 in value.shape:
            return None
        axes = {given.stride(axis): axis for axis, size in enumerate(value.shape) if size > 1}  # strides tell axes apart
        order = tuple(axes.get(result.stride(axis), -2) if size > 1 else -1 for axis, size in enumerate(result.shape))
        if any(axis == -2 or (axis >= 0 and result.size(i) != value.shape[axis]) for i, axis in enumerate(order)):
            return None
        if isinstance(value, Source):
            return View(value, order)
        return replace(value, order=tuple(value.order[axis] if axis >= 0 else -1 for axis in order))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return tuple(self.source.shape[axis] if axis >= 0 else 1 for axis in self.order)

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's."""
        return self.source.dtype

    @property
    def label(self) -> Label | None:
        """The parameter's label, seen from here."""
        label = self.source.label
        if label is None:
            return None
        kept = [axis for axis in self.order if axis >= 0]
        lost = [axis for axis in range(len(label.shape)) if axis not in kept]

        def seen(ids: Tensor) -> Tensor:
            sizes = iter([ids.size(axis) for axis in kept])
            return ids.permute(kept + lost).reshape([next(sizes) if axis >= 0 else 1 for axis in self.order])

        return Label(self.shape, tuple(Factor(factor.exponent, seen(factor.ids)) for factor in label.factors))

    def back(self, label: Label) -> Label:
        """The label of the parameter of which this one is seen here."""
        places = {axis: place for place, axis in enumerate(self.order) if axis >= 0}
        order = [places[axis] for axis in sorted(places)]
        rest = [place for place, axis in enumerate(self.order) if axis < 0]

        def turned(ids: Tensor) -> Tensor:
            sizes = [ids.size(places[axis]) if axis in places else 1 for axis in range(len(self.source.shape))]
            return ids.permute(order + rest).reshape(sizes)

        return Label(self.source.shape, tuple(Factor(factor.exponent, turned(factor.ids)) for factor in label.factors))


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Entries that are rows of a table, each chosen by an index that depends on data; see `selected_rows`.

    Attributes:
        value: the table's label, or the parameter itself before its first use.
        axis: of the choices.
        index: the value that chooses; the same object, the same choices.
        length: how many entries there are in place of the table's rows.
        by: "index", or "groups" if the index holds the ends of groups of entries.
    """

    value: "Label | Source | View"
    axis: int
    index: Any
    length: int
    by: str = "index"

    @property
    def options(self) -> int:
        """Rows to choose from."""
        return self.value.shape[self.axis]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return (*self.value.shape[: self.axis], self.length, *self.value.shape[self.axis + 1 :])


def source_of(value: object) -> Source | None:
    """The tensor of the model that this value shows, if it does."""
    while isinstance(value, (Chosen, View)):
        value = value.source if isinstance(value, View) else value.value
    return value if isinstance(value, Source) else None


def loses(given: torch.dtype, result: torch.dtype) -> bool:
    """Does a float of this dtype lose bits or range in the other?"""
    if not (given.is_floating_point or given.is_complex):
        return True
    before, after = torch.finfo(given), torch.finfo(result)
    return after.eps > before.eps or after.max < before.max


Value = Label | Source | View | Constant | Chosen
VALUES = (Label, Source, View, Constant, Chosen)
"""What the graph's edges carry; also plain Python values, and lists of these."""


def squared(value: Any) -> None:
    """Note that the network takes a norm of this, if it is a parameter or a view of one."""
    source = value.source if isinstance(value, View) else value
    if isinstance(source, Source):
        source.is_squared = True


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from: weights on the longest path from an input, or the parameters that alone determine it."""

    depth: int = 0
    parameters: frozenset[Source] | None = None
