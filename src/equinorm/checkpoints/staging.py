"""A folder is prepared beside its place and takes its name at once; what was begun goes on."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from equinorm._errors import EquinormError
from equinorm.checkpoints.folder import Checkpoint
from equinorm.checkpoints.rewriting import Rewriting, Tick, rewrite_file
from equinorm.checkpoints.stored import StoredFile
from equinorm.reporting.files import OutputError, write_atomically
from equinorm.reporting.words import in_bytes

_STATE, _COUNTS = "state.json", "counts.json"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What became of a folder.

    Attributes:
        underflows: entries whose last bits, or all, were lost below the smallest number of their dtype.
        resumed: files that an earlier run had written.
        left: files of the folder that were not copied, since they may hold other weights.
    """

    underflows: int
    resumed: int
    left: tuple[str, ...]


def staging_of(output: Path) -> Path:
    """Where a folder is prepared: beside it, so that it takes its name at once."""
    target = output.resolve()
    return target.parent / f".{target.name}.equinorm"


def check_output(checkpoint: Checkpoint, output: Path) -> None:
    """Refuse early a folder that could not be written in the end.

    Raises:
        OutputError: if it exists, lies in the folder that is read, or in none.
        CheckpointError: if a file cannot come along.
    """
    target, source = output.resolve(), checkpoint.folder.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{output} exists, and folders are not replaced. Remove it, or write to another name.")
    if os.path.ismount(target):
        raise OutputError(f"{output} is where a disk is mounted, and cannot be replaced. Write to a folder in it.")
    if target == source or source in target.parents:
        raise OutputError(f"{output} lies in the folder that is read. Write to another one.")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {output}: there is no folder {target.parent}. Create it first.")
    checkpoint.others()  # raises for links that lead nowhere


def prepare(checkpoint: Checkpoint, output: Path, job: Mapping[str, Any]) -> Path:
    """Begin a folder, or go on with one that an earlier run has begun; nothing of the source is read.

    Args:
        checkpoint: to be rewritten.
        output: folder to write.
        job: what identifies the work, for JSON: an earlier run must have had the same.

    Raises:
        OutputError: if the output exists, cannot be created, has no room, or was begun otherwise.
        CheckpointError: if a file of the folder cannot come along.
    """
    check_output(checkpoint, output)
    target, staging = output.resolve(), staging_of(output)
    state = json.dumps({"source": _identity(checkpoint), **job}, sort_keys=True, default=str)
    begun, inside = staging / _STATE, staging / "out"
    try:
        if begun.exists() and begun.read_text("utf-8") != state:
            raise OutputError(
                f"{staging} was begun from other files or with other options. Remove it, or repeat those to go on."
            )
        done = sum(path.stat().st_size for path in inside.iterdir() if path.is_file()) if inside.is_dir() else 0
        room, needed = shutil.disk_usage(target.parent).free, checkpoint.size - done
        if room < needed:
            raise OutputError(f"cannot write {output}: it takes {in_bytes(needed)}, and {in_bytes(room)} are free.")
        inside.mkdir(parents=True, exist_ok=True)
        for left in [*staging.glob(".*.tmp"), *inside.glob(".*.tmp")]:
            left.unlink()  # what a run that was killed was writing
        if not begun.exists():
            write_atomically([(begun, state.encode())], force=True)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}. Nothing was written.") from error
    return staging


def _identity(checkpoint: Checkpoint) -> list[Any]:
    """Which files are read, without reading them."""
    facts = [(file.path, file.path.stat()) for file in checkpoint.files]
    return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in facts]


def rewrite_folder(checkpoint: Checkpoint, work: Rewriting, output: Path) -> Rewritten:
    """Write a folder rescaled, file by file; go on where an earlier run of the same plan was interrupted.

    Raises:
        EquinormError: if a tensor cannot be rescaled exactly or the output cannot be written. There is none then; what is
            finished is kept beside it, for the next run.
    """
    plan = work.plan
    staging = prepare(checkpoint, output, {"plan": plan.fingerprint, "log_scales": digest(plan.log_scales)})
    with kept(staging):
        return finish(checkpoint, work, output, staging)


@contextlib.contextmanager
def kept(staging: Path | None) -> Iterator[None]:
    """Keep what was begun for another run, but not where that would end as this one did: where weights are refused."""
    try:
        yield
    except OutputError:
        raise
    except EquinormError:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def finish(checkpoint: Checkpoint, work: Rewriting, output: Path, staging: Path) -> Rewritten:
    """The same in a folder that is prepared."""
    return fill(checkpoint, lambda file, path: rewrite_file(file, work, path), output, staging, work.tick)


def fill(
    checkpoint: Checkpoint,
    write: Callable[[StoredFile, Path], int],
    output: Path,
    staging: Path,
    tick: Tick = lambda size: None,
) -> Rewritten:
    """Write the files of a folder that is prepared, and let it take its name.

    Args:
        checkpoint: whose files are written anew.
        write: one of them under a path; returns how many entries underflowed.
        output: folder to write.
        staging: where it was prepared.
        tick: told how many bytes an earlier run had written.

    Raises:
        EquinormError: as `write` does, or if the output cannot be written.
    """
    target, inside = output.resolve(), staging / "out"
    lost, resumed = _read_counts(staging), 0
    for file in checkpoint.files:
        path = inside / file.path.name
        if path.exists() and file.path.name in lost:
            resumed += 1
            tick(file.size)
            continue
        path.unlink(missing_ok=True)
        try:
            lost[file.path.name] = write(file, path)
        except OutputError as error:
            raise OutputError(f"{error} {len(lost)} finished files are kept in {staging}: run again to go on.") from error
        write_atomically([(staging / _COUNTS, json.dumps(lost).encode())], force=True)
    same, left = checkpoint.others()
    try:
        for path in same:
            (inside / path).parent.mkdir(parents=True, exist_ok=True)
            (inside / path).unlink(missing_ok=True)  # of an earlier run, which may be read-only
            shutil.copy2(checkpoint.folder / path, inside / path)
            _sync(inside / path)
        for folder in (inside, staging):
            _sync(folder)
        os.rename(inside, target)
        _sync(target.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write {output}: {error.strerror}. It is prepared in {staging}: run again to go on."
        ) from error
    shutil.rmtree(staging, ignore_errors=True)
    return Rewritten(sum(lost.values()), resumed, tuple(path.as_posix() for path in left))


def _read_counts(staging: Path) -> dict[str, int]:
    """Underflows of the files that an earlier run has finished."""
    try:
        return {str(name): int(count) for name, count in json.loads((staging / _COUNTS).read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _sync(path: Path) -> None:
    """Wait until the disk has it; folders cannot be synced on every system."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def digest(log_scales: Tensor) -> str:
    """Tells log-scales apart."""
    return hashlib.sha256(log_scales.contiguous().numpy().tobytes()).hexdigest()
