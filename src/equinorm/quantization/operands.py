"""Operands: what sums of two activations read, where a quantizer rounds that too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from equinorm._errors import EqualizeError, describe
from equinorm._modules import by_default, undisturbed, without_cache
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.discovery.inner_values import InnerValue
from equinorm.quantization.calls import Calls, Sum
from equinorm.quantization.outputs import Output
from equinorm.quantization.points import Point
from equinorm.quantization.scheme import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """One of the two activations that a sum adds.

    Attributes:
        module: name of the module that adds.
        number: of sums before it.
        place: 0 or 1.
        axis: of its channels, from the end.
        scheme: how it is rounded.
        scaling: of its channels: a `Scaling` of shape (channels, 1, …).
    """

    module: str
    number: int
    place: int
    axis: int
    scheme: Scheme
    scaling: Scaling

    @property
    def name(self) -> str:
        """The sum's number and module, and which operand."""
        where = f" in {self.module}" if self.module else ""
        return f"sum {self.number + 1}{where} (operand {self.place + 1})"

    @property
    def key(self) -> tuple[str, int]:
        """What identifies it."""
        return f"+{self.number}", self.place


Place = Point | Operand | Output
"""Where a quantizer rounds."""


def find_operands(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, scheme: Scheme, symmetries: Symmetries
) -> tuple[Operand, ...]:
    """Operands of all sums of two activations that the scheme rounds: none if it does not ask for them.

    Sums are matched with those of the exported graph in their order, by their shapes.

    Raises:
        EqualizeError: if they cannot be.
    """
    if not any(one.sums for one in scheme.all()):
        return ()
    seen: list[tuple[tuple[int, ...], ...]] = []

    def note(added: Sum) -> Any:
        seen.append(tuple(tuple(value.shape) for value in added.operands))
        return added.run(*added.operands)

    with undisturbed(model), by_default(), Calls(model, lambda call: call.run(), note):
        model(*args, **without_cache(model, args, dict(kwargs or {})))
    values = symmetries.values
    sums = [(value, pair) for value in values if (pair := _pair(value, symmetries)) is not None]
    if [tuple(one.shape for one in pair) for _, pair in sums] != seen:
        raise EqualizeError(
            f"{describe(model)} adds activations {len(seen)} times as it runs and {len(sums)} times as exported, or in another "
            "order, so that it is not known how they scale: leave sums=True out of the scheme."
        )
    found = []
    for number, (value, pair) in enumerate(sums):
        rounded = scheme.within(value.module)
        if rounded is not None and rounded.sums and rounded.activation_bits is not None:
            found += [Operand(value.module, number, place, *_channels(one, rounded)) for place, one in enumerate(pair)]
    return tuple(found)


def _pair(value: InnerValue, symmetries: Symmetries) -> tuple[InnerValue, InnerValue] | None:
    """Both activations that a value is the sum of, if it is."""
    if value.operator not in ("aten.add", "aten.add_") or len(value.reads) != 2:
        return None
    first, second = (symmetries.values[name] for name in value.reads.values())
    is_constant = any(one.operator in ("buffer", "constant") or one.parameters or len(one.shape) < 2 for one in (first, second))
    return None if is_constant or not first.dtype.is_floating_point else (first, second)


def _channels(value: InnerValue, scheme: Scheme) -> tuple[int, Scheme, Scaling]:
    """Axis along which a value scales, from the end, the scheme, and how it does; the second axis if it is pinned."""
    scaling, rank = value.scaling, len(value.shape)
    axes = {axis for _, ids in (scaling.factors if scaling else ()) for axis in range(ids.dim()) if ids.shape[axis] > 1} or {1}
    if scaling is None or len(axes) > 1:
        raise EqualizeError(
            f"{value.name}, which a sum reads, does not scale along one axis alone: leave sums=True out of the scheme, or the "
            f"module {value.module!r} with in_float."
        )
    (axis,) = axes
    along = tuple((exponent, ids.movedim(axis, 0).reshape(ids.shape[axis], -1).amax(1)) for exponent, ids in scaling.factors)
    shape = (value.shape[axis],)
    return axis - rank, scheme, Scaling((value.name,), shape, value.dtype, "value", "value", value.depth, along)
