"""Reading what the command line names: models, their weights and inputs. Everything here only reads."""

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from equinorm._errors import EquinormError

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Suffixes of weight files."""

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<dtype>[a-z]+\d*):)?(?P<sizes>\d+(?:x\d+)*|scalar)")
_SHOWN = 8


class InputError(EquinormError):
    """What the user named cannot be read or does not fit together."""


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model that is ready to run.

    Attributes:
        name: as the user wrote it.
        model: the module, with its weights.
        args: positional inputs.
        kwargs: keyword inputs.
    """

    name: str
    model: nn.Module = field(repr=False)
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


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
    if weights is not None:
        load_weights(model, weights)
    if inputs:
        args, kwargs = read_inputs(inputs, _floating(model))
    elif needs_inputs and not args and not kwargs:
        example = "--input 1x3x224x224" if not name.endswith(".pt2") else "--input with the shapes it was exported with"
        raise InputError(f"{name} needs inputs to run with. Give their shapes or a file, for example {example}.")
    return Loaded(name, model, args, kwargs)


def _exported(path: Path) -> tuple[nn.Module, tuple, Mapping[str, Any]]:
    _readable(path)
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
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            hint = " Leave out the .py and write dots instead of slashes." if "/" in name or ".py:" in name else ""
            raise InputError(
                f"there is no module {missing!r} to import {name} from. "
                f"It is looked for in {here} and among the installed packages.{hint}"
            ) from error
        raise InputError(f"importing {module_name} needs the module {missing!r}, which is not installed.") from error
    except Exception as error:
        raise InputError(f"importing {module_name} raised {type(error).__name__}: {first_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise InputError(f"{module_name} has no {attribute!r}. It has {shorten(public)}.")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}, neither a torch.nn.Module nor a factory of one.")
    try:
        model = found()
    except Exception as error:
        raise InputError(
            f"{name}() raised {type(error).__name__}: {first_line(error)}. "
            "A factory is called without arguments: wrap it in a function that has none."
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


# ---------------------------------------------------------------------------------------------------------------- weights


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a weight file into a model; every key must match. Of tied tensors one name suffices.

    Raises:
        InputError: with the keys that are missing, unexpected or of another shape, or that hold NaN or inf.
    """
    state = _tensors(path)
    own = model.state_dict()
    present = {_memory(own[key]) for key in own.keys() & state.keys()}
    missing = [key for key in own if key not in state and not _is_counter(key) and _memory(own[key]) not in present]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} (file {_shape(state[key])}, model {_shape(own[key])})"
        for key in own
        if isinstance(own[key], Tensor) and key in state and state[key].shape != own[key].shape
    ]
    parts = [("missing in the file", missing), ("unexpected in the file", unexpected), ("of another shape", shapes)]
    if any(keys for _, keys in parts):
        listed = "; ".join(f"{len(keys)} {what}: {shorten(keys)}" for what, keys in parts if keys)
        hint = ""
        if unexpected and all(key.startswith("module.") for key in unexpected):
            hint = " The file was saved from a DataParallel wrapper: strip the leading 'module.' from its keys."
        raise InputError(f"{path} does not match the model. Keys {listed}.{hint}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    bad = [key for key, value in state.items() if key in parameters and not bool(value.isfinite().all())]
    if bad:
        raise InputError(f"{path} holds NaN or inf in {shorten(bad)}. Such weights cannot be balanced or compared.")
    model.load_state_dict(state, strict=False)


def _tensors(path: Path) -> dict[str, Tensor]:
    _readable(path)
    if path.suffix not in WEIGHTS:
        raise InputError(f"{path}: unknown suffix {path.suffix!r} for weights. Known are {', '.join(WEIGHTS)}.")
    try:
        state: Any = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except Exception as error:
        raise InputError(
            f"cannot read weights from {path}: {type(error).__name__}. It must be a .safetensors file, or a state dict "
            "saved by torch.save(model.state_dict(), path): no code in files is run."
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, dict) else ["it"]
    if odd:
        raise InputError(f"{path} holds no state dict: {shorten(odd)} is no tensor. Save model.state_dict().")
    return state


def _unpickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_counter(key: str) -> bool:
    """Batch normalization's step counter, which PyTorch itself fills in."""
    return key.rpartition(".")[2] == "num_batches_tracked"


def _memory(value: Any) -> Any:
    return (
        (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
        if isinstance(value, Tensor)
        else id(value)
    )


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
            example = _example(sizes, _dtype(match["dtype"], text) if match["dtype"] else floating, generator)
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
        _readable(path)
        try:
            value = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
        except Exception as error:
            raise InputError(f"cannot read inputs from {path}: {first_line(error)}") from error
        if isinstance(value, dict) and path.suffix == ".safetensors" and len(value) == 1:
            value = next(iter(value.values()))
        if isinstance(value, dict):
            kwargs |= value
        elif isinstance(value, (list, tuple)):
            args += value
        else:
            args.append(value)
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


# ------------------------------------------------------------------------------------------------------------------- words


def _readable(path: Path) -> None:
    if not path.exists():
        raise InputError(f"there is no file {path}.")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file.")


def shorten(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "") if names else "none"


def first_line(error: BaseException) -> str:
    """First line of an error's text, without a full stop."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
