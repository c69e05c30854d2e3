"""Where tensors lie in memory, and which of them share it."""

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from equinorm._memory import storage_of

T = TypeVar("T")

_Span = tuple[Hashable, int, int]
"""A memory, and the first and last + 1 byte in it."""


def overlaps_itself(tensor: Tensor) -> bool:
    """May two entries lie at one place, as those of expanded tensors do?"""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def overlapping(tensors: Mapping[T, Any]) -> set[T]:
    """Keys of those that share memory with another one."""
    found: set[T] = set()
    for spans in _by_memory((span, key) for key, tensor in tensors.items() if (span := _span(tensor))).values():
        reach, widest = spans[0][1], spans[0][2]
        for start, end, key in spans[1:]:
            if start < reach:
                found |= {key, widest}
            if end > reach:
                reach, widest = end, key
    return found


def touched(tensors: Mapping[T, Any], others: Iterable[Any]) -> set[T]:
    """Keys of the tensors that share memory with any of the others."""
    found: set[T] = set()
    own = _by_memory((span, key) for key, tensor in tensors.items() if (span := _span(tensor)))
    for memory, spans in _by_memory((span, None) for other in others if (span := _span(other))).items():
        starts, ends, reach = [start for start, _, _ in spans], [], 0
        for _, end, _ in spans:
            ends.append(reach := max(reach, end))
        for start, end, key in own.get(memory, ()):
            before = bisect_left(starts, end)  # so many begin in front of its end
            if before and ends[before - 1] > start:
                found.add(key)
    return found


def _by_memory(spans: Iterable[tuple[_Span, Any]]) -> dict[Hashable, list[tuple[int, int, Any]]]:
    """Spans of each memory, by where they start."""
    found: dict[Hashable, list[tuple[int, int, Any]]] = {}
    for (memory, start, end), key in spans:
        found.setdefault(memory, []).append((start, end, key))
    for group in found.values():
        group.sort(key=lambda span: span[:2])
    return found


def _span(value: Any) -> _Span | None:
    """Where a tensor, an array or a storage lies; None where that cannot be told or nothing is there."""
    if isinstance(value, np.ndarray):
        if not value.size:
            return None
        start = value.__array_interface__["data"][0]
        reaches = [(size - 1) * stride for size, stride in zip(value.shape, value.strides, strict=True)]
        return "cpu", start + sum(min(r, 0) for r in reaches), start + sum(max(r, 0) for r in reaches) + value.itemsize
    if not isinstance(value, Tensor):
        size = value.nbytes()
        return (str(value.device), value.data_ptr(), value.data_ptr() + size) if size else None
    if value.layout != torch.strided or not value.numel():
        return None
    memory: Hashable = str(value.device)
    try:
        start = value.data_ptr()
        if value.device.type not in ("cpu", "cuda") or not start:  # no addresses: only views of one storage can be told
            memory, start = storage_of(value), int(value.storage_offset()) * value.element_size()
    except (RuntimeError, NotImplementedError):  # subclasses that hold their numbers elsewhere
        return None
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return memory, start, start + (last + 1) * value.element_size()
