"""Memory of tensors: how much is worked on at a time, and how they lie in it."""

from torch import Tensor

STRIP = 1 << 18
"""Entries of a matrix that are worked on at a time where a temporary copy is needed."""


def is_dense(tensor: Tensor) -> bool:
    """Does it fill its part of memory, in any order of its axes?"""
    return tensor.is_contiguous() or tensor.permute(memory_order(tensor)).is_contiguous()


def memory_order(tensor: Tensor) -> list[int]:
    """Axes as they lie in memory, from the slowest to the fastest."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
