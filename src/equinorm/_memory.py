"""Memory of tensors: how much is worked on at a time, how they lie in it, and which of them share it."""

import sys

import torch
from torch import Tensor, nn

STRIP = 1 << 18
"""Entries of a matrix that are worked on at a time where a temporary copy is needed."""


def is_dense(tensor: Tensor) -> bool:
    """Does it fill its part of memory, in any order of its axes?"""
    return tensor.is_contiguous() or tensor.permute(memory_order(tensor)).is_contiguous()


def memory_order(tensor: Tensor) -> list[int]:
    """Axes as they lie in memory, from the slowest to the fastest."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def is_sharded(tensor: Tensor) -> bool:
    """Is it spread over processes by `torch.distributed`, so that this one holds a part of it?"""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # importing it takes a second
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, in its own memory; other tensors as they are."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()  # pyright: ignore[reportAttributeAccessIssue]


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory that a tensor lies in, while it lives: its storage; in layouts without one, the tensor itself.

    Of sharded tensors the memory that this process has.
    """
    tensor = local(tensor)
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -id(tensor)


def place_of(tensor: Tensor) -> tuple:
    """Identity of its entries in memory: tensors of one place are tied."""
    tensor = local(tensor)
    if tensor.layout != torch.strided:
        return (storage_of(tensor),)
    return (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
