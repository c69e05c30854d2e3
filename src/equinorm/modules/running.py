"""How a model is run: without a trace of it, in which mode, by which default device, and what it calls meanwhile."""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients, on random numbers of their own; its buffers are put back."""
    before = [(part, part.clone()) for part in (once(buffer.detach()) for buffer in model.buffers())]
    with torch.no_grad(), own_random(model):
        try:
            yield
        finally:
            for part, value in before:
                part.copy_(value)


@contextlib.contextmanager
def own_random(model: nn.Module) -> Iterator[None]:
    """Start random numbers anew on the CPU and where the model is; afterwards they go on as they would have.

    No other device is touched: `torch.manual_seed` would leave its seed for when CUDA starts, `fork_rng` alone would start it.
    """
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        torch.default_generator.manual_seed(0)
        for device in places:
            module: Any = getattr(torch, device.type, None)
            if hasattr(module, "set_rng_state"):  # neither the CPU, which is done, nor meta tensors
                stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
                module.set_rng_state(torch.Generator(device).manual_seed(0).get_state(), device)
        yield


def once(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The part of a tensor in which each entry in memory comes once: what `expand` repeats can be written there.

    Args:
        tensor: any.
        like: the tensor of this shape whose memory counts, if it is another.
    """
    like = tensor if like is None else like
    if like.layout != torch.strided or all(like.stride()):
        return tensor
    return tensor[tuple(slice(None) if stride else slice(1) for stride in like.stride())]


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


def without_cache(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs with use_cache=False, where a model of transformers would return a cache that nobody has asked for.

    Keys and values that later calls reuse scale as those of one call do. Adapters of peft hand keywords on to the model inside.
    """
    base: Any = getattr(model, "get_base_model", None)
    inner = base() if base is not None and _is_of(model, "peft") else model
    if not _is_of(inner, "transformers") or "use_cache" not in inspect.signature(inner.forward).parameters:
        return kwargs
    given = {*kwargs, *names_by_position(model, args)}
    return kwargs if given & {"use_cache", "past_key_values"} else {**kwargs, "use_cache": False}


def names_by_position(model: nn.Module, args: tuple) -> list[str]:
    """Names under which a model's forward takes these positional inputs; none where it does not tell."""
    try:
        return list(inspect.signature(model.forward).parameters)[: len(args)]
    except (TypeError, ValueError):
        return []


def _is_of(model: nn.Module, library: str) -> bool:
    """Is its class, or a base of it, of this library?"""
    return any(str(kind.__module__).startswith(f"{library}.") for kind in type(model).__mro__)
