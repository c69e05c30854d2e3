"""Folders of images, one for each class, in `train` and `val`: ImageNet's layout, its standard crops and flips."""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from equinorm.experiments.config import ExperimentError, Run
from equinorm.experiments.datasets import in_memory
from equinorm.experiments.datasets.in_memory import Data, needed, split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, RESIZED = 224, 256
_FEW = 1000
"""So few images are read by this process."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageFolder:
    """Images on disk.

    Attributes:
        training: torchvision's ImageFolder with random crops (scales 0.08 to 1) and flips.
        scoring: the same images, resized to 256 and cropped to the middle 224.
        rows: which of them belong to the set.
        device: where batches go.
    """

    training: Any
    scoring: Any
    rows: Tensor
    device: str

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, order: Tensor | None = None, augment: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images and labels: with an order for training, without one for scoring."""
        rows = self.rows if order is None else self.rows[order]
        chosen = Subset(self.scoring if order is None else self.training, rows.tolist())
        # a process that ends with its parent may have no children of its own
        alone = len(rows) < _FEW or multiprocessing.current_process().daemon
        loader = DataLoader(
            chosen, size, num_workers=0 if alone else min(os.cpu_count() or 1, 16), pin_memory="cuda" in self.device
        )
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def load(run: Run, folder: Path | None, device: str = "cpu") -> Data:
    """The images of a run: those below `folder/train` and `folder/val`, or those of `in_memory.load`.

    Raises:
        ExperimentError: if they cannot be read, torchvision is missing, or the classes of the two folders differ.
    """
    return _folder(needed(folder, run.data), device) if run.data == "images" else in_memory.load(run, folder, device)


def _folder(folder: Path, device: str) -> Data:
    try:
        from torchvision import datasets, transforms
    except (ImportError, RuntimeError) as error:
        raise ExperimentError(
            f"folders of images are read by torchvision, which cannot be imported: {error}. "
            "It comes with 'equinorm[experiments]'."
        ) from error
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    random = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), *last])
    middle = transforms.Compose([transforms.Resize(RESIZED), transforms.CenterCrop(SIZE), *last])

    def read(name: str, transform: Any) -> Any:
        try:
            return datasets.ImageFolder(str(folder / name), transform)
        except FileNotFoundError as error:
            raise ExperimentError(
                f"cannot read {folder / name}: {error}. --data must name a folder with train and val, each with a folder of "
                "images for every class."
            ) from error

    training, scoring, tested = read("train", random), read("train", middle), read("val", middle)
    if training.classes != tested.classes:
        raise ExperimentError(f"{folder}: train and val hold other classes.")
    names = "\n".join(f"{Path(path).relative_to(folder)} {os.path.getsize(path)}" for path, _ in tested.samples)
    kept, held_out = split(len(training))
    whole = ImageFolder(training, scoring, torch.arange(len(training)), device)
    return Data(
        train=whole,
        kept=replace(whole, rows=kept),
        held_out=replace(whole, rows=held_out),
        test=ImageFolder(tested, tested, torch.arange(len(tested)), device),
        shape=(3, SIZE, SIZE),
        classes=len(training.classes),
        digest=hashlib.sha256(names.encode()).hexdigest()[:16],
    )
