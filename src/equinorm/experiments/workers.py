"""Running many runs on the cores there are: processes with one thread each, or this process alone."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equinorm._errors import EquinormError
from equinorm.experiments.config import ExperimentError, Run
from equinorm.experiments.datasets import folders
from equinorm.experiments.results import Result
from equinorm.experiments.trainer import train


@dataclass(frozen=True, slots=True)
class Epoch:
    """A run has finished an epoch."""

    run: Run
    number: int
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str
    trace: str


Listen = Callable[[Epoch], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where runs are made.

    Attributes:
        images: folder of the images, but for digits.
        device: of PyTorch.
        unfinished: folder of the runs on their way; None keeps none.
    """

    images: Path | None = None
    device: str = "cpu"
    unfinished: Path | None = None

    def train(self, run: Run, listen: Listen) -> Result:
        """Make one run, or what is left of it."""
        data = folders.load(run, self.images, self.device)
        return train(run, data, self.device, lambda *state: listen(Epoch(run, *state)), self.unfinished)


class Here:
    """Runs one after the other in this process, with the threads that it has."""

    workers = 1

    def __init__(self, place: Place) -> None:
        self._place, self._waiting = place, queue.SimpleQueue[Run]()

    def start(self, run: Run) -> None:
        """Put a run into the queue."""
        self._waiting.put(run)

    def finish(self, listen: Listen) -> Result:
        """Do the next run."""
        return self._place.train(self._waiting.get(), listen)

    def stop(self) -> None:
        """Nothing to end."""


class Pool:
    """Processes that take runs from a queue; they end with this program."""

    def __init__(self, workers: int, place: Place) -> None:
        context: Any = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA, nor torch's threads
        self.workers = workers
        self._tasks, self._messages = context.SimpleQueue(), context.Queue()
        arguments = (self._tasks, self._messages, place)
        self._processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
        with _interrupts_held():
            for process in self._processes:
                process.start()

    def start(self, run: Run) -> None:
        """Put a run into the queue."""
        self._tasks.put(run)

    def finish(self, listen: Listen) -> Result:
        """The next result of any process.

        Raises:
            ExperimentError: if a process died or its run raised an error.
        """
        while True:
            try:
                message = self._messages.get(timeout=1.0)
            except queue.Empty:
                dead = [process.exitcode for process in self._processes if not process.is_alive()]
                if dead:
                    raise ExperimentError(
                        f"a worker process ended with exit code {dead[0]}; memory may have run out. Use fewer --workers."
                    ) from None
                continue
            if isinstance(message, _Failure):
                raise ExperimentError(message.message) from RuntimeError(message.trace)
            if isinstance(message, Result):
                return message
            listen(message)

    def stop(self) -> None:
        """End all processes at once: of what is not finished, the epochs since it was last saved are lost."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _work(tasks: Any, messages: Any, place: Place) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        run = tasks.get()
        try:
            messages.put(place.train(run, messages.put))
        except ExperimentError as error:  # of the images or the settings, which all runs share
            messages.put(_Failure(str(error), traceback.format_exc()))
        except Exception as error:
            kind = "" if isinstance(error, EquinormError) else f"{type(error).__name__}: "
            messages.put(_Failure(f"{describe(run)} failed: {kind}{error}", traceback.format_exc()))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold interrupts back; processes started here never see one, not even while they import PyTorch."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this process when the program that started it is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def describe(run: Run) -> str:
    """A run in a few words."""
    depth = f" p={run.depth}" if run.network == "fc" else ""
    return f"{run.method}{depth} batch {run.batch} lr {run.lr:g}" + ("" if run.held_out else f" seed {run.seed}")
