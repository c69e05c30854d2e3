"""Memory of tensors: how much is worked on at a time, how they lie in it, and which of them share it."""

import torch
from torch import Tensor

STRIP = 1 << 18
"""Entries of a matrix that are worked on at a time where a temporary copy is needed."""


def is_dense(tensor: Tensor) -> bool:
    """Does it fill its part of memory, in any order of its axes?"""
    return tensor.is_contiguous() or tensor.permute(memory_order(tensor)).is_contiguous()


def memory_order(tensor: Tensor) -> list[int]:
    """Axes as they lie in memory, from the slowest to the fastest."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory that a tensor lies in, while it lives: its storage; in layouts without one, the tensor itself."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -id(tensor)


def place_of(tensor: Tensor) -> tuple:
    """Identity of its entries in memory: tensors of one place are tied."""
    if tensor.layout != torch.strided:
        return (storage_of(tensor),)
    return (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
