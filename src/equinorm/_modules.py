"""A model and its modules: what wraps it, which of them the user names, in which mode and by which default device they run."""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from equinorm._errors import EquinormError

Choice = str | nn.Module | Sequence[str | nn.Module]
"""Modules of a model: a name or a module, or several."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside of torch.compile, DistributedDataParallel, DataParallel and AveragedModel."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # importing OptimizedModule takes seconds
            model = inner
        else:
            return model


def only_looks(hook: Any) -> bool:
    """Is this a hook of a library that changes nothing and shows nothing to users that the model does not return?

    Those of torch.nn.utils (weight norm, pruning) prepare a module's own parameters; transformers records outputs that it was
    asked to return.
    """
    kind = getattr(type(hook), "__module__", "") or ""
    return kind.startswith("torch.nn.utils") or getattr(hook, "__module__", "") in _RECORDERS


_RECORDERS = ("transformers.utils.output_capturing", "transformers.utils.generic")


def recomputed(module: nn.Module) -> list[str]:
    """Plain attributes that torch.nn.utils (weight norm, spectral norm, pruning) computes anew before every call."""
    own = dict(module.named_parameters(recurse=False))
    return [name for name in vars(module) if f"{name}_v" in own or f"{name}_orig" in own]


def without_cache(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs with use_cache=False, where a model of transformers would return a cache that nobody has asked for.

    Keys and values that later calls reuse scale as those of one call do.
    """
    bases = (str(kind.__module__) for kind in type(model).__mro__)
    if not any(name.startswith("transformers.") for name in bases):
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    given = {*kwargs, *names[: len(args)]}
    return kwargs if "use_cache" not in names or given & {"use_cache", "past_key_values"} else {**kwargs, "use_cache": False}


_default = threading.local()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Make tensors of our own on the CPU, whatever `torch.set_default_device` says. Also a decorator."""
    device = torch.get_default_device()
    if device.type == "cpu":
        yield
        return
    before, _default.device = getattr(_default, "device", None), device
    try:
        with torch.device("cpu"):
            yield
    finally:
        _default.device = before


@contextlib.contextmanager
def by_default() -> Iterator[None]:
    """Within `on_cpu`: the default device that the user's code expects."""
    device = getattr(_default, "device", None)
    with contextlib.nullcontext() if device is None else device:
        yield


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Put every module into training or evaluation mode, and back; None: leave them as they are."""
    before = [(module, module.training) for module in model.modules()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextlib.contextmanager
def own_backward() -> Iterator[dict[str, None]]:
    """Names of the autograd functions, torch's own aside, that are called within."""
    found: dict[str, None] = {}
    before = Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            found[f"the autograd function {cls.__name__}"] = None
        return before.__get__(None, cls)(*args, **kwargs)

    Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        Function.apply = before


def backward_hooks(model: nn.Module) -> list[str]:
    """Modules with hooks that see, and may change, gradients."""
    found = [name for name, module in model.named_modules() if module._backward_hooks or module._backward_pre_hooks]
    return [f"a backward hook of {f'module {name!r}' if name else 'the model itself'}" for name in found]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients, on random numbers of their own; its buffers are put back."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            yield
        finally:
            for buffer, value in before:
                buffer.copy_(value)


def chosen(model: nn.Module, choice: Choice, error: type[EquinormError], what: str) -> dict[str, nn.Module]:
    """The modules that the user names, by their names.

    Args:
        model: the model.
        choice: names or modules.
        error: what to raise for others.
        what: the argument's name.
    """
    entries = [choice] if isinstance(choice, (str, nn.Module)) else choice
    if not isinstance(entries, (tuple, list)):
        raise error(f"{what} must be names or modules, not {type(choice).__name__}.")
    known = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for entry in entries:
        names = [entry] if isinstance(entry, str) else [name for name, module in known.items() if module is entry]
        if not names or names[0] not in known:
            first = ", ".join(list(known)[1:9])
            given = repr(entry) if isinstance(entry, str) else f"{type(entry).__name__} of {what}"
            raise error(f"the model has no module {given}. Its first modules are {first}.")
        if not any(module is known[names[0]] for module in found.values()):
            found[names[0]] = known[names[0]]
    return found
