"""Images and labels: scikit-learn's digits, CIFAR-10 in its official layout, and folders of images.

Small images stay in memory as bytes; a batch is indexed, cropped and standardised as one tensor.
"""

import hashlib
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from equinorm.experiments.config import ExperimentError, Run

HELD_OUT = 5000
"""Training images that choose learning rates; at most a fifth."""

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_PAD, _CROP = 2, 28


class Images(Protocol):
    """A set of images that yields standardised batches."""

    def __len__(self) -> int: ...

    def batches(self, size: int, order: Tensor | None = None, augment: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in the given order, or all images as they come."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Images in memory.

    Attributes:
        images: uint8 of shape (N, C, H, W).
        labels: int64 of shape (N,).
        mean: of each channel, in units of 255.
        std: likewise.
        rows: which images belong to the set.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, order: Tensor | None = None, augment: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Standardised batches of images and labels; `augment` crops and flips, or crops the middle without an order."""
        shift, scale = self._affine()
        rows = self.rows if order is None else self.rows[order.to(self.rows.device)]
        for part in rows.split(size):
            images = self.images[part]
            if augment:
                images = crop(images) if order is not None else images[..., _PAD:-_PAD, _PAD:-_PAD]
            yield torch.addcmul(shift, images.float(), scale), self.labels[part]

    def _affine(self) -> tuple[Tensor, Tensor]:
        device = self.images.device
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        return -mean / std, 1 / (255 * std)


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Training, held-out and test images.

    Attributes:
        train: all training images.
        kept: those that are not held out.
        held_out: the others, the same for every seed.
        test: never used to choose anything.
        shape: of one image.
        classes: number of labels.
        digest: of the test images: results on other pixels are not comparable.
    """

    train: Images
    kept: Images
    held_out: Images
    test: Images
    shape: tuple[int, int, int]
    classes: int
    digest: str


def crop(images: Tensor) -> Tensor:
    """Crops of 28 × 28 after padding 2, each image at its own place, half of them flipped."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (_PAD,) * 4)
    device = images.device
    corners = torch.randint(0, height + 2 * _PAD - _CROP + 1, (2, count), device=device)
    steps = torch.arange(_CROP, device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, steps, steps.flip(0)) + corners[1, :, None]
    rows = steps + corners[0, :, None]
    places = (rows[:, :, None] * (width + 2 * _PAD) + columns[:, None, :]).flatten(1)
    found = padded.flatten(2).gather(2, places[:, None].expand(-1, images.size(1), -1))
    return found.unflatten(2, (_CROP, _CROP))


def load(run: Run, folder: Path | None, device: str = "cpu") -> Data:
    """Digits or CIFAR-10, in memory once for each process.

    Raises:
        ExperimentError: if they cannot be read.
    """
    return _memory(run.data, folder, device)


@lru_cache(maxsize=2)
def _memory(name: str, folder: Path | None, device: str) -> Data:
    if name == "digits":
        train, test, mean, std = (*_digits(), (0.3051,), (0.3760,))
    else:
        train, test, mean, std = (*_cifar10(needed(folder, "cifar10")), CIFAR_MEAN, CIFAR_STD)
    digest = hashlib.sha256(test[0].numpy().tobytes() + test[1].numpy().tobytes()).hexdigest()[:16]
    (images, labels), (test_images, test_labels) = (tuple(part.to(device) for part in pair) for pair in (train, test))
    kept, held_out = (rows.to(device) for rows in split(len(images)))
    whole = Memory(images, labels, mean, std, torch.arange(len(images), device=device))
    tested = Memory(test_images, test_labels, mean, std, torch.arange(len(test_images), device=device))
    classes = int(labels.max()) + 1
    _, *size = images.shape
    shape = (size[0], size[1], size[2])
    return Data(whole, replace(whole, rows=kept), replace(whole, rows=held_out), tested, shape, classes, digest)


def split(count: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, disjoint and always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held = min(HELD_OUT, count // 5)
    return order[held:].sort().values, order[:held].sort().values


def needed(folder: Path | None, name: str) -> Path:
    """The folder, which must have been named."""
    if folder is None:
        raise ExperimentError(f"{name} is not bundled: say where it is with --data.")
    return folder


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Four fifths to train on, one fifth to test on, as bytes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ExperimentError(
            "the digits come with scikit-learn, which is not installed: pip install 'equinorm[demo]'."
        ) from error
    data, target = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(data * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(target.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[len(order) // 5 :], order[: len(order) // 5]
    return (images[train], labels[train]), (images[test], labels[test])


def _cifar10(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    parts = [_batch(folder / f"data_batch_{number}") for number in range(1, 6)]
    train = torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
    return train, _batch(folder / "test_batch")


class _Arrays(pickle.Unpickler):
    """Unpickles what the official batches hold: dictionaries, lists, bytes and arrays; nothing else can run."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "encode")

    def find_class(self, module: str, name: str) -> Any:
        package = module.split(".")[0]
        if name in self.ALLOWED and (package == "numpy" or (module, name) == ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def _batch(path: Path) -> tuple[Tensor, Tensor]:
    try:
        found = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images = np.array(found[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.array(found[b"labels"], np.int64)
    except FileNotFoundError:
        raise ExperimentError(
            f"there is no {path}. --data must name the folder that holds cifar-10-batches-py, in CIFAR-10's official layout."
        ) from None
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ExperimentError(f"cannot read {path} as a batch of CIFAR-10: {error}.") from error
    if len(images) != len(labels) or not len(images) or labels.min() < 0:
        raise ExperimentError(f"{path}: {len(images)} images and {len(labels)} labels do not fit.")
    return torch.from_numpy(images), torch.from_numpy(labels)
