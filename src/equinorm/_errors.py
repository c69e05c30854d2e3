"""Errors that name what was wrong, where, and what to do next."""

import contextlib
import inspect
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


def check_module(model: Any, kind: type[EquinormError] = EquinormError, what: str = "model") -> None:
    """Refuse what is no module, and say how to make one of it."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, Mapping):
        way = "A state dict holds weights without their network: make the network, call its load_state_dict."
    elif isinstance(model, torch.export.ExportedProgram):
        way = "Give its .module()."
    elif isinstance(getattr(model, "model", None), nn.Module):
        way = "Give its .model."
    elif isinstance(model, type):
        way = "That is a class: make one of it."
    elif isinstance(model, (str, os.PathLike)):
        way = "Load it first, as torch.load and from_pretrained do."
    else:
        way = "Wrap what it computes in a module's forward."
    raise kind(f"{what} must be a torch.nn.Module, not {type(model).__name__}. {way}")


def does_not_run(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, error: BaseException) -> str:
    """That a model does not run on inputs, what it says itself, and what to give instead."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "").rstrip(".!")
    said = f"{type(error).__name__}: {line}" if line else type(error).__name__
    inputs = describe_inputs(args, kwargs)
    return f"{describe(model)} does not run on inputs {inputs}: {said}. {_instead(model, args, kwargs or {})}"


def _instead(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """What to give to a model that does not run."""
    if not args and not kwargs:
        return "Give example inputs: (x,), or () and a dict of those that have names."
    if args and all(type(value) is int for value in args):
        return f"Give tensors, such as torch.randn({', '.join(map(str, args))}), not their shape."
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    held = [*model.parameters(), *model.buffers()]
    floats = [[tensor for tensor in tensors if tensor.is_floating_point()] for tensors in (held, given)]
    for kind, both in (
        ("device", [{tensor.device.type for tensor in tensors} for tensors in (held, given)]),
        ("dtype", [{dtype_name(tensor.dtype) for tensor in tensors} for tensors in floats]),
    ):
        if all(both) and not both[0] & both[1]:
            model_in, inputs_in = (" and ".join(sorted(names)) for names in both)
            return f"The model is in {model_in} and its inputs in {inputs_in}: bring both to one {kind}."
    try:
        names = [*inspect.signature(model.forward).parameters]
    except (TypeError, ValueError):  # some callables have none
        return "Give what model(*args, **kwargs) takes."
    shown = ", ".join([*names[:8], "…"] if len(names) > 8 else names)
    return f"It is called as model(*args, **kwargs), and its forward takes ({shown})."


def first_line(error: BaseException, silent: str = "") -> str:
    """First line of an error's text, without a full stop; of one that says nothing its class, or what is given for that."""
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    return next(lines, silent or type(error).__name__).rstrip(".")


def warn(text: str) -> None:
    """Warn at the line of the user's code that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
