"""Errors that name what was wrong, where, and what to do next."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class EquinormError(Exception):
    """Base of every error that this library raises on purpose."""


class ExportError(EquinormError):
    """`torch.export` could not turn the model into a graph."""

    @classmethod
    def of(cls, model: nn.Module, args: tuple, kwargs: Mapping[str, Any], error: Exception) -> "ExportError":
        """Restate the call and the exporter's first line."""
        text = str(error).strip()
        first = next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), "no message")
        if "data-dependent" in first:
            first = "the model branches on the value of a tensor"
        frame = re.search(r'File "([^"]*)", line (\d+), in \w+\n +(?:\(.*\) )?(\S[^\n]*)', text)
        where = f" at {frame.group(1).rsplit('/', 1)[-1]}:{frame.group(2)} `{frame.group(3)}`" if frame else ""
        operator = re.search(r"(?:aten|prims|torchvision|torch\.ops)[.:\w]+", text)
        blamed = f" The operation is {operator.group()}." if operator else ""
        return cls(
            f"cannot export {describe(model)} with inputs {describe_inputs(args, kwargs)}: "
            f"{type(error).__name__}: {first}{where}.{blamed} "
            "Check first that model(*args, **kwargs) runs with these inputs. If it does, the model has control flow on "
            "data or an operation that torch.export cannot record: pass the submodule without it, or rewrite that line. "
            "The exporter's full report is the cause of this error."
        )


class RescaleError(EquinormError):
    """A rescaling was refused; nothing was written."""


class BalanceError(EquinormError):
    """The weights cannot be balanced as asked; nothing was written."""


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
