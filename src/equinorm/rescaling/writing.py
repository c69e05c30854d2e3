"""Writing in place, all or nothing: what was written is put back where a write fails, and Ctrl-C waits."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from equinorm._errors import RescaleError
from equinorm._memory import STRIP
from equinorm.rescaling.powers_of_two import LN2, is_power_of_two, scale_of

KEPT = 1 << 26
"""Bytes of originals that are kept while tensors are written; what is beyond is put back by the inverse scales."""

_STEP, _END = 1000 * LN2, 2200 * LN2
"""Logarithms of one factor in float64, and of one that takes every number of float64 out of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """tensor ← (tensor + offset) · Π scales − offset.

    Attributes:
        what: its name.
        tensor: to be written.
        logs: natural logarithms of the scales, which broadcast to the tensor.
        is_weight: a parameter or buffer, not what belongs to it.
        offset: number that the network adds before it uses the tensor.
        is_squared: does the network take norms of it?
    """

    what: str
    tensor: Tensor
    logs: list[Tensor]
    is_weight: bool = False
    offset: float = 0.0
    is_squared: bool = False

    def shifted(self) -> Tensor:
        """What a tensor with an offset becomes."""
        return (scaled(self.tensor.double() + self.offset, self.logs) - self.offset).to(self.tensor.dtype)


def scaled(tensor: Tensor, logs: Sequence[Tensor]) -> Tensor:
    """tensor · exp(Σ logs), in float64; also where the scale alone is beyond float64."""
    result = tensor.detach().to(torch.float64)
    rest = sum(logs, start=torch.zeros((), dtype=torch.float64)).clamp(-_END, _END)
    while bool((rest != 0).any()):
        step = rest.clamp(-_STEP, _STEP)
        result = result * scale_of(step).to(tensor.device)
        rest = rest - step
    return result


@dataclass(slots=True, eq=False)
class _Piece:
    """What one operation writes.

    Attributes:
        write: to which it belongs.
        memory: the tensor, or a strip of it.
        logs: of the scales that are multiplied in.
        original: what was there; None if it is not kept.
        is_written: has the operation ended?
    """

    write: Write
    memory: Tensor
    logs: list[Tensor]
    original: Tensor | None = None
    is_written: bool = False

    def write_(self, is_direct: bool) -> None:
        """Do it: in the tensor's own precision, or by a copy in float64."""
        if self.write.offset:
            self.memory.copy_(self.write.shifted())
        elif is_direct:
            self.memory.mul_(scale_of(self.logs[0]).to(self.memory.device, self.memory.dtype))
        else:
            self.memory.copy_(scaled(self.memory, self.logs))
        self.is_written = True

    def put_back_(self) -> None:
        """Undo it."""
        if self.original is not None:
            self.memory.copy_(self.original)
        elif self.is_written:
            inverse = [-log for log in self.logs]
            if self.write.offset:
                self.memory.copy_(Write("", self.memory, inverse, offset=self.write.offset).shifted())
            else:
                self.memory.copy_(scaled(self.memory, inverse))


def _pieces(write: Write, is_direct: bool) -> Iterator[_Piece]:
    """A factor at a time, or a strip at a time to spare memory."""
    if write.offset:
        yield _Piece(write, write.tensor, write.logs)
    elif is_direct:
        yield from (_Piece(write, write.tensor, [log]) for log in write.logs)
    else:
        whole = write.tensor if write.tensor.dim() else write.tensor[None]
        rows = max(1, STRIP * len(whole) // max(1, whole.numel()))
        for first in range(0, len(whole), rows):
            here = slice(first, first + rows)
            yield _Piece(write, whole[here], [log[here] if log.dim() and len(log) > 1 else log for log in write.logs])


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
    room = KEPT
    with torch.no_grad(), uninterrupted():
        try:
            for write, is_direct in zip(writes, direct, strict=True):
                for piece in _pieces(write, is_direct):
                    size = piece.memory.numel() * piece.memory.element_size()
                    is_kept = bool(begun) and begun[-1].memory is piece.memory and begun[-1].original is not None
                    if size <= room and not is_kept:
                        with contextlib.suppress(RuntimeError, MemoryError):  # no room for it
                            piece.original = piece.memory.clone()
                        room -= size
                    begun.append(piece)
                    piece.write_(is_direct)
        except BaseException as error:
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
