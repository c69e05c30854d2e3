"""ENorm in other training loops, and models in other forms. Each module needs the package it is named after.

Takes a trainer of another library. Gives callbacks that keep its weights balanced. Never imports cli; only that imports it.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equinorm.sharding.boxes import whole
from equinorm.training.enorm import ENorm


def whole_state(hook: ENorm) -> dict[str, Any]:
    """What `ENorm.state_dict` returns, its tensors put together where the model is sharded: every process calls this.

    Trainers let one process write what callbacks keep.
    """
    return pytree.tree_map(whole, hook.state_dict())


def example(args: Any, kwargs: Mapping[str, Any] | None, device: torch.device) -> tuple[tuple, dict[str, Any]]:
    """Example inputs on a device: positional ones, of which one may stand alone, and those by name."""
    args = () if args is None else tuple(args) if isinstance(args, (tuple, list)) else (args,)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, dict(kwargs or {})))


def check_options(of: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse names of options that a function does not have, before what keeps them calls it.

    Raises:
        TypeError: naming the first, and those that it takes.
    """
    parameters = inspect.signature(of).parameters
    known = [name for name, one in parameters.items() if one.default is not one.empty and name != "kwargs"]
    for name in options:
        if name not in known:
            raise TypeError(f"{of.__name__} takes no {name!r}. It takes {', '.join(known)}.")


def first_installed(names: Sequence[str], extra: str) -> Any:
    """Import the first of these modules whose package is installed.

    Args:
        names: modules that serve equally well, the preferred one first.
        extra: the extra of this project that installs one.

    Raises:
        ImportError: saying what to install.
    """
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
                raise  # it is installed, and something that it needs is missing
    packages = " or ".join(name.partition(".")[0] for name in names)
    raise ImportError(f"equinorm.integrations.{extra} needs {packages}: pip install 'equinorm[{extra}]'.")
