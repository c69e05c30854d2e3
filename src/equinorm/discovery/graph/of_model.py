"""The graphs of a model, as users ask for them: refused in words where it is something else."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from equinorm._arguments import every_call
from equinorm._errors import ExportError, check_module, describe
from equinorm.discovery.graph.export import Graphs
from equinorm.modules.choosing import Choice, chosen, unwrapped


def graphs_of(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None,
    opaque: Choice = (),
    *,
    both_modes: bool = False,
    also: Sequence[tuple | Tensor | Mapping[str, Any]] = (),
) -> Graphs:
    """The graphs of a model, not exported yet; arguments are those of `symmetries`, `permutations` and `signs`.

    Raises:
        EquinormError: for what is no model, and no inputs.
        ExportError: for tensors without a shape, offloaded ones, and opaque modules that the model has not.
    """
    check_module(model)
    model = unwrapped(model)
    calls = every_call(args, kwargs, also)
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ExportError(f"{describe(model)} has tensors without a shape yet, as {lazy[0]}: run it once on its inputs first.")
    offloaded = [
        name or "the model itself" for name, module in model.named_modules() if _offloads(vars(module).get("_hf_hook"))
    ]
    if offloaded:
        raise ExportError(
            f"accelerate offloads weights of {describe(model)} ({offloaded[0]}): they are there only while it runs. Balance "
            "the model before it is offloaded (accelerate.hooks.remove_hook_from_submodules brings all back), or its "
            "checkpoint's folder, which needs little memory: `equinorm balance FOLDER -o FOLDER`."
        )
    hidden = chosen(model, opaque, ExportError, "opaque")
    return Graphs(model, calls, (True, False) if both_modes else (None,), hidden)


def _offloads(hook: Any) -> bool:
    """Does a hook of accelerate take a module's weights away after each call?"""
    return getattr(hook, "offload", False) is True or any(map(_offloads, getattr(hook, "hooks", ())))
