"""Two checkpoints' folders, compared a component at a time; and whether there is memory to load both."""

import importlib
import math
from pathlib import Path
from typing import Any

from equinorm.checkpoints.comparing import CANONICAL, Difference, check_same, difference
from equinorm.checkpoints.folder import Checkpoint
from equinorm.cli.folders import Folder, Meter
from equinorm.cli.libraries import described
from equinorm.cli.terminal import Steps
from equinorm.cli.weights import InputError, shorten

_BYTES_A_WEIGHT, _BYTES_ELSE = 50, 0.5e9
"""What `equinorm.equivalence` takes beside both models: for each weight of one of them, and the exports."""

_INERT = {"_name_or_path", "transformers_version", "use_cache"}
"""Of config.json what no outputs depend on."""

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container says how much memory it may use."""


def streamed_difference(a: Folder, b: Folder, steps: Steps) -> tuple[Difference, list[str]]:
    """How the weights of two folders differ once scales are taken out, and what the user must know of that.

    Raises:
        EquinormError: if their models run different operations, or hold other tensors.
    """
    check_same(a.checkpoint, b.checkpoint)
    if a.symmetries.fingerprint != b.symmetries.fingerprint:
        names = f"{a.checkpoint.folder} and {b.checkpoint.folder}"
        why = "".join(f" ({note})" for note in unlike_settings(a.checkpoint.folder, b.checkpoint.folder))
        raise InputError(f"{names} run different operations{why}: rescalings join networks of one architecture only.")
    task = a.task(CANONICAL)
    held, notes = task.held()
    meter = Meter(steps, "comparing", a.checkpoint.size + b.checkpoint.size)
    found = difference(task, b.checkpoint, held, meter.tick)
    if found.dead and found.different:
        notes.append(f"{found.dead:,} channels are dead: no weights tell their scales, which were taken for 1")
    return found, [*dict.fromkeys((*a.notes, *b.notes, *notes))]


def unlike_settings(a: Path, b: Path) -> tuple[str, ...]:
    """What config.json of two folders says otherwise, in a note: weights may be the same and outputs not."""
    one, other = (described(folder) for folder in (a, b))
    keys = sorted(key for key in {*one, *other} - _INERT if one.get(key) != other.get(key))
    return (f"config.json differs in {shorten(keys)}",) if keys else ()


def why_not_loaded(a: Checkpoint, b: Checkpoint) -> str:
    """Why two folders are not loaded to look for more than scales; empty if there is memory for that."""
    weights = sum(math.prod(entry.shape) for entry in a.entries.values())
    needed, free = a.size + b.size + _BYTES_A_WEIGHT * weights + _BYTES_ELSE, _free_memory()
    if free is not None and needed <= free:
        return ""
    there = "how much is free is not known without psutil" if free is None else f"{free / 1e9:.1f} are free"
    return (
        f"that takes {needed / 1e9:.1f} GB of memory, and {there}. Repeat this on a larger machine, or name hf:{a.folder} and "
        f"hf:{b.folder} to load them all the same"
    )


def _free_memory() -> int | None:
    """Bytes that can be had without swapping, within the limit of a container; None if nothing tells."""
    try:
        psutil: Any = importlib.import_module("psutil")
    except ModuleNotFoundError:
        return None
    limits = [path.read_text("ascii").strip() for path in _LIMITS if path.is_file()]
    own = psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *(int(limit) - own for limit in limits if limit.isdecimal())])
