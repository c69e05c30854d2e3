"""Sharded modules: put back into shards, and their unsharded twin on the meta device, from which symmetries are discovered."""

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equinorm._errors import EquinormError, ExportError, describe
from equinorm._memory import is_sharded


def reshard(model: nn.Module) -> None:
    """Put back into shards what fully_shard has left whole after a forward; every training step asks for this."""
    kind = _sharding_class()
    for module in model.modules() if kind else ():
        if isinstance(module, kind):
            module.reshard()  # pyright: ignore[reportCallIssue]


def is_any_sharded(model: nn.Module) -> bool:
    """Does it hold a tensor that is spread over processes? What is whole after a forward is put back into shards first."""
    reshard(model)
    return any(map(is_sharded, (*model.parameters(), *model.buffers())))


def unsharded_twin(model: nn.Module) -> nn.Module:
    """A copy with the classes that modules had before they were sharded, without the hooks of `torch.distributed`.

    Parameters and buffers are on the meta device, in the shape of the whole tensor.

    Raises:
        ExportError: if something that the model holds cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole
    modules = [module for module in model.modules() if _is_ours(module)]
    memo |= {id(module): object.__new__(_plain_class(module)) for module in modules}
    try:
        for module in modules:
            held = {key: _without_sharding(key, value) for key, value in vars(module).items() if "__composable" not in key}
            memo[id(module)].__dict__.update({key: copy.deepcopy(value, memo) for key, value in held.items()})
        return copy.deepcopy(model, memo)
    except EquinormError:
        raise
    except Exception as error:
        raise ExportError(
            f"cannot make an unsharded twin of {describe(model)} to analyse: {type(error).__name__}: {error}. Make "
            "copy.deepcopy work on what its modules hold, or analyse and balance the model before it is sharded."
        ) from error


def on_meta(values: Any) -> Any:
    """Inputs without numbers."""
    return pytree.tree_map_only(Tensor, lambda value: value.to("meta"), values)


def _is_ours(module: nn.Module) -> bool:
    """Is it copied attribute by attribute? Others know better how they are copied."""
    return not hasattr(_plain_class(module), "__deepcopy__")


def _plain_class(module: nn.Module) -> type:
    """What it was before fully_shard, which puts a class of its own and FSDPModule in front."""
    kind = _sharding_class()
    if not isinstance(module, kind):
        return type(module)
    return next(base for base in type(module).__mro__[1:] if not issubclass(base, kind))


def _sharding_class() -> Any:
    """What modules become instances of in fully_shard, each of a class made below it; no class where none was."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind if kind is not None and kind.__subclasses__() else ()  # spares a walk over all modules in every step


def _without_sharding(name: str, value: Any) -> Any:
    """A module's dict of hooks without those of `torch.distributed`; other attributes as they are."""
    if not (name.endswith("_hooks") and isinstance(value, Mapping)):
        return value
    kind: Any = type(value)
    return kind((key, hook) for key, hook in value.items() if not _is_of_distributed(hook))


def _is_of_distributed(hook: Any, part: str = "") -> bool:
    function = getattr(hook, "func", hook)
    return callable(function) and str(getattr(function, "__module__", "")).startswith(f"torch.distributed.{part}")


@contextlib.contextmanager
def without_composed_hooks(model: nn.Module) -> Iterator[None]:
    """Take away the hooks of `replicate` and alike, which change no number and would set themselves up within a trace."""
    changed: list[tuple[dict, dict]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            composed = [key for key, hook in hooks.items() if _is_of_distributed(hook, "_composable.")]
            if composed:
                changed.append((hooks, dict(hooks)))
                for key in composed:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in changed:
            hooks.clear()
            hooks.update(before)
