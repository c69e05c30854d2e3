"""Writing in place, all or nothing: what was written is put back where a write fails, and Ctrl-C waits."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from equinorm._class_ids import slices_at_once
from equinorm._errors import RescaleError
from equinorm._memory import STRIP
from equinorm.rescaling.compiled import FEW, Compiled
from equinorm.rescaling.powers_of_two import is_power_of_two
from equinorm.rescaling.tensor_write import Write, scaled, shifted

KEPT = 1 << 26
"""Bytes of originals that are kept while tensors are written; what is beyond is put back by the inverse scales."""

ALIGNED = 16
"""Bytes of which the address of a copy is a multiple."""

NEIGHBOURS = 32
"""Most that share a scale where one for each of them is faster."""


@dataclass(slots=True, eq=False)
class _Piece:
    """What one operation writes.

    Attributes:
        write: to which it belongs.
        memory: the tensor, or a strip of it.
        logs: of the scales that are multiplied in.
        scale: which is multiplied in directly; None for a copy in float64.
        original: what was there; None if it is not kept.
        is_written: has the operation ended?
    """

    write: Write
    memory: Tensor
    logs: list[Tensor]
    scale: Tensor | None = None
    original: Tensor | None = None
    is_written: bool = False

    def write_(self) -> None:
        """Do it: in the tensor's own precision, or by a copy in float64."""
        if self.write.offset:
            self.memory.copy_(self.write.shifted())
        elif self.scale is not None:
            self.memory.mul_(_spread(self.scale.to(self.memory.device, self.memory.dtype), self.memory))
        else:
            self.memory.copy_(scaled(self.memory, self.logs))
        self.is_written = True

    def put_back_(self) -> None:
        """Put back what was there: the copy of it, or by the inverse scales."""
        if self.original is not None:
            self.memory.copy_(self.original.view(self.memory.shape))
        elif self.is_written:
            inverse = [-log for log in self.logs]
            if self.write.offset:
                self.memory.copy_(shifted(self.memory, inverse, self.write.offset))
            else:
                self.memory.copy_(scaled(self.memory, inverse))


def _spread(scale: Tensor, memory: Tensor) -> Tensor:
    """A scale for each entry of a row, where one for a few neighbours would be several times slower, as for a small kernel."""
    if memory.dim() < 3 or memory.device.type != "cpu" or scale.dim() != memory.dim() or not memory.is_contiguous():
        return scale
    run, is_along = math.prod(memory.shape[2:]), 1 < scale.size(1) == scale.numel()
    return (
        scale.expand(1, *memory.shape[1:]).contiguous()
        if is_along and 1 < run <= NEIGHBOURS and memory.size(0) >= FEW
        else scale
    )


def _pieces(write: Write, is_direct: bool) -> Iterator[_Piece]:
    """A factor at a time, or a strip at a time to spare memory."""
    if write.offset:
        yield _Piece(write, write.tensor, write.logs)
    elif is_direct:
        yield from (_Piece(write, write.tensor, [factor.log], factor.scale) for factor in write.factors)
    else:
        whole = write.tensor if write.tensor.dim() else write.tensor[None]
        rows = max(1, STRIP * len(whole) // max(1, whole.numel()))
        for first in range(0, len(whole), rows):
            here = slice(first, first + rows)
            yield _Piece(write, whole[here], [log[here] if log.dim() and len(log) > 1 else log for log in write.logs])


class _Originals:
    """Copies of what is going to be written, in one piece of memory, which costs a third of many fresh ones.

    Args:
        writes: which are to come.
    """

    def __init__(self, writes: Sequence[Write]) -> None:
        self._kept, self._next, self._memory = 0, 0, torch.zeros(0, dtype=torch.uint8)
        self._last: _Piece | None = None
        with contextlib.suppress(MemoryError):  # numpy asks for large pages
            self._memory = torch.from_numpy(np.empty(min(KEPT, sum(_room(write.tensor) for write in writes)), np.uint8))

    def keep(self, pieces: Sequence[_Piece]) -> None:
        """Copy what these will write, neighbours together; not where too much is kept already, or there is no memory for it."""
        together: list[_Piece] = []
        for piece in pieces:
            memory, last = piece.memory, self._last
            if last is not None and last.memory is memory:
                continue  # it is kept already
            self._last = piece if self._kept + memory.nbytes <= KEPT else None
            if self._last is None:
                continue
            self._kept += memory.nbytes
            if memory.device.type != "cpu" or not memory.is_contiguous():
                with contextlib.suppress(RuntimeError, MemoryError):
                    piece.original = memory.clone()
                continue
            if together and together[0].memory.dtype != memory.dtype:
                self._copy(together)
                together = []
            together.append(piece)
        self._copy(together)

    def _copy(self, pieces: Sequence[_Piece]) -> None:
        """Copies of contiguous memory of one dtype, one after the other."""
        if not pieces:
            return
        flats = [piece.memory.view(-1) for piece in pieces]
        sizes = [flat.numel() for flat in flats]
        dtype, first, size = flats[0].dtype, self._next, sum(sizes) * flats[0].element_size()
        with contextlib.suppress(RuntimeError, MemoryError):
            if first + size <= len(self._memory):
                self._next += -(-size // ALIGNED) * ALIGNED
                copies = torch.cat(flats, out=self._memory[first : first + size].view(dtype))
            else:
                copies = torch.cat(flats)
            for piece, original in zip(pieces, copies.split(sizes), strict=True):
                piece.original = original


def _room(tensor: Tensor) -> int:
    """Bytes that a copy takes, so that the next one begins at an even address."""
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


def write_(writes: Sequence[Write], direct: Sequence[bool]) -> None:
    """Write all of them, or none.

    Args:
        writes: which have been checked.
        direct: may one factor after the other be multiplied in?

    Raises:
        RescaleError: if an operation fails. What had been written is put back then: bitwise, but for scales that are no powers
            of two in models of more than `KEPT` bytes, where it is to rounding. The message names these.
    """
    begun: list[_Piece] = []
    compiled = Compiled(writes, direct)
    rest = [(write, d) for write, d, is_compiled in zip(writes, direct, compiled.chosen, strict=True) if not is_compiled]
    originals = _Originals([write for write, _ in rest])
    with torch.no_grad(), uninterrupted():
        try:
            pieces = [piece for write, is_direct in rest for piece in _pieces(write, is_direct)]
            for here in slices_at_once([piece.memory.numel() for piece in pieces]):
                originals.keep(pieces[here])
                for piece in pieces[here]:
                    begun.append(piece)
                    piece.write_()
            compiled.write_()
        except BaseException as error:
            if compiled.is_done:  # it came too late
                raise
            outcome = _put_back(begun)
            if not isinstance(error, Exception):
                raise
            what = begun[-1].write.what if begun else "the first tensor"
            raise RescaleError(f"writing {what} failed: {type(error).__name__}: {error}. {outcome}") from error


def _put_back(begun: Sequence[_Piece]) -> str:
    """Undo what was begun, last first; says how well that went."""
    rounded: dict[str, None] = {}
    lost: dict[str, None] = {}
    for piece in reversed(begun):
        what = piece.write.what
        try:
            piece.put_back_()
        except Exception:
            lost[what] = None
            continue
        if piece.original is None and piece.is_written and not all(map(is_power_of_two, piece.logs)):
            rounded[what] = None
        elif piece.original is not None and piece.memory is piece.write.tensor:
            rounded.pop(what, None)
    if lost:
        return f"These could not be put back, load them again: {', '.join(lost)}."
    return "All is as it was before." + (f" Put back to within rounding: {', '.join(rounded)}." if rounded else "")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])
