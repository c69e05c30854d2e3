"""Checkpoints' folders on the command line: analysed without numbers, and read a component at a time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from equinorm._display import and_more, count
from equinorm._symmetries import Symmetries, symmetries_of
from equinorm.balancing.options import BalanceOptions
from equinorm.checkpoints.conversion import Conversion, stored_scalings
from equinorm.checkpoints.folder import Checkpoint, open_checkpoint, quantized
from equinorm.checkpoints.solving import Task
from equinorm.cli.libraries import described
from equinorm.cli.loading import Loaded, ModelSource, load
from equinorm.cli.terminal import Steps
from equinorm.cli.weights import InputError
from equinorm.discovery.graph.of_model import graphs_of

_INSTEAD = (
    "Rounded numbers and their scales are not rescaled. Balance the weights that they were made from, or multiply them out "
    "into bfloat16 first; then quantize."
)


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """A checkpoint whose symmetries are known and whose weights were not read.

    Attributes:
        loaded: its model, on the meta device.
        symmetries: of the model; no values inside are recorded.
        checkpoint: the files.
        conversion: how the tensors of the files move.
        notes: what the user must know of them.
    """

    loaded: Loaded
    symmetries: Symmetries = field(repr=False)
    checkpoint: Checkpoint
    conversion: Conversion
    notes: tuple[str, ...] = ()

    def task(self, options: BalanceOptions, power_of_two: bool = False) -> Task:
        """What is to be solved."""
        return Task(self.checkpoint, self.symmetries, self.conversion, options, power_of_two)


def analysed(name: str, steps: Steps, inputs: Sequence[str] = (), opaque: Sequence[str] = (), trust: bool = False) -> Folder:
    """Find the symmetries of a folder's model and how its files move.

    Raises:
        InputError: if it is no checkpoint that transformers can build, or its weights are quantized.
        EquinormError: if files and model do not fit together, or the model cannot be exported.
    """
    folder = Path(name).expanduser()
    steps.say(f"reading the headers of {name}")
    method = described(folder).get("quantization_config")
    if method is not None:
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise InputError(f"the weights of {name} are quantized (method {method}). {_INSTEAD}")
    checkpoint = open_checkpoint(folder)
    if (narrow := quantized(checkpoint)) is not None:
        entry, scales = narrow
        raise InputError(
            f"the weights of {name} are quantized, although its config.json does not say so (quantization_config): {entry.key} "
            f"holds {entry.kind} numbers, which {scales} scales. {_INSTEAD}"
        )
    steps.say(f"building {name} without its weights")
    loaded = replace(load(ModelSource(f"hf:{folder}", trust=trust, device="meta"), inputs), name=str(folder))
    steps.say("finding symmetries")
    found = symmetries_of(graphs_of(loaded.model, loaded.args, loaded.kwargs, opaque), inner=False)
    conversion = stored_scalings(loaded.model, found.scalings, checkpoint.entries)
    notes = list(loaded.notes)
    if conversion.ignored:
        keys = count(len(conversion.ignored), "key is", "keys are")
        notes.append(f"{keys} not read by the model: {and_more(conversion.ignored, 3)}")
    return Folder(loaded, found, checkpoint, conversion, tuple(notes))


class Meter:
    """Bytes that are done, and the time that is left.

    Args:
        steps: where to say so.
        text: what is done.
        total: bytes there are.
    """

    def __init__(self, steps: Steps, text: str, total: int) -> None:
        self._steps, self._text, self._total = steps, text, total
        self._done, self._began = 0, time.monotonic()

    def tick(self, size: int) -> None:
        """So many bytes more."""
        self._done += size
        spent = time.monotonic() - self._began
        left = spent * max(self._total - self._done, 0) / max(self._done, 1)
        minutes, seconds = divmod(round(left), 60)
        text = f"{self._text}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {minutes}:{seconds:02} left"
        self._steps.count(self._done, self._total, text)
