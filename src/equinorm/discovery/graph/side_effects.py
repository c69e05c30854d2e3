"""What a forward leaves behind besides its result, and who else reads what it computes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from equinorm.discovery.graph.snapshot import Snapshot
from equinorm.modules.copying import recomputed
from equinorm.modules.hooks import only_looks
from equinorm.modules.running import by_default, undisturbed


class Attributes:
    """What a model holds besides its modules and tensors, as it was before a forward.

    Attributes:
        leaves: tensors, arrays and storages in plain attributes, in what these hold, and in closures.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._snapshot = model, Snapshot(model, shared=True)
        attributes = [(vars(module), name) for module in model.modules() for name in recomputed(module)]
        self._recomputed = [place for place in attributes if place[1] in place[0]]
        passing = {id(attributes[name]) for attributes, name in self._recomputed}
        self.leaves = [leaf for leaf in self._snapshot.leaves if id(leaf) not in passing]

    def kept(self) -> list[Tensor]:
        """Tensors that a forward has left there since."""
        own = {id(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
        own |= {id(attributes.get(name)) for attributes, name in self._recomputed}
        return [tensor for tensor in self._snapshot.new_tensors() if id(tensor) not in own]

    def restore(self) -> None:
        """Put everything back."""
        self._snapshot.restore()


@contextlib.contextmanager
def unchanged_attributes(model: nn.Module) -> Iterator[Attributes]:
    """Put back what a traced forward assigns to the model, and what it puts into containers, closures, classes and globals.

    Traced tensors would stay in them, and hooks that a model installs at its first call would be installed again.
    """
    attributes = Attributes(model)
    try:
        yield attributes
    finally:
        attributes.restore()


def run_once(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Exception | None:
    """Run a model as it is on copies of these inputs and leave no trace; return what it raised."""
    copies = pytree.tree_map_only(Tensor, lambda value: value.clone(), (args, dict(kwargs)))
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
        before = [hook for hook in module._forward_pre_hooks.values() if not only_looks(hook)]
        after = [hook for hook in module._forward_hooks.values() if not only_looks(hook)]
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
