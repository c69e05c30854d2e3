"""Set bounded activations free: ReLU6 and Hardtanh become clamps whose bounds scale channel by channel, and go back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._modules import Choice
from equinorm._symmetries import Symmetries, symmetries
from equinorm.discovery.inner_values import InnerValue
from equinorm.quantization.clamp import Clamp

BOUNDED = (nn.ReLU6, nn.Hardtanh)
"""Modules that can be set free."""

FUNCTIONS = "hardtanh relu6 clamp clamp_min clamp_max clip"
"""Operations that bound, in their in-place forms too."""


def free_(
    model: nn.Module, args: tuple | Tensor, kwargs: Mapping[str, Any] | None, opaque: Choice
) -> tuple[dict[str, int], dict[str, str]]:
    """Replace bounded activations of a model by clamps where what they bound could scale.

    Args:
        model: is changed.
        args: its positional inputs.
        kwargs: its keyword inputs.
        opaque: submodules that are not looked into.

    Returns:
        How many channels each freed activation has, and why the others were left.
    """
    bounded = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Hardtanh)}
    bounded = {name: module for name, module in bounded.items() if type(module) in BOUNDED}
    stand_ins = {name: nn.ReLU(inplace=bool(module.inplace)) for name, module in bounded.items()}
    for name, module in bounded.items():
        put(model, module, stand_ins[name])
    found = symmetries(model, args, kwargs, batch_norm="evaluation", opaque=opaque)
    freed: dict[str, int] = {}
    left: dict[str, str] = {}
    for name, module in bounded.items():
        calls = [value for value in found.values if _is_of(value, model, stand_ins[name])]
        shapes = {shape for value in calls if (shape := varying(value)) is not None}
        why = _why_left(module, calls, shapes)
        if why:
            left[name] = why
            put(model, stand_ins[name], module)
            continue
        (shape,) = shapes
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
        put(model, stand_ins[name], Clamp(module, shape, calls[0].dtype, device))
        freed[name] = torch.Size(shape).numel()
    return freed, left | _functional(found)


def settle_(model: nn.Module) -> int:
    """Turn clamps whose bounds are all equal back into what they were, in place; returns how many are left.

    Bounds that scaled, but all alike, become those of an nn.Hardtanh. The function stays the same.

    Args:
        model: a prepared model; is changed.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU6(), torch.nn.Linear(16, 4)).eval()
    >>> prepared, _ = equinorm.quantization.prepare(net, (torch.randn(1, 8),))
    >>> type(prepared[1]).__name__, equinorm.quantization.settle_(prepared), type(prepared[1]).__name__
    ('Clamp', 0, 'ReLU6')
    """
    clamps = [module for module in model.modules() if isinstance(module, Clamp)]
    for clamp in clamps:
        if (settled := clamp.settled()) is not clamp:
            put(model, clamp, settled)
    return sum(isinstance(module, Clamp) for module in model.modules())


def _functional(found: Symmetries) -> dict[str, str]:
    """Bounds that are no modules and pin something, by where they are written."""
    names = {f"aten.{name}{ending}" for name in FUNCTIONS.split() for ending in ("", "_")}
    reasons = (pin.reason for pin in found.pins if pin.reason.operation in names)
    why = "only modules are set free: call an nn.ReLU6 or nn.Hardtanh in the forward instead"
    return {f"{reason.operation} at {reason.source or reason.module}": why for reason in reasons}


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under every name that the model has for it."""
    for parent in list(model.modules()):
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, new)


def varying(value: InnerValue) -> tuple[int, ...] | None:
    """The shape of a tensor that differs along the axes along which the value scales differently; None if it cannot scale."""
    scaling = value.scaling
    if scaling is None or not scaling.factors:
        return None
    joint = torch.broadcast_shapes(*(ids.shape for _, ids in scaling.factors))
    while len(joint) > 1 and joint[0] == 1:
        joint = joint[1:]
    return tuple(joint)


def module_at(model: nn.Module, value: InnerValue) -> nn.Module | None:
    """The module that made a value; the exporter numbers further calls of one module, as in "act@1"."""
    try:
        return model.get_submodule(value.module.partition("@")[0])
    except AttributeError:
        return None


def has_hooks(module: nn.Module) -> bool:
    """Does anything run before or after it?"""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_of(value: InnerValue, model: nn.Module, module: nn.Module) -> bool:
    return value.operator in ("aten.relu", "aten.relu_") and module_at(model, value) is module


def _why_left(module: nn.Module, calls: list[InnerValue], shapes: set[tuple[int, ...]]) -> str:
    if has_hooks(module):
        return "hooks run with it"
    if not calls:
        return "the graph does not call it"
    if not shapes:
        return "nothing that it bounds can scale"
    if len(shapes) > 1 or any(varying(value) is None for value in calls):
        return f"it is called {len(calls)} times, on other channels: give each call a module of its own"
    return ""
