"""From a plan and a file to a rescaled file, a piece at a time: what is on disk under its own name is whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from equinorm._display import and_more, count
from equinorm._errors import RescaleError
from equinorm._scaling import Scaling
from equinorm.checkpoints.stored import CheckpointError, Entry, StoredFile, at_places, pieces, read_into
from equinorm.reporting.files import write_atomically
from equinorm.rescaling.plan import Plan
from equinorm.rescaling.powers_of_two import is_power_of_two, scale_of
from equinorm.rescaling.tensor_write import scaled

_AT_ONCE = 1 << 20
"""Entries of a piece."""

Tick = Callable[[int], None]
"""Told how many bytes more are done."""


@dataclass(frozen=True, slots=True, eq=False)
class Rewriting:
    """What is to be done to files.

    Attributes:
        plan: whose log-scales are multiplied in.
        moves: how each tensor moves, by key; those that are not in it are copied.
        tick: told of progress.
    """

    plan: Plan
    moves: Mapping[str, Scaling] = field(repr=False)
    tick: Tick = field(repr=False, default=lambda size: None)


def moves_of(plan: Plan, entries: Mapping[str, Entry], whole: bool) -> dict[str, Scaling]:
    """How each tensor of some files moves.

    Args:
        plan: for them.
        entries: what the files hold.
        whole: are these all files of a checkpoint, so that nothing may be missing?

    Raises:
        CheckpointError: for keys that the plan does not know, tensors that the files lack, or other shapes.
    """
    scalings = plan.stored or plan.scalings
    known = {name: scaling for scaling in scalings for name in scaling.names}
    if unknown := [key for key in entries if key not in known and not _is_integer(entries[key])]:
        raise CheckpointError(
            f"the plan does not know {count(len(unknown), 'key')}: {and_more(unknown)}. "
            "Make it from this folder: equinorm balance FOLDER --plan FILE."
        )
    for key, entry in entries.items():
        if key in known and entry.shape != known[key].shape:
            raise CheckpointError(f"{key} has shape {entry.shape}, and {known[key].shape} in the plan.")
    lost = [s.name for s in scalings if whole and s.factors and s.kind == "parameter" and entries.keys().isdisjoint(s.names)]
    if lost:
        raise CheckpointError(f"the files lack {count(len(lost), 'tensor')} of the plan: {and_more(lost)}.")
    moved = {key: known[key] for key in entries if key in known and known[key].factors}
    return {key: scaling for key, scaling in moved.items() if does_move(scaling, plan.log_scales)}


def does_move(scaling: Scaling, log_scales: Tensor) -> bool:
    """Is any scale of a tensor other than 1? Factors are looked at one by one: their product is as large as the tensor."""
    return any(bool((log != 0).any()) for log in scaling.log_factors(log_scales))


def _is_integer(entry: Entry) -> bool:
    """Counters and masks, which nothing scales and which no plan lists."""
    return entry.dtype is not None and not entry.dtype.is_floating_point


def rewrite_file(stored: StoredFile, work: Rewriting, output: Path) -> int:
    """Write one file rescaled under a name that must be free; returns how many entries underflowed.

    Raises:
        EquinormError: if a tensor cannot be rescaled exactly, or the file cannot be written; there is none then.
    """
    lost: list[int] = []

    def write(target: Path) -> None:
        with open(stored.path, "rb", buffering=0) as source, open(target, "wb") as file:
            source.seek(len(stored.head))
            file.write(stored.head)
            work.tick(len(stored.head))
            for entry in stored.entries:
                if entry.key in work.moves:
                    lost.append(_rescaled(stored, entry, work, source, file))
                else:
                    copied(stored, entry, work.tick, source, file)

    write_atomically([(output, write)], force=False)
    return sum(lost)


def copied(stored: StoredFile, entry: Entry, tick: Tick, source: BinaryIO, file: BinaryIO) -> None:
    """Write one tensor as it is; the source stands where it begins."""
    buffer = torch.empty(min(entry.size, 4 * _AT_ONCE), dtype=torch.uint8)
    for first in range(0, entry.size, max(1, len(buffer))):
        part = buffer[: entry.size - first]
        read_into(source, stored.path, part)
        file.write(memoryview(part.numpy()))  # pyright: ignore[reportArgumentType]
        tick(len(part))


def _rescaled(stored: StoredFile, entry: Entry, work: Rewriting, source: BinaryIO, file: BinaryIO) -> int:
    """Write one tensor rescaled; returns how many entries underflowed."""
    scaling = work.moves[entry.key]
    if entry.dtype is None or not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
        raise RescaleError(f"cannot rescale {entry.key} of {stored.path}: its dtype is {entry.kind}.")
    logs = scaling.log_factors(work.plan.log_scales)
    step = _Step(entry, scaling.offset, all(map(is_power_of_two, logs)))
    lost = 0
    for places, shape in pieces(entry.shape, _AT_ONCE):
        piece = torch.empty(shape, dtype=entry.dtype)
        read_into(source, stored.path, piece.view(-1).view(torch.uint8))
        here = [at_places(log, places) for log in logs]
        after, below = step.apply(piece, here)
        file.write(memoryview(after.view(-1).view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
        work.tick(piece.numel() * piece.element_size())
        lost += below
    return lost


@dataclass(frozen=True, slots=True)
class _Step:
    """(w + offset) · exp(Σ logs) − offset, for pieces of one tensor.

    Attributes:
        entry: the tensor.
        offset: see `Scaling`.
        is_exact: are the scales powers of two?
    """

    entry: Entry
    offset: float
    is_exact: bool

    def apply(self, piece: Tensor, logs: Sequence[Tensor]) -> tuple[Tensor, int]:
        """The piece rescaled, and how many entries underflowed.

        Raises:
            RescaleError: where it would hold NaN or inf, or where half precision would round it.
        """
        if self.is_exact and not self.offset:
            after = _multiplied(piece, logs)
            back = _multiplied(after, [-log for log in logs])
            if _are_same(back, piece) and _is_finite(piece):  # nothing was lost on the way: 2^k times the original
                return after, 0
        elif piece.element_size() == 2:
            written = f"{self.offset:g} + w" if self.offset else "rounded"
            raise RescaleError(
                f"cannot rescale {self.entry.key} exactly: in {self.entry.kind} it would be {written}. Use powers of two."
            )
        exact = scaled(piece.double() + self.offset, logs) - self.offset
        after = exact.to(piece.dtype)
        if not bool(after.isfinite().all()):
            held = "it holds NaN or inf" if not bool(piece.isfinite().all()) else f"it would overflow {self.entry.kind}"
            raise RescaleError(f"cannot rescale {self.entry.key}: {held}.")
        if self.offset:
            return after, 0
        is_small = after.abs() < torch.finfo(piece.dtype).tiny
        return after, int((is_small & (after.double() != exact)).sum())


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Have two pieces the same bits? Whole numbers are compared faster."""
    wide = torch.int64 if a.numel() * a.element_size() % 8 == 0 else torch.uint8
    return torch.equal(a.view(-1).view(wide), b.view(-1).view(wide))


def _is_finite(piece: Tensor) -> bool:
    return not piece.numel() or all(bool(end.isfinite()) for end in torch.aminmax(piece))


def _multiplied(piece: Tensor, logs: Sequence[Tensor]) -> Tensor:
    """One factor after the other, in the tensor's own precision; out of place."""
    for log in logs:
        piece = piece * scale_of(log).to(piece.dtype)
    return piece if logs else piece.clone()
