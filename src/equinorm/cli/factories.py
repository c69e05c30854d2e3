"""Models that the user's own code makes: package.module:factory."""

import ast
import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equinorm._errors import first_line
from equinorm.cli.weights import InputError, shorten


def settings_of(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments from texts such as ``width=64``: values are Python literals, and text where they are none.

    Raises:
        InputError: for a text without a name, or a name that is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--set {text}: write an argument's name and value, such as width=64.")
        if name in found:
            raise InputError(f"--set {name} is given twice.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found[name] = value
    return found


def parted(name: str) -> tuple[str, str]:
    """Module and factory of ``package.module:factory``.

    Raises:
        InputError: if it is not written so.
    """
    module_name, _, attribute = name.partition(":")
    if module_name and attribute:
        return module_name, attribute
    way = "Write package.module:factory, timm:NAME, a checkpoint's FOLDER, or name an .onnx or an exported .pt2 file."
    if name.endswith((".safetensors", ".pt", ".pth", ".bin", ".ckpt")):
        way = "Weights are given with --weights, beside the network that they belong to: package.module:factory, say."
    what = "is no model" if ":" in name or Path(name).exists() else "is no model, and there is no folder of this name"
    raise InputError(f"{name!r} {what}. {way}")


def built(name: str, settings: Mapping[str, Any], device: str) -> nn.Module:
    """The module that a factory returns, or that a Python module holds.

    Args:
        name: ``package.module:factory``.
        settings: arguments of the factory.
        device: "meta" to build it without allocating anything.

    Raises:
        InputError: if it cannot be imported or called, or returns something else.
    """
    found = _imported(name)
    if isinstance(found, nn.Module):
        if settings or device == "meta":
            option = "--set" if settings else "--device meta"
            raise InputError(f"{name} is one module, made when it was imported. Leave out {option}, or name a factory.")
        return found
    if not callable(found):
        raise InputError(f"{name} is neither a torch.nn.Module nor a factory of one, but of type {type(found).__name__}.")
    _check_arguments(name, found, settings)
    try:
        with torch.device("meta") if device == "meta" else contextlib.nullcontext():
            model = found(**settings)
    except (Exception, SystemExit) as error:
        raise InputError(f"{name}() raised {_raised(error)}.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() returned no torch.nn.Module, but a value of type {type(model).__name__}.")
    if device == "meta" and (held := [key for key, tensor in model.named_parameters() if not tensor.is_meta]):
        raise InputError(
            f"{name}() builds weights elsewhere than on the device asked for: {shorten(held)}. Leave out --device."
        )
    return model


def _imported(name: str) -> Any:
    """What the name says, from a module in the current folder or an installed one."""
    module_name, attribute = parted(name)
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
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
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(module) if callable(vars(module)[key]) and not key.startswith("_")]
            raise InputError(f"{module_name} has no {attribute!r}. It has {shorten(public)}.")
        found = getattr(found, part)
    return found


def _check_arguments(name: str, factory: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Refuse arguments that a factory does not take, and a call without those that it must have."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (ValueError, TypeError):  # Python cannot tell
        return
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [key for key in settings if key not in named]
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        raise InputError(f"{name} takes no argument {unknown[0]!r}. It takes {shorten(named)}.")
    free = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed := [p.name for p in free if p.name not in settings]:
        raise InputError(
            f"{name} takes arguments ({', '.join(needed)}) that are not given. "
            f"Say --set {needed[0]}=…, or wrap it in a function that has none."
        )


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
