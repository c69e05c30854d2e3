"""Reading what the command line names: models, their weights and inputs. Everything here only reads."""

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.cli.weights import InputError, first_line, first_sentence, load_weights, read, readable, shorten

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<dtype>[a-z]+\d*):)?(?P<sizes>\d+(?:x\d+)*|scalar)")


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model that is ready to run.

    Attributes:
        name: as the user wrote it.
        model: the module, with its weights.
        args: positional inputs.
        kwargs: keyword inputs.
        notes: what was done to make model and weights fit, for the user to know.
    """

    name: str
    model: nn.Module = field(repr=False)
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load(name: str, weights: Path | None, inputs: Sequence[str], train: bool | None, needs_inputs: bool = True) -> Loaded:
    """Load a model with its weights and inputs.

    Args:
        name: ``package.module:factory`` or a ``.pt2`` file.
        weights: file to load into it.
        inputs: shapes or files, see `read_inputs`; none for the example inputs of a ``.pt2`` file.
        train: training or evaluation mode; None for evaluation, or for the mode in which a ``.pt2`` file was exported.
        needs_inputs: refuse a model without inputs.

    Raises:
        InputError: for whatever cannot be found, read or matched.
    """
    args: tuple = ()
    kwargs: Mapping[str, Any] = {}
    if name.endswith(".pt2"):
        if train is not None:
            raise InputError(f"{name} was exported in one mode, which cannot change. Leave out --train and --eval.")
        model, args, kwargs = _exported(Path(name))
    else:
        model = _factory(name)
        model.train(bool(train))
    notes = load_weights(model, weights) if weights is not None else ()
    if inputs:
        args, kwargs = read_inputs(inputs, _floating(model))
    elif needs_inputs and not args and not kwargs:
        example = "--input 1x3x224x224" if not name.endswith(".pt2") else "--input with the shapes it was exported with"
        raise InputError(f"{name} needs inputs to run with. Give their shapes or a file, for example {example}.")
    return Loaded(name, model, args, kwargs, notes)


def _exported(path: Path) -> tuple[nn.Module, tuple, Mapping[str, Any]]:
    readable(path)
    try:
        program = torch.export.load(path)
        model = program.module()
    except Exception as error:
        raise InputError(
            f"cannot read {path} as an exported program: {first_line(error)}. "
            "Write it with torch.export.save, by this version of PyTorch."
        ) from error
    args, kwargs = program.example_inputs or ((), {})
    return model, tuple(args), dict(kwargs)


def _factory(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{name!r} is no model. Write package.module:factory, or name an exported .pt2 file.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        module = found
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            hint = " Leave out the .py and write dots instead of slashes." if "/" in name or ".py:" in name else ""
            raise InputError(
                f"there is no module {missing!r} to import {name} from. "
                f"It is looked for in {here} and among the installed packages.{hint}"
            ) from error
        raise InputError(f"importing {module_name} needs the module {missing!r}, which is not installed.") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"importing {module_name} raised {_raised(error)}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(module) if callable(vars(module)[key]) and not key.startswith("_")]
            raise InputError(f"{module_name} has no {attribute!r}. It has {shorten(public)}.")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"{name} is neither a torch.nn.Module nor a factory of one, but of type {type(found).__name__}.")
    if needed := _needed(found):
        raise InputError(
            f"{name} takes arguments ({', '.join(needed)}), and a factory is called without any. "
            "Wrap it in a function that has none."
        )
    try:
        model = found()
    except (Exception, SystemExit) as error:
        raise InputError(f"{name}() raised {_raised(error)}.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() returned no torch.nn.Module, but a value of type {type(model).__name__}.")
    return model


def _needed(factory: Callable[..., Any]) -> list[str]:
    """Arguments that a call must have; none where Python cannot tell."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (ValueError, TypeError):
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _raised(error: BaseException) -> str:
    """An error of the user's own code, and the line of it that was last reached."""
    if isinstance(error, SystemExit):
        return f"SystemExit: it ends the program (code {error.code}). Keep what a script does below if __name__ == '__main__'"
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if not _foreign(frame.filename)] or [f for f in frames if not f.filename.startswith("<")]
    said = isinstance(error, SyntaxError) or not own  # a syntax error names its line itself
    where = "" if said else f", at {os.path.basename(own[-1].filename)}:{own[-1].lineno} `{own[-1].line}`"
    return f"{type(error).__name__}: {first_line(error)}{where}"


def _foreign(file: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    return "site-packages" in file or file.startswith(("<", os.path.dirname(os.__file__), os.path.dirname(__file__)))


# ----------------------------------------------------------------------------------------------------------------- inputs


def read_inputs(inputs: Sequence[str], floating: torch.dtype) -> tuple[tuple, dict[str, Any]]:
    """Inputs from shapes such as ``1x3x224x224``, ``int64:1x16`` or, by keyword, ``mask=bool:1x16``; or from files.

    Floating-point inputs are drawn from a standard normal distribution with seed 0; integers are zeros, booleans true. A
    file holds one tensor, a list of them (positional) or a mapping from names to tensors (keyword inputs).

    Raises:
        InputError: if one cannot be read.
    """
    generator = torch.Generator().manual_seed(0)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in inputs:
        if (match := _SHAPE.fullmatch(text)) is not None:
            sizes = [] if match["sizes"] == "scalar" else [int(size) for size in match["sizes"].split("x")]
            dtype = _dtype(match["dtype"], text) if match["dtype"] else floating
            try:
                example = _example(sizes, dtype, generator)
            except (RuntimeError, OverflowError) as error:
                raise InputError(
                    f"cannot make the input {text!r}: {first_sentence(error)}. Write another shape, or name a file."
                ) from error
            if match["name"]:
                kwargs[match["name"]] = example
            else:
                args.append(example)
            continue
        path = Path(text)
        if path.suffix not in (".pt", ".pth", ".safetensors"):
            raise InputError(
                f"{text!r} is no input. Write a shape such as 1x3x224x224 or int64:1x16, or name a .pt or .safetensors file."
            )
        value = read(path, "inputs", "It must hold a tensor, a list of tensors, or a dict of tensors by keyword.")
        if isinstance(value, dict) and path.suffix == ".safetensors" and len(value) == 1:
            value = next(iter(value.values()))
        values = value if isinstance(value, (list, tuple, dict)) else [value]
        named = values if isinstance(values, dict) else dict(enumerate(values))
        odd = [key for key, part in named.items() if isinstance(part, str) or isinstance(key, str) != isinstance(values, dict)]
        if odd:
            raise InputError(f"{path} holds inputs that no model takes: {shorten([repr(key) for key in odd])}. Write tensors.")
        if isinstance(values, dict):
            kwargs |= values
        else:
            args += values
    return tuple(args), kwargs


def _example(sizes: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    return torch.ones(sizes, dtype=dtype) if dtype == torch.bool else torch.zeros(sizes, dtype=dtype)


def _dtype(name: str, text: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"unknown dtype {name!r} in input {text!r}. Use for example float32, float64, int64 or bool.")
    return dtype


def _floating(model: nn.Module) -> torch.dtype:
    """The model's own dtype: that of its first floating-point tensor."""
    tensors = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
