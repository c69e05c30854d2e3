"""One safetensors file: what it holds, read and written a piece at a time.

The format is eight bytes of length, a header in JSON, and the tensors' bytes. Libraries write whole files from memory; here
files are larger than that, and their headers stay byte for byte.

Source: https://huggingface.co/docs/safetensors/index#format.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from equinorm._errors import EquinormError
from equinorm._memory import mapped

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Those that have a name in both worlds and that tensors may be looked at in."""

_LONGEST = 100_000_000
"""Bytes of a header; longer ones are refused everywhere."""


class CheckpointError(EquinormError):
    """A checkpoint is damaged, does not fit its model, or cannot be written; nothing of it was changed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        key: its name.
        kind: its dtype, as the file spells it.
        shape: of the tensor.
        first: byte of the file at which it begins.
        size: in bytes.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    first: int
    size: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None where PyTorch has no such numbers."""
        return DTYPES.get(self.kind)


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A safetensors file whose tensors stay on disk.

    Attributes:
        path: of the file.
        head: its first bytes, up to the tensors.
        entries: its tensors, as they follow one another.
    """

    path: Path
    head: bytes = field(repr=False)
    entries: tuple[Entry, ...] = field(repr=False)

    @cached_property
    def by_key(self) -> Mapping[str, Entry]:
        """The tensors by name."""
        return {entry.key: entry for entry in self.entries}

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sum(entry.size for entry in self.entries)

    def mapped(self, key: str) -> Tensor:
        """A tensor that lies in the file: pages are read when they are needed, and dropped where memory runs short.

        Raises:
            CheckpointError: if PyTorch has no such dtype, or the file cannot be read.
        """
        entry = self.by_key[key]
        if entry.dtype is None:
            raise CheckpointError(f"{self.path} holds {key} as {entry.kind}, which PyTorch does not know.")
        if not entry.size:
            return torch.empty(entry.shape, dtype=entry.dtype)
        try:
            with open(self.path, "rb") as file:
                memory = mapped(file.fileno(), entry.first, entry.size)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}.") from error
        if entry.first % entry.dtype.itemsize:
            memory = memory.clone()
        return memory.view(entry.dtype).view(entry.shape)


def open_stored(path: Path) -> StoredFile:
    """Read a file's header; its tensors are not touched.

    Raises:
        CheckpointError: if it cannot be read, is cut short, or is no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST + 1
            header = file.read(length) if length <= _LONGEST else b""
            size = path.stat().st_size
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder. Name a .safetensors file.") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    try:
        found: dict[str, Any] = json.loads(header)
        entries = [_entry(key, value, 8 + length) for key, value in found.items() if key != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be read. Fetch or save it again.") from error
    entries.sort(key=lambda entry: (entry.first, entry.size))
    stored = StoredFile(path, start + header, tuple(entries))
    ends = [8 + length, *(entry.first + entry.size for entry in entries)]
    if any(entry.first != end for entry, end in zip(entries, ends, strict=False)) or ends[-1] != size:
        raise CheckpointError(f"{path} holds {size:,} bytes where its header needs {ends[-1]:,}. Fetch or save it again.")
    return stored


def _entry(key: str, value: Mapping[str, Any], base: int) -> Entry:
    first, last = value["data_offsets"]
    shape = tuple(int(size) for size in value["shape"])
    dtype = DTYPES.get(value["dtype"])
    if last < first or (dtype is not None and math.prod(shape) * dtype.itemsize != last - first):
        raise ValueError(key)
    return Entry(key, value["dtype"], shape, base + first, last - first)


Piece = tuple[tuple[slice, ...], tuple[int, ...]]
"""Places along the first axes of a tensor, and the shape of what lies there."""


def pieces(shape: tuple[int, ...], most: int) -> Iterator[Piece]:
    """Cut a tensor, in the order of its bytes, into pieces of at most so many entries, or of one row."""
    yield from _cut((), shape, most)


def _cut(places: tuple[slice, ...], shape: tuple[int, ...], most: int) -> Iterator[Piece]:
    ones = (1,) * len(places)
    rest = math.prod(shape[1:])
    if len(shape) == 0 or math.prod(shape) == 0:
        yield places, (*ones, *shape)
        return
    rows = max(1, most // rest)
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        if rest > most and len(shape) > 1:
            yield from _cut((*places, slice(first, first + 1)), shape[1:], most)
        else:
            yield (*places, slice(first, first + count)), (*ones, count, *shape[1:])


def at_places(log: Tensor, places: Sequence[slice]) -> Tensor:
    """Of what broadcasts to a tensor the part that belongs to a piece."""
    return log[tuple(place if log.size(axis) > 1 else slice(None) for axis, place in enumerate(places))]


def is_counter(key: str) -> bool:
    """Is it batch normalization's step counter, which PyTorch itself fills in?"""
    return key.rpartition(".")[2] == "num_batches_tracked"


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a file of tensors that are in memory.

    Raises:
        OSError: if it cannot be written, for which safetensors has an error of its own.
    """
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata))
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def read_into(file: BinaryIO, path: Path, buffer: Tensor) -> None:
    """Fill a tensor of bytes from where a file stands.

    Raises:
        CheckpointError: if the file ends too early.
    """
    view = memoryview(buffer.numpy())  # pyright: ignore[reportArgumentType]
    while len(view):
        count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise CheckpointError(f"{path} became shorter while it was read. Fetch or save it again.")
        view = view[count:]
