"""Is a model still the one that was analysed?"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from equinorm._errors import RescaleError, warn
from equinorm._memory import local
from equinorm.modules.hooks import only_looks

CLASS = "its class"
"""What stands for the class of a module among the names of what it holds."""


class ModelGuard:
    """Notices modules and parameters that were added, removed, replaced or tied.

    It looks at the kind of every module, its children and parameters, at buffers that move or appear, and at which tensors
    share memory. Of forward hooks that are added it warns, since most only look. Functions and numbers that modules hold as
    plain attributes are not looked at.

    Args:
        model: as it was analysed.
        advice: what to do where something has changed.
        moving: the tensors that move, by name, where parameters must still be the same objects. None: others may have taken
            their places, as by `load_state_dict(assign=True)`.
        owner: what to call it.
    """

    def __init__(
        self, model: nn.Module, advice: str, moving: Mapping[str, Tensor] | None = None, owner: str = "the model"
    ) -> None:
        self._arguments = (model, advice, moving, owner)
        self._owner, self._same_tensors, self._advice = owner, moving is not None, advice
        moving = moving or {}
        self._moving = {id(tensor) for tensor in moving.values()}
        self._modules = [(name, module, self._inside(module), self._ids(module)) for name, module in model.named_modules()]
        self._hooks = {module: {*_hooks(module)} for module in model.modules() if _hooks(module)}
        self._tensors = list(dict([*model.named_parameters(), *moving.items()]).items())
        self._shapes = [tensor.shape for _, tensor in self._tensors]
        self._memory = self._shared()

    def __reduce__(self) -> tuple:
        return ModelGuard, self._arguments  # a copy watches the copied model

    def check(self) -> None:
        """Raise if the model is not what it was.

        Raises:
            RescaleError: naming the module or tensor that changed.
        """
        self._check_modules()
        if not self._same_tensors:
            self._find_tensors()
        self._check_tensors()

    def _check_modules(self) -> None:
        """Refuse a module that consists of something else; warn of hooks."""
        for number, (name, module, before, ids) in enumerate(self._modules):
            if (found := self._ids(module)) == ids:
                continue
            now = self._inside(module)
            if now != before:
                where = f"module {name!r} of {self._owner}" if name else f"{self._owner} itself"
                changed = {*now} ^ {*before}
                keys = sorted({key for key, _ in changed})
                shown = ", ".join(key if key == CLASS else repr(key) for key in keys)
                self._refuse(f"{shown} in {where} {'was' if len(keys) == 1 else 'were'} added, removed or replaced")
            if {*_hooks(module)} - self._hooks.get(module, set()):
                self._hooks.setdefault(module, set()).update(_hooks(module))
                where = f"{type(module).__name__} {name!r} of {self._owner}"
                harmless = "If it changes nothing that the module takes or returns, nothing needs to be done."
                warn(f"a forward hook was added to {where} {self._advice} {harmless}")
            self._modules[number] = (name, module, before, found)

    def _find_tensors(self) -> None:
        """Look where the parameters are now."""
        named = [(f"{name}." if name else "", module._parameters) for name, module, *_ in self._modules]
        now = {prefix + key: parameter for prefix, held in named for key, parameter in held.items() if parameter is not None}
        self._tensors = [(name, now[name]) for name, _ in self._tensors if name in now]

    def _check_tensors(self) -> None:
        """Refuse tensors of other shapes, or tied otherwise."""
        for (name, tensor), shape in zip(self._tensors, self._shapes, strict=True):
            if tensor.shape != shape:
                self._refuse(f"{name} of {self._owner} got shape {tuple(tensor.shape)} instead of {tuple(shape)}")
        memory = self._shared()
        if memory != self._memory:
            places = zip(self._tensors, self._memory, memory, strict=True)
            names = [name for (name, _), before, now in places if before != now]
            self._refuse(f"{names[0]} of {self._owner} shares its memory with other tensors than before")

    def _ids(self, module: nn.Module) -> tuple[object, ...]:
        """All that a module holds, as fast as can be had; while this stays what it was, so does `_inside`."""
        children, parameters, buffers = module._modules, module._parameters, module._buffers
        ids = map(id, (type(module), *children.values(), *parameters.values(), *buffers.values()))
        return *children.keys(), *parameters.keys(), *buffers.keys(), *ids, *_hooks(module)

    def _inside(self, module: nn.Module) -> tuple[tuple[str, int], ...]:
        """What a module consists of: its class, children, parameters, and buffers that move or exist."""
        parts = [(CLASS, id(type(module))), *((key, id(child)) for key, child in module._modules.items())]
        if not self._same_tensors:
            return (*parts, *((key, int(parameter is None)) for key, parameter in module._parameters.items()))
        parts += [(key, id(parameter)) for key, parameter in module._parameters.items()]
        for key, buffer in module._buffers.items():
            parts.append((key, id(buffer) if id(buffer) in self._moving else int(buffer is None)))
        return tuple(parts)

    def _shared(self) -> list[int]:
        """For each tensor the first that begins at the same place in memory."""
        first: dict[int, int] = {}
        places = [local(tensor).data_ptr() if tensor.layout == torch.strided else 0 for _, tensor in self._tensors]
        return [first.setdefault(place or -1 - i, i) for i, place in enumerate(places)]

    def _refuse(self, what: str) -> None:
        raise RescaleError(f"{what} {self._advice}")


def _hooks(module: nn.Module) -> list[int]:
    """Keys of the functions that see what it takes and returns."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return []
    found = [*module._forward_hooks.items(), *module._forward_pre_hooks.items()]
    return [key for key, function in found if not only_looks(function)]
