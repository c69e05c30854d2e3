"""Is there memory for models that are loaded as a whole?"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equinorm.checkpoints.folder import Checkpoint, open_checkpoint
from equinorm.cli.loading import is_folder
from equinorm.cli.weights import InputError

_BYTES_A_WEIGHT = 50
"""What `equinorm.equivalence` and `align` take beside the models, for each weight of the first.

`canonical` and `equalize` take less, `equalize` about 30 beside what activations take.
"""

_ELSE = 0.5e9
"""Bytes that PyTorch, transformers and exports take."""

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container says how much memory it may use."""


def shortage(checkpoints: Sequence[Checkpoint]) -> str:
    """What is missing to load checkpoints and to work on them; empty if nothing is."""
    weights = sum(math.prod(entry.shape) for entry in checkpoints[0].entries.values())
    needed, free = sum(checkpoint.size for checkpoint in checkpoints) + _BYTES_A_WEIGHT * weights + _ELSE, _free_memory()
    if free is not None and needed <= free:
        return ""
    there = "how much is free is not known without psutil" if free is None else f"{free / 1e9:.1f} are free"
    return f"that takes {needed / 1e9:.1f} GB of memory, and {there}"


def check_room(*models: str) -> None:
    """Refuse folders that are loaded as a whole where memory is known not to suffice; hf:FOLDER is tried all the same.

    Raises:
        InputError: which says how much is missing.
    """
    folders = [open_checkpoint(Path(name).expanduser()) for name in models if is_folder(name)]
    if folders and _free_memory() is not None and (lacking := shortage(folders)):
        names = " and ".join(f"hf:{checkpoint.folder}" for checkpoint in folders)
        raise InputError(f"the models are loaded as a whole: {lacking}. Go to a larger machine, or name {names} to try it.")


def _free_memory() -> int | None:
    """Bytes that can be had without swapping, within the limit of a container; None if nothing tells."""
    try:
        psutil: Any = importlib.import_module("psutil")
    except ModuleNotFoundError:
        return None
    limits = [path.read_text("ascii").strip() for path in _LIMITS if path.is_file()]
    own = psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *(int(limit) - own for limit in limits if limit.isdecimal())])
