"""A deep copy of a model, in which tensors that share memory share it still."""

import copy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._errors import EquinormError, describe
from equinorm.modules.choosing import refuse_sharded


def duplicate(model: nn.Module, purpose: str, otherwise: str = "") -> nn.Module:
    """A deep copy in which tensors that share memory share it still.

    Args:
        model: what to copy; what torch.nn.utils computes anew before every call need not be a leaf of autograd.
        purpose: of the copy, for the error.
        otherwise: what else the user could do.

    Raises:
        EquinormError: if the model cannot be copied, as where it is sharded.
    """
    refuse_sharded(model, "a copy", EquinormError, otherwise)
    try:
        return copy.deepcopy(model, _copied_tensors(model))
    except Exception as error:
        raise EquinormError(
            f"cannot copy {describe(model)} {purpose}: {_hinders(model)}{type(error).__name__}: {error}. "
            f"Make copy.deepcopy(model) work{otherwise}."
        ) from error


def recomputed(module: nn.Module) -> list[str]:
    """Plain attributes that torch.nn.utils (weight norm, spectral norm, pruning) computes anew before every call."""
    own = dict(module.named_parameters(recurse=False))
    return [name for name in vars(module) if f"{name}_v" in own or f"{name}_orig" in own]


def _hinders(model: nn.Module) -> str:
    """The first plain attribute that cannot be copied, if there is one."""
    common = vars(nn.Module())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                if key not in common and not isinstance(value, ModuleType):
                    copy.deepcopy(value)
            except Exception:
                return f"attribute {f'{name}.{key}'.lstrip('.')!r}: "
    return ""


def _copied_tensors(model: nn.Module) -> dict[int, Any]:
    """Copies, by identity, of tensors that `copy.deepcopy` would part from others, or refuse; and Python's modules."""
    copies: dict[int, Any] = {}
    sharing: dict[int, dict[int, Tensor]] = {}
    for module in model.modules():
        for name in recomputed(module):
            tensor = vars(module)[name]
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                copies[id(tensor)] = tensor.detach().clone()
        copies |= {id(value): value for value in vars(module).values() if isinstance(value, ModuleType)}
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in copies and _is_plain(tensor):
                sharing.setdefault(tensor.untyped_storage()._cdata, {})[id(tensor)] = tensor
    for tensors in sharing.values():
        if len(tensors) > 1:
            memory = next(iter(tensors.values())).untyped_storage().clone()
            for key, tensor in tensors.items():
                place = (memory, tensor.storage_offset(), tensor.size(), tensor.stride())
                twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[key] = nn.Parameter(twin, False) if is_parameter else twin
                copies[key].requires_grad_(tensor.requires_grad)
    return copies


def _is_plain(tensor: Tensor) -> bool:
    """Is it no subclass of others, dense, and not part of a graph?"""
    is_own = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_own and tensor.is_leaf and not (tensor.is_conj() or tensor.is_neg())
