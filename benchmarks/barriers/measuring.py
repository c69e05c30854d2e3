"""What lies between two networks: loss and accuracy on the straight line, before and after bringing them together."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import equinorm
from barriers.networks import SETTINGS, Setting
from barriers.training import path_of
from equinorm.experiments.datasets.in_memory import Data, Images

POINTS = 11
"""On each line, both ends included."""

WAYS = {
    "as they are": None,
    "permutations": {"rescale": False, "flip": False},
    "permutations, scales and signs": {"rescale": True},
    "permutations by activations": {"rescale": False, "flip": False, "data": True},
}
"""Options of `equinorm.align` to bring the first network near to the second; with data, it gets training images."""


def trained(name: str, seed: int, enorm: bool, folder: Path) -> nn.Module | None:
    """A network as training left it; None if it was not trained to the end."""
    setting, path = SETTINGS[name], path_of(name, seed, enorm, folder)
    state = torch.load(path) if path.exists() else {"epochs": 0}
    if state["epochs"] < setting.epochs:
        return None
    model = setting.network()
    model.load_state_dict(state["model"])
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, setting: Setting, images: Images, count: int) -> tuple[float, float]:
    """Cross-entropy and accuracy on some images, always the same: drawn, since files may hold one class after the other."""
    loss, right = 0.0, 0
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    for batch, labels in images.batches(500, chosen):
        outputs = model(setting.images(batch))
        loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        right += int((outputs.argmax(1) == labels).sum())
    return loss / len(chosen), right / len(chosen)


TRAINED = {"plainly": (False, False), "with ENorm": (True, True), "the first with ENorm": (True, False)}
"""Which of a pair was trained with ENorm."""


def records(name: str, kind: str, data: Data, folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """One line for each way to bring a pair together, and for each again with statistics measured anew."""
    setting = SETTINGS[name]
    pair = [trained(name, seed, enorm, folder) for seed, enorm in enumerate(TRAINED[kind])]
    if pair[0] is None or pair[1] is None:
        return
    a, b = pair
    for way, options in WAYS.items():
        started, aligned, near = time.process_time(), None, a
        if options is not None:
            images = [setting.images(batch) for batch, _ in _some(data.train, 2)] if "data" in options else None
            example = setting.example() if images is None else images[0]
            aligned = equinorm.align(a, b, (example,), **options | {"data": images})
            near = aligned.model
        seconds = time.process_time() - started
        for is_repaired in (False, True) if setting.width else (False,):
            measured = None
            if is_repaired:
                measured = [setting.images(batch) for batch, _ in _some(data.train, 10)]
            ends = [k / (POINTS - 1) for k in range(POINTS)]
            line = [score(equinorm.interpolate(near, b, t, data=measured), setting, data.test, count) for t in ends]
            (first, _), (last, _) = line[0], line[-1]
            yield {
                "network": name,
                "trained": kind,
                "way": way,
                "repaired": is_repaired,
                "loss_barrier": max(loss - (1 - t) * first - t * last for t, (loss, _) in zip(ends, line, strict=True)),
                "losses": [round(loss, 4) for loss, _ in line],
                "accuracies": [round(accuracy, 4) for _, accuracy in line],
                "distance": distance(near, b),
                "cpu_seconds": round(seconds, 1),
                "images": count,
                "epochs": setting.epochs,
                "torch": torch.__version__,
            }


def distance(one: nn.Module, other: nn.Module) -> float:
    """‖a − b‖₂ / ‖b‖₂ over all parameters."""
    a, b = (torch.cat([p.detach().double().flatten() for p in model.parameters()]) for model in (one, other))
    return float((a - b).norm() / b.norm())


def _some(images: Images, count: int) -> Iterator[Any]:
    """So many batches of 500."""
    yield from images.batches(500, torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[: 500 * count])
