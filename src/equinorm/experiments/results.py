"""Results: one JSON line for each run, appended whole, so that several programs may write one file and resume it."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch

from equinorm.experiments.config import ExperimentError, Run
from equinorm.experiments.unfinished import Unfinished
from equinorm.reporting.records import as_json


@dataclass(frozen=True, slots=True)
class Curves:
    """One entry for each epoch; norms and residuals from before the first epoch on.

    Attributes:
        loss: mean training loss.
        accuracy: on the images that the run is scored on.
        norms: ℓ2 norm of each weight, by name.
        residuals: imbalance ρ of the weights; empty where it was not measured.
        residuals_at: p and c at which it was measured, those of the run; files without this were measured at p = 2, c = 1. A c
            that changes while training is followed, and its first value stands here.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    norms: dict[str, list[float]] = field(default_factory=dict)
    residuals: list[float] = field(default_factory=list)
    residuals_at: tuple[float, float] = (2.0, 1.0)


@dataclass(frozen=True, slots=True)
class Result:
    """What came out of one run.

    Attributes:
        run: its configuration.
        accuracy: of the final weights; 1 / classes if the run diverged.
        diverged: the loss or a weight became infinite or NaN, and the run stopped there.
        steps: optimizer steps taken.
        parameters: how many.
        num_free: free scale classes of the network, where they were counted.
        curves: by epoch.
        pictures: three weights before and after training, as `thumbnails.encode` writes them.
        seconds: training, without evaluation and analysis.
        images_per_second: of training.
        images: how many to train on and to score on.
        digest: of the test images.
        source: commit, versions and machine.
    """

    run: Run
    accuracy: float
    diverged: bool
    steps: int
    parameters: int
    num_free: int | None
    curves: Curves
    pictures: dict[str, list[str]]
    seconds: float
    images_per_second: float
    images: tuple[int, int]
    digest: str
    source: dict[str, Any]


def provenance(device: str) -> dict[str, Any]:
    """Commit, versions, machine and number of threads."""
    commit, changed = _commit()
    return {
        "commit": commit,
        "changed": changed,
        "equinorm": metadata.version("equinorm"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }


@lru_cache(maxsize=1)
def _commit() -> tuple[str | None, bool | None]:
    """The commit of this source tree, and whether tracked files differ from it; None outside of a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "results.py") is None:  # installed inside of another repository
        return None, None
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "..")
    return git("rev-parse", "HEAD"), None if changes is None else bool(changes)


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


class Results:
    """A file of results. Reads what others append; a line that was cut off by a crash is skipped."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._read = path, 0
        self.by_run: dict[Run, Result] = {}
        self.refresh()

    @property
    def unfinished(self) -> Path | None:
        """Folder beside the file, of runs on their way."""
        return None if self._path is None else self._path.with_suffix(".unfinished")

    def refresh(self) -> None:
        """Read the lines that were added since the last time.

        Raises:
            ExperimentError: if there is a file that cannot be read.
        """
        if self._path is None or not self._path.exists():
            return
        try:
            with open(self._path, "rb") as file:
                file.seek(self._read)
                lines = file.read().split(b"\n")
        except OSError as error:
            raise ExperimentError(f"cannot read {self._path}: {error.strerror}.") from error
        for line in lines[:-1]:
            self._read += len(line) + 1
            found = _parse(line)
            if found is not None:
                self.by_run[found.run] = found

    def check_writable(self) -> None:
        """Refuse early what could not be kept in the end.

        Raises:
            ExperimentError: if there is a file, but no way to keep other programs from writing it at the same time.
        """
        if self._path is not None:
            _lock()

    def append(self, result: Result) -> None:
        """Keep a result, and write it as one line; then nothing of the run is unfinished.

        Raises:
            ExperimentError: if the file cannot be written.
        """
        self.by_run[result.run] = result
        if self._path is None:
            return
        lock = _lock()
        line = json.dumps(as_json(result), allow_nan=False, separators=(",", ":")) + "\n"
        try:
            with open(self._path, "ab+") as file:
                lock(file)
                size = file.seek(0, os.SEEK_END)
                if size:  # the last writer may have been cut off
                    file.seek(size - 1)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ExperimentError(f"cannot write {self._path}: {error.strerror}. Earlier results are as they were.") from error
        Unfinished(self.unfinished, result.run).remove()


def _lock() -> Callable[[BinaryIO], None]:
    """What locks a file until it is closed; only Unix has it."""
    try:
        import fcntl
    except ImportError as error:
        raise ExperimentError(
            "a file of results is locked while it is written, and this system has no such locks (Python's module fcntl). "
            "Leave out --results."
        ) from error
    return lambda file: fcntl.flock(file, fcntl.LOCK_EX)


def read(path: Path) -> list[Result]:
    """All results of a file, the last one of each run.

    Raises:
        ExperimentError: if it cannot be read or holds none.
    """
    if not path.is_file():
        raise ExperimentError(f"there is no file {path}.")
    results = list(Results(path).by_run.values())
    if not results:
        raise ExperimentError(f"{path} holds no results. Write some with equinorm train --results {path}.")
    return results


def _parse(line: bytes) -> Result | None:
    try:
        found = json.loads(line)
        parts = {item.name: found[item.name] for item in fields(Result)}
        parts["run"] = Run(**found["run"])
        norms = {name: _floats(values) for name, values in found["curves"]["norms"].items()}
        lists = {name: _floats(found["curves"][name]) for name in ("loss", "accuracy", "residuals")}
        p, c = _floats(found["curves"].get("residuals_at", (2.0, 1.0)))
        parts["curves"] = Curves(**lists, norms=norms, residuals_at=(p, c))
        parts["images"] = tuple(found["images"])
        return Result(**parts)
    except (ValueError, KeyError, TypeError):
        return None


def _floats(values: list[Any]) -> list[float]:
    """Numbers, and what JSON cannot hold, written "nan" or "inf"."""
    return [float(value) for value in values]


def rounded(values: list[float]) -> list[float]:
    """Numbers to six significant digits: enough for a curve."""
    return [float(f"{value:.6g}") if math.isfinite(value) else value for value in values]
