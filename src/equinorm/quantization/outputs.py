"""Outputs: what layers put out, where a quantizer rounds that before something else than a layer reads it."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.quantization.calls import OPERATORS, Key
from equinorm.quantization.clamp import Clamp
from equinorm.quantization.points import Point, axes_apart, scaling_of_channels
from equinorm.quantization.scheme import Scheme

RECTIFIERS = {"aten.relu", "aten.relu_"}
CLAMPS = {f"aten.{name}{ending}" for name in ("hardtanh", "clamp", "relu6") for ending in ("", "_")}
"""Operations that quantizers fuse with the layer in front (clamps not all of them): only what they make is rounded."""

BY_CHANNEL = {"aten.minimum", "aten.maximum"}
BOUNDS = CLAMPS | BY_CHANNEL
"""What clamps are in graphs."""

MOVERS = {
    *(f"aten.max_pool{axes}d" for axes in (1, 2, 3)),
    *(f"aten.{name}" for name in ("view", "reshape", "flatten", "permute", "transpose", "contiguous")),
}
"""Operations that change no number: what they read and what they make is rounded alike."""


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What one call of a linear layer or convolution returns.

    Attributes:
        point: the call.
        scaling: of its channels, as `scaling_of_channels` tells it.
        is_rectified: does only a fused ReLU read it? Then what the ReLU leaves is rounded.
        bounds: names of the bounds of a `Clamp` that reads it. Where those of all channels are equal they are fused with the
            layer, so that nothing is rounded twice; else only a ReLU and the largest upper bound behind it are.
    """

    point: Point
    scaling: Scaling
    is_rectified: bool
    bounds: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """That of the call."""
        return f"output of {self.point.name}"

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which it is told apart."""
        return axes_apart(self.scaling, self.point.spatial)

    @property
    def scheme(self) -> Scheme:
        """How it is rounded."""
        return self.point.scheme

    @property
    def key(self) -> Key:
        """What identifies it."""
        return output_key(self.point.weight, self.point.number)

    def fused(self, returned: Tensor) -> Tensor:
        """What is rounded, of what the call returns."""
        return returned.relu() if self.is_rectified else returned


def output_key(weight: str, number: int) -> Key:
    """What identifies the output of a call."""
    return f"{weight}→", number


def find_outputs(points: Sequence[Point], symmetries: Symmetries) -> tuple[Output, ...]:
    """Outputs of points that their schemes round and that are not rounded anyway, as inputs of layers and sums are."""
    found = []
    for point in points:
        if not point.scheme.outputs or point.scheme.activation_bits is None:
            continue
        value = symmetries.values[point.made]
        rectified = _only_reader(value, symmetries.values, RECTIFIERS)
        bounds = _freed(value, symmetries) if point.scheme.fused_clamps else ()
        if bounds or not _is_rounded_later(value, symmetries.values, point.scheme):
            found.append(Output(point, scaling_of_channels(value, point.spatial), rectified is not None, bounds))
    return tuple(found)


def _only_reader(value: InnerValue, values: InnerValues, operators: Container[str]) -> InnerValue | None:
    """The one operation that reads a value, if it is one of these."""
    readers = values.readers(value.name)
    is_one = len(readers) == 1 and not value.is_returned and readers[0].operator in operators
    return readers[0] if is_one else None


def _freed(value: InnerValue, symmetries: Symmetries) -> tuple[str, ...]:
    """Names of the bounds of a `Clamp` that alone reads a value."""
    found: list[str] = []
    values = symmetries.values
    reader = _only_reader(value, values, RECTIFIERS | BY_CHANNEL)
    while reader is not None:
        tensors = (values[name].tensor for name in reader.reads.values())
        found += [name for name in tensors if _is_bound(name, symmetries.model)]
        reader = _only_reader(reader, values, BY_CHANNEL)
    return tuple(found)


def _is_bound(name: str, model: nn.Module) -> bool:
    """Is a tensor a bound of a `Clamp`, or of what stands for one in an ONNX file: a module that holds tensors alone?"""
    path, _, key = name.rpartition(".")
    return key in Clamp.scalable_buffers and type(model.get_submodule(path)).forward in (Clamp.forward, nn.Module.forward)


def _is_rounded_later(value: InnerValue, values: InnerValues, scheme: Scheme) -> bool:
    """Do only operations read it that quantizers fuse, or whose inputs they round in any case?"""
    fused = OPERATORS | (RECTIFIERS | CLAMPS if scheme.fused_clamps else set())
    fused |= {"aten.add", "aten.add_"} if scheme.sums else set()

    apart = BY_CHANNEL if scheme.fused_clamps else BOUNDS

    def is_rounded(reader: InnerValue) -> bool:
        if reader.operator in RECTIFIERS:
            return not any(bound.operator in apart for bound in values.readers(reader.name))
        return reader.operator in fused or (reader.operator in MOVERS and _is_rounded_later(reader, values, scheme))

    return not value.is_returned and all(map(is_rounded, values.readers(value.name)))
