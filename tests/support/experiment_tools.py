"""What the tests of the experiments share."""

import pickle
from dataclasses import replace

import numpy as np
import torch

from equinorm.experiments.config import Run
from equinorm.experiments.datasets import in_memory
from equinorm.experiments.results import Curves, Result
from equinorm.experiments.workers import Epoch

TINY = Run(data="digits", depth=2, width=32, batch=128, epochs=2, lr=0.1)
"""A run of a fifth of a second."""


def digits():
    return in_memory.load(TINY, None)


def result(run, accuracy=0.5, diverged=False, **changes):
    """A made-up result."""
    curves = Curves([1.0] * run.epochs, [accuracy] * run.epochs, {"1": [1.0] * (run.epochs + 1)}, [])
    made = Result(run, accuracy, diverged, 10, 100, 5, curves, {}, 1.0, 100.0, (10, 5), "0" * 16, {"commit": None})
    return replace(made, **changes)


class Pretend:
    """A pool whose runs have the accuracies that a function gives."""

    def __init__(self, accuracy, workers=1):
        self.accuracy, self.workers, self.started, self._waiting = accuracy, workers, [], []

    def start(self, run):
        self.started.append(run)
        self._waiting.append(run)
        assert len(self._waiting) <= self.workers

    def finish(self, listen):
        run = self._waiting.pop(0)
        value = self.accuracy(run)
        listen(Epoch(run, 1, 2.0, 0.2))
        return result(run, 0.1 if value is None else value, diverged=value is None)

    def stop(self):
        pass


def write_cifar10(folder, count=20):
    """Random images in CIFAR-10's official layout; returns the training images and labels in order."""
    random = np.random.default_rng(0)
    inner = folder / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    images, labels = [], []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        part = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        names = [*range(10), *random.integers(0, 10, count - 10).tolist()]
        (inner / name).write_bytes(pickle.dumps({b"data": part, b"labels": names, b"batch_label": b"x"}))
        if name != "test_batch":
            images.append(torch.from_numpy(part).reshape(-1, 3, 32, 32))
            labels += names
    return torch.cat(images), torch.tensor(labels)
