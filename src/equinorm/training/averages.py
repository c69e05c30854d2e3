"""Averaged weights, wherever libraries keep them: in a module, in a list in the order of the parameters, in a dict by names."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from equinorm._errors import RescaleError, describe
from equinorm.modules.choosing import tensors_of, unwrapped

_INSIDE = ("module", "ema_model", "ema")
"""Where modules that average hold the copy."""

KINDS = "such as torch.optim.swa_utils.AveragedModel, or objects with shadow_params, or dicts of tensors by names"


def listed(averages: Any) -> list[Any]:
    """One or several of them; a list of tensors is one.

    Raises:
        RescaleError: for anything else.
    """
    is_list = isinstance(averages, (tuple, list))
    found = list(averages) if is_list and not (averages and all(isinstance(one, Tensor) for one in averages)) else [averages]
    for one in found:
        tensors = held(one)
        if not isinstance(one, nn.Module) and (not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors)):
            raise RescaleError(f"averages must be a module or several, {KINDS}, not {type(one).__name__}.")
    return found


def held(average: Any) -> list[Any] | None:
    """The tensors of a list, of an object with one, or of a dict; None for others."""
    found = getattr(average, "shadow_params", average)
    found = found.values() if isinstance(found, Mapping) else found
    return [*found] if isinstance(average, Mapping) or isinstance(found, (tuple, list)) else None


def inner_module(average: nn.Module, names: Sequence[str]) -> nn.Module:
    """The copy of the model inside of a module that averages."""
    module = unwrapped(average)
    while not {*names} <= tensors_of(module).keys():
        found = [inner for place in _INSIDE if isinstance(inner := getattr(module, place, None), nn.Module)]
        if not found:
            break
        module = unwrapped(found[0])
    return module


def by_names(average: Any, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that average parameters of a model, by the first name of each.

    Raises:
        RescaleError: if it is not known whose averages they are.
    """
    own = dict(model.named_parameters())
    if isinstance(average, Mapping):
        if strange := [name for name in average if name not in own]:
            raise RescaleError(f"the averages hold {strange[0]!r}, and {describe(model)} has no parameter of that name.")
        return dict(average)
    tensors = held(average) or []
    references = getattr(average, "_params_refs", None)  # torch_ema knows whose they are
    if references is not None and len(references) == len(tensors):
        names = {id(parameter): name for name, parameter in own.items()}
        pairs = [(names.get(id(reference())), tensor) for reference, tensor in zip(references, tensors, strict=True)]
        return {name: tensor for name, tensor in pairs if name is not None}
    trained = [name for name, parameter in own.items() if parameter.requires_grad]
    for order in ([*own], trained):
        if len(order) == len(tensors):
            return dict(zip(order, tensors, strict=True))
    raise RescaleError(
        f"the averages are {len(tensors)} tensors, and {describe(model)} has {len(own)} parameters, {len(trained)} of them "
        "trained: they must be those of model.parameters(), in that order. Otherwise give a dict from names to tensors."
    )
