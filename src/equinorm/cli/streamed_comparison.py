"""Two checkpoints' folders, compared a component at a time; and whether there is memory to load both."""

from pathlib import Path

from equinorm._display import count
from equinorm.checkpoints.comparing import CANONICAL, Difference, check_same, difference
from equinorm.checkpoints.folder import Checkpoint
from equinorm.cli.folders import Folder, Meter
from equinorm.cli.libraries import described
from equinorm.cli.memory import shortage
from equinorm.cli.terminal import Steps
from equinorm.cli.weights import InputError, shorten

_INERT = {"_name_or_path", "transformers_version", "use_cache"}
"""Of config.json what no outputs depend on."""


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
        dead = count(found.dead, "channel is", "channels are")
        notes.append(f"{dead} dead: no weights tell the scale, which was taken for 1")
    return found, [*dict.fromkeys((*a.notes, *b.notes, *notes))]


def unlike_settings(a: Path, b: Path) -> tuple[str, ...]:
    """What config.json of two folders says otherwise, in a note: weights may be the same and outputs not."""
    one, other = (described(folder) for folder in (a, b))
    keys = sorted(key for key in {*one, *other} - _INERT if one.get(key) != other.get(key))
    return (f"config.json differs in {shorten(keys)}",) if keys else ()


def why_not_loaded(a: Checkpoint, b: Checkpoint) -> str:
    """Why two folders are not loaded to look for more than scales; empty if there is memory for that."""
    lacking = shortage((a, b))
    if not lacking:
        return ""
    return f"{lacking}. Repeat this on a larger machine, or name hf:{a.folder} and hf:{b.folder} to load them all the same"
