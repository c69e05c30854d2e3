"""What a forward leaves behind besides its result, and who else reads what it computes."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from equinorm._modules import by_default, undisturbed


@contextlib.contextmanager
def unchanged_attributes(model: nn.Module) -> Iterator[Callable[[], list[Tensor]]]:
    """Put back what a traced forward assigns to the model, and what it puts into lists and dicts there.

    Traced tensors would stay in them, and hooks that a model installs at its first call would be installed again. Yields a
    function that returns the tensors that the forward has left there so far.
    """
    held = {
        id(holder): (holder, list(holder.items()) if isinstance(holder, dict) else list(holder)) for holder in holders(model)
    }
    known = {id(item) for holder, _ in held.values() for item in items(holder)}
    recomputed = [
        (vars(module), name)
        for module in model.modules()
        for name in vars(module)
        if f"{name}_v" in module._parameters or f"{name}_orig" in module._parameters
    ]  # by torch.nn.utils before every call

    def kept() -> list[Tensor]:
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        own |= {id(attributes.get(name)) for attributes, name in recomputed}
        found = {id(item): item for holder in holders(model) for item in items(holder) if isinstance(item, Tensor)}
        return [tensor for number, tensor in found.items() if number not in known and number not in own]

    try:
        yield kept
    finally:
        for holder, content in held.values():
            holder.clear()
            (holder.update if isinstance(holder, (dict, set)) else holder.extend)(content)


_DEPTH = 4
"""How far below a module's attributes its containers are followed."""


def items(holder: Any) -> Iterator[Any]:
    """What it holds; what tuples hold by itself."""
    for item in list(holder.values() if isinstance(holder, dict) else holder):
        if isinstance(item, tuple):
            yield from items(item)
        else:
            yield item


def holders(model: nn.Module) -> list[Any]:
    """Everything in which a forward can leave values: attributes of modules, containers and plain objects in them."""
    found: dict[int, Any] = {}

    def follow(value: Any, depth: int) -> None:
        if isinstance(value, (nn.Module, Tensor, type, str)) or callable(value) or depth > _DEPTH or id(value) in found:
            return
        if not isinstance(value, (dict, list, set, deque)):
            value = getattr(value, "__dict__", None)
            if not isinstance(value, dict) or id(value) in found:
                return
        found[id(value)] = value
        for item in items(value):
            follow(item, depth + 1)

    for module in model.modules():
        follow(vars(module), 0)
    return list(found.values())


def run_once(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Exception | None:
    """Run a model as it is on copies of these inputs and leave no trace; return what it raised."""
    copies = pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, dict(kwargs)))
    try:
        with undisturbed(model), unchanged_attributes(model), by_default():
            model(*copies[0], **copies[1])
    except Exception as error:
        return error
    return None


# What a user's hook reads must not scale. An operator without a rule pins whatever passes through it.
LIBRARY = torch.library.Library("equinorm", "DEF")
LIBRARY.define("observed(Tensor x) -> Tensor")
LIBRARY.impl("observed", lambda x: x.clone(), "CompositeExplicitAutograd")


@torch.library.register_fake("equinorm::observed", lib=LIBRARY)
def _observed_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


has_side_effect(torch.ops.equinorm.observed.default)  # decompositions would drop it where nothing uses its result


def _observe(values: Any) -> None:
    for value in pytree.tree_leaves(values):
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            torch.ops.equinorm.observed(value)


@contextlib.contextmanager
def observed_hooks(model: nn.Module, kept: Callable[[], list[Tensor]]) -> Iterator[None]:
    """While exporting, mark what hooks of the model or of all modules can read, and what its forward keeps for later calls."""
    handles = []

    def observe(_: Any, *values: Any) -> None:
        _observe(values)

    for module in model.modules():
        before = [hook for hook in module._forward_pre_hooks.values() if not _is_torch_own(hook)]
        after = [hook for hook in module._forward_hooks.values() if not _is_torch_own(hook)]
        after += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if before or after:
            handles.append(module.register_forward_pre_hook(observe, prepend=True, with_kwargs=True))
        if after:
            handles.append(module.register_forward_hook(observe, prepend=True))
    # Hooks of all modules run before those of one, and around modules that the model does not hold.
    every: Any = nn.modules.module
    of_all = [every._global_forward_pre_hooks, every._global_forward_hooks]
    if any((*of_all, every._global_backward_hooks, every._global_backward_pre_hooks)):
        handles.append(every.register_module_forward_pre_hook(observe))
        handles.append(every.register_module_forward_hook(observe, with_kwargs=True))
        for hooks, handle in zip(of_all, handles[-2:], strict=True):
            hooks.move_to_end(handle.id, last=False)

    def observe_kept(*_: Any) -> None:
        _observe(kept())

    handles.append(model.register_forward_hook(observe_kept))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
            every._global_forward_hooks_with_kwargs.pop(handle.id, None)  # which remove() forgets


def _is_torch_own(hook: Any) -> bool:
    """Hooks of torch.nn.utils (weight norm, pruning) only prepare a module's own parameters."""
    return getattr(type(hook), "__module__", "").startswith("torch.nn.utils")
