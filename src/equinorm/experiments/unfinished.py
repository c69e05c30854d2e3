"""Runs on their way, in files beside the results: one that was interrupted goes on behind its last saved epoch."""

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from equinorm._errors import first_line
from equinorm.experiments.config import ExperimentError, Run
from equinorm.reporting.files import OutputError, make_folder, write_atomically
from equinorm.reporting.records import as_json

SAVED_EVERY = 30.0
"""Seconds between two saves, at least."""

State = dict[str, Any]
"""Tensors, numbers, and lists and dictionaries of them."""


class Unfinished:
    """The file of one run.

    Args:
        folder: that it lies in; None keeps nothing.
        run: whose it is.
    """

    def __init__(self, folder: Path | None, run: Run) -> None:
        name = hashlib.sha256(json.dumps(as_json(run), sort_keys=True).encode()).hexdigest()[:16]
        self._path = None if folder is None else folder / f"{run.network}-{run.method}-{name}.pt"
        self._saved = time.perf_counter()

    def load(self, device: str, maker: Mapping[str, Any]) -> State | None:
        """What was saved last; None where nothing was.

        Args:
            device: to load tensors to.
            maker: what must not change on the way, such as versions; the state's entry "maker" is that of its time.

        Raises:
            ExperimentError: if the file cannot be read, or something else began the run.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            state = torch.load(self._path, map_location=device, weights_only=True)
            begun = state["maker"]
        except FileNotFoundError:  # another program has just finished the run
            return None
        except Exception as error:  # of a file that is cut off, PyTorch raises almost any
            reason = first_line(error)
            raise ExperimentError(f"cannot read the unfinished run {self._path}: {reason}. Delete it to start over.") from error
        for name, value in maker.items():
            if begun.get(name) != value:
                raise ExperimentError(
                    f"the unfinished run {self._path} was begun with {name} {begun.get(name)}, and here it is {value}. "
                    "Delete the file to start over."
                )
        return state

    def save(self, state: Callable[[], State]) -> None:
        """Keep a state, unless one has just been kept.

        Raises:
            OutputError: if it cannot be written; the last one is as it was.
        """
        if self._path is None or time.perf_counter() - self._saved < SAVED_EVERY:
            return
        content = io.BytesIO()  # of a file that it cannot write, PyTorch says not why
        torch.save(state(), content)
        try:
            _write(self._path, content)
        except OutputError:  # another program that made the same run has just finished it, and removed the folder
            _write(self._path, content)
        self._saved = time.perf_counter()

    def remove(self) -> None:
        """Delete the file, what a program that was killed left of it, and the folder with the last one."""
        if self._path is None:
            return
        for path in (self._path, *self._path.parent.glob(f".{self._path.name}.*.tmp")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still in it
            self._path.parent.rmdir()


def _write(path: Path, content: io.BytesIO) -> None:
    """Write a file, and the folder that it lies in."""
    make_folder(path.parent)
    write_atomically([(path, content.getbuffer())], True)
