"""Memory of tensors: how much is worked on at a time, how they lie in it, which of them share it, and which lie in files."""

import mmap
import sys
import weakref

import torch
from torch import Tensor, nn

STRIP = 1 << 18
"""Entries of a matrix that are worked on at a time where a temporary copy is needed."""

_MAPPINGS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""Files that tensors lie in, by the first address of each."""


def is_dense(tensor: Tensor) -> bool:
    """Does it fill its part of memory, in any order of its axes?"""
    return tensor.is_contiguous() or tensor.permute(memory_order(tensor)).is_contiguous()


def has_memory(tensor: Tensor) -> bool:
    """Do its entries lie at its address as they are? Those of subclasses may lie elsewhere, and some views count as negated."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_neg()


def is_wrapped(tensor: Tensor) -> bool:
    """Does it hold other tensors instead of numbers, as quantized and nested ones do? Sharded tensors do not count."""
    return hasattr(type(tensor), "__tensor_flatten__") and not is_sharded(tensor)


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


def mapped(handle: int, first: int, size: int) -> Tensor:
    """Bytes of an open file, at least one, which stay there: pages are read when they are needed.

    Raises:
        OSError: if the file cannot be read.
    """
    skipped = first % mmap.ALLOCATIONGRANULARITY  # copy on write: nothing is written, but PyTorch wants memory that could be
    pages = mmap.mmap(handle, skipped + size, access=mmap.ACCESS_COPY, offset=first - skipped)
    tensor = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=skipped)
    _MAPPINGS[tensor.data_ptr() - skipped] = pages
    return tensor


def forget(part: Tensor) -> None:
    """Give back the memory of a dense part of a tensor, if it lies in a file; it is read again when it is needed.

    The system keeps what it has room for. Other tensors, and systems that cannot, are left alone.
    """
    if not _MAPPINGS or not hasattr(mmap, "MADV_DONTNEED") or not part.numel() or not part.is_contiguous():
        return
    storage = part.untyped_storage().data_ptr()
    start = storage - storage % mmap.ALLOCATIONGRANULARITY
    pages = _MAPPINGS.get(start)
    if pages is not None:
        first = part.data_ptr() - start
        end = first + part.numel() * part.element_size()
        first -= first % mmap.PAGESIZE
        pages.madvise(mmap.MADV_DONTNEED, first, end - first)
