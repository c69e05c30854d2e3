"""Outputs: what layers put out, where a quantizer rounds that before something else than a layer reads it."""

from collections.abc import Sequence
from dataclasses import dataclass

from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.quantization.calls import OPERATORS
from equinorm.quantization.points import Point, scaling_of_channels
from equinorm.quantization.scheme import Scheme

RECTIFIERS = {f"aten.{name}{ending}" for name in ("relu", "hardtanh", "clamp", "relu6") for ending in ("", "_")}
"""Operations that quantizers fuse with the layer in front: what they make is rounded, and again where it is read."""

MOVERS = {
    *(f"aten.max_pool{axes}d" for axes in (1, 2, 3)),
    *(f"aten.{name}" for name in ("view", "reshape", "flatten", "permute", "transpose", "contiguous")),
}
"""Operations that change no number: what they read and what they make is rounded alike."""


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What one call of a linear layer or convolution returns.

    Attributes:
        module: name of the module that holds the weight.
        weight: name of the weight.
        number: of calls with this weight before it.
        scheme: how it is rounded.
        scaling: of its channels: a `Scaling` of shape (channels, 1, …).
    """

    module: str
    weight: str
    number: int
    scheme: Scheme
    scaling: Scaling

    @property
    def name(self) -> str:
        """The module's name, and which of its calls where it is called again."""
        return f"output of {self.module or self.weight}" + (f" (call {self.number + 1})" if self.number else "")

    @property
    def key(self) -> tuple[str, int]:
        """What identifies it."""
        return output_key(self.weight, self.number)


def output_key(weight: str, number: int) -> tuple[str, int]:
    """What identifies the output of a call."""
    return f"{weight}→", number


def find_outputs(points: Sequence[Point], symmetries: Symmetries) -> tuple[Output, ...]:
    """Outputs of points that their schemes round and that are not rounded anyway, as inputs of layers and sums are."""
    found = []
    for point in points:
        if not point.scheme.outputs or point.scheme.activation_bits is None:
            continue
        value = symmetries.values[point.made]
        if not _is_rounded_later(value, symmetries.values, point.scheme):
            scaling = scaling_of_channels(value, len(point.scaling.shape) - 1)
            found.append(Output(point.module, point.weight, point.number, point.scheme, scaling))
    return tuple(found)


def _is_rounded_later(value: InnerValue, values: InnerValues, scheme: Scheme) -> bool:
    """Do only operations read it that quantizers fuse, or whose inputs they round in any case?"""
    fused = RECTIFIERS | OPERATORS | ({"aten.add", "aten.add_"} if scheme.sums else set())
    return not value.is_returned and all(
        reader.operator in fused or (reader.operator in MOVERS and _is_rounded_later(reader, values, scheme))
        for reader in values.readers(value.name)
    )
