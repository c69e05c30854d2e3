"""What a model has: the user's own module inside of what wraps it, modules and tensors by name, and those that are named."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from equinorm._errors import EquinormError, describe
from equinorm._memory import is_sharded

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


def walked(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """All modules by every name, as `named_modules` gives them, at a third of its time."""
    found = [(prefix, model)]
    for name, child in model._modules.items():
        if child is not None:
            found += walked(child, f"{prefix}.{name}" if prefix else name)
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, by every name."""
    modules = walked(model)
    held = [(module._parameters, name) for name, module in modules] + [(module._buffers, name) for name, module in modules]
    named = ((f"{name}.{key}" if name else key, tensor) for tensors, name in held for key, tensor in tensors.items())
    return {name: tensor for name, tensor in named if tensor is not None}


def refuse_sharded(model: nn.Module, purpose: str, error: type[EquinormError], otherwise: str = "") -> None:
    """Refuse a model of which this process holds a part only.

    Args:
        model: the model.
        purpose: what whole tensors are needed for.
        error: what to raise.
        otherwise: what else the user could do.
    """
    sharded = next((name for name, tensor in tensors_of(model).items() if is_sharded(tensor)), None)
    if sharded:
        raise error(
            f"{sharded} of {describe(model)} is sharded over processes; {purpose} needs whole tensors. Load them into a "
            f"model of one process: torch.distributed.checkpoint.state_dict.get_model_state_dict gathers them{otherwise}."
        )


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
