"""Errors that name what was wrong, where, and what to do next."""

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_INSIDE = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, contextlib.__file__)
"""Where code is not the user's: calls come through decorators, and through hooks of optimizers."""


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


class PermutationError(EquinormError):
    """A permutation was refused; nothing was written."""


class EquivalenceError(EquinormError):
    """Two models cannot be compared."""


def describe(model: nn.Module) -> str:
    """Class name of a model."""
    return type(model).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """Such as float32."""
    return str(dtype).removeprefix("torch.")


def describe_inputs(args: tuple, kwargs: Mapping[str, Any] | None = None) -> str:
    """Shapes and dtypes of a call's inputs."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]"
        return type(value).__name__

    parts = [one(value) for value in args] + [f"{name}={one(value)}" for name, value in (kwargs or {}).items()]
    return f"({', '.join(parts)})"


def warn(text: str) -> None:
    """Warn at the line of the user's code that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
