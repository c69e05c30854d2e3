"""Errors that name what was wrong, where, and what to do next."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class EquinormError(Exception):
    """Base of every error that this library raises on purpose."""


class ExportError(EquinormError):
    """`torch.export` could not turn the model into a graph.

    Attributes:
        cause: what the exporter, or the model itself, raised; with the exporter's full report. None for other refusals.
    """

    cause: Exception | None = None


class RescaleError(EquinormError):
    """A rescaling was refused; nothing was written."""


class BalanceError(EquinormError):
    """The weights cannot be balanced as asked; nothing was written."""


class EqualizeError(EquinormError):
    """A network cannot be prepared for quantization, or its scales not be chosen, as asked; nothing was written."""


class EquivalenceError(EquinormError):
    """Two models cannot be compared."""


def describe(model: nn.Module) -> str:
    """Class name of a model."""
    return type(model).__name__


def describe_inputs(args: tuple, kwargs: Mapping[str, Any] | None = None) -> str:
    """Shapes and dtypes of a call's inputs."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
        return type(value).__name__

    parts = [one(value) for value in args] + [f"{name}={one(value)}" for name, value in (kwargs or {}).items()]
    return f"({', '.join(parts)})"


def percent(part: float, whole: float) -> str:
    """A share in percent with one decimal; what is not all, or not nothing, does not read so."""
    share = part / whole if whole else 0.0
    if 0 < abs(share) < 5e-4:
        return "< 0.1%" if share > 0 else "> -0.1%"
    if 0.9995 <= share < 1:
        return "> 99.9%"
    return f"{share:.1%}"
