"""Set bounded activations free: ReLU6 and Hardtanh become clamps whose bounds scale channel by channel, and go back."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from equinorm._display import and_more
from equinorm._errors import EqualizeError
from equinorm._symmetries import Symmetries, symmetries
from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.modules.choosing import Choice
from equinorm.quantization.clamp import Clamp
from equinorm.quantization.lifting import lift_bounds_, lower_

Kept = TypeVar("Kept")

BOUNDED = (nn.ReLU6, nn.Hardtanh)
"""Modules that can be set free."""

FUNCTIONS = "hardtanh relu6 clamp clamp_min clamp_max clip"
"""Operations that bound, in their in-place forms too."""

EXPORT = "prepare torch.export.export(model, args).module(), where each operation stands alone"
"""What helps where modules hide calls."""


def free_(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None,
    opaque: Choice,
    which: Sequence[str] = ("*",),
) -> tuple[dict[str, int], dict[str, str]]:
    """Replace bounded activations of a model by clamps where what they bound could scale.

    Args:
        model: is changed.
        args: its positional inputs.
        kwargs: its keyword inputs.
        opaque: submodules that are not looked into.
        which: patterns of names; others stay.

    Returns:
        How many channels each freed activation has, and why the others were left.
    """
    for clamp in [module for module in model.modules() if isinstance(module, Clamp)]:
        put(model, clamp, clamp.freed())
    lifted = lift_bounds_(model)
    try:
        return _freed(model, args, kwargs, opaque, which)
    finally:
        lower_(lifted)


def _freed(
    model: nn.Module, args: tuple | Tensor, kwargs: Mapping[str, Any] | None, opaque: Choice, which: Sequence[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """The same for modules alone."""
    places, kept = chosen_names(_places(model), which)
    stand_ins = {name: nn.ReLU() for name in places}
    for name, (parent, key, _) in places.items():
        setattr(parent, key, stand_ins[name])
    found = symmetries(model, args, kwargs, batch_norm="evaluation", opaque=opaque)
    freed: dict[str, int] = {}
    left: dict[str, str] = {}
    relus = [value for value in found.values if value.operator == "aten.relu"]
    for name, (parent, key, module) in places.items():
        calls = [value for value in relus if module_at(model, value) is stand_ins[name]]
        shapes = {shape for value in calls if (shape := varying(value)) is not None}
        is_reread = bool(module.inplace) and any(_is_reread(value, found.values) for value in calls)
        why = _why_left(module, calls, shapes, is_reread)
        if why:
            left[name] = why
            setattr(parent, key, module)
            continue
        (shape,) = shapes
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
        setattr(parent, key, Clamp(module, shape, calls[0].dtype, device))
        freed[name] = torch.Size(shape).numel()
    return freed, left | kept | _functional(found)


def chosen_names(places: Mapping[str, Kept], which: Sequence[str]) -> tuple[dict[str, Kept], dict[str, str]]:
    """What has a name that one of these patterns fits, and why the others were left.

    Raises:
        EqualizeError: if a pattern but "*" fits no name.
    """
    if idle := [pattern for pattern in which if pattern != "*" and not fnmatch.filter(places, pattern)]:
        there = f"These are {and_more(places, 8, 'activations')}; '*' stands for any letters." if places else "There is none."
        raise EqualizeError(f"free={idle[0]!r} is the name of no bounded activation. {there}")
    found = {name: place for name, place in places.items() if any(fnmatch.fnmatchcase(name, one) for one in which)}
    return found, dict.fromkeys(places.keys() - found.keys(), "it is not among those that were named")


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Hardtanh]]:
    """Bounded activations by name: whose child each is, by what name. One that is in two places is called from each apart."""
    found: dict[str, tuple[nn.Module, str, nn.Hardtanh]] = {}
    for name, parent in model.named_modules():
        for key, child in parent._modules.items():
            if type(child) in BOUNDED:
                assert isinstance(child, nn.Hardtanh)
                found[f"{name}.{key}".lstrip(".")] = parent, key, child
    return found


def settle_(model: nn.Module) -> int:
    """Turn clamps whose bounds are all equal back into what they were, in place; returns how many are left.

    Bounds that scaled, but all alike, become those of an nn.Hardtanh. Those that differ stay as they are from now on, and
    the largest bounds all channels first, which onnxruntime rounds better; `prepare` sets them free again. The function stays
    the same.

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
    why = f"only modules are set free: call an nn.ReLU6 or nn.Hardtanh in the forward instead, or {EXPORT}"
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
    """The module that made a value; the exporter numbers further calls of one module, as in "block@1.act"."""
    try:
        return model.get_submodule(re.sub(r"@\d+", "", value.module))
    except AttributeError:
        return None


def has_hooks(module: nn.Module) -> bool:
    """Does anything run before or after it?"""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_reread(call: InnerValue, values: InnerValues) -> bool:
    """Does anything read the memory of what an operation reads after it, which then finds what it was changed into in place?"""
    place = next(place for place, value in enumerate(values) if value is call)
    memory = values[next(iter(call.reads.values()))].memory
    sharing = {value.name: value for value in values[:place] if value.memory == memory}
    later = {name for value in values[place + 1 :] for name in value.reads.values()}
    return bool(sharing.keys() & later) or any(value.is_returned for value in sharing.values())


def _why_left(module: nn.Module, calls: list[InnerValue], shapes: set[tuple[int, ...]], is_reread: bool) -> str:
    if has_hooks(module):
        return "hooks run with it"
    if not calls:
        return "the graph does not call it"
    if is_reread:
        return "it changes in place what is read again: inplace=False sets it free, if what is read may be the unbounded input"
    if not shapes:
        return "nothing that it bounds can scale"
    if len(shapes) > 1 or any(varying(value) is None for value in calls):
        return f"it is called {len(calls)} times, on other channels: give each call a module of its own, or {EXPORT}"
    return ""
