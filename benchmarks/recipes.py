"""Cheap trials of recipes for residual networks, on held-out images.

    python benchmarks/recipes.py --data DIR [--networks resnet18c resnet18] [--methods bn@0.1 'enorm:c=1,biases=1@0.1' ...]
        [--images 8000] [--epochs 3] [--width 8] [--seeds 0 1] [--output benchmarks/results/recipes.jsonl]

Methods are written as for `equinorm train --methods`, with a learning rate behind "@". To be cheap, images are few, halved to
14 × 14, batches hold 128, products are in bfloat16, and only the final weights are scored, on 2,000 held-out images. One JSON
line for each run: held-out accuracy, training loss of each epoch, CPU seconds.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import machine, options_of, report
from equinorm.experiments import networks
from equinorm.experiments.config import Run, parse
from equinorm.experiments.datasets import in_memory
from equinorm.experiments.datasets.in_memory import Data, Memory
from equinorm.experiments.presets import preset
from equinorm.experiments.trainer import Trainer

SCORED = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Halved(Memory):
    """Images of half the height and width."""

    def batches(self, size: int, order: Tensor | None = None, augment: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in Memory.batches(self, size, order, augment):
            yield nn.functional.avg_pool2d(images, 2), labels


def halved(images: Memory, count: int) -> Halved:
    """So many of them, always the same, in half size."""
    rows = images.rows[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]
    return Halved(images.images, images.labels, images.mean, images.std, rows)


def trial(run: Run, data: Data, count: int) -> dict[str, Any]:
    """One run, scored once at its end."""
    assert isinstance(data.kept, Memory)
    assert isinstance(data.held_out, Memory)
    torch.manual_seed(run.seed)
    model = networks.build(run, data.shape, data.classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kept, scored = halved(data.kept, count), halved(data.held_out, SCORED)
    trainer, order = Trainer(run, model, kept, scored, data, "cpu"), torch.Generator().manual_seed(run.seed)
    losses, steps, total, started = [], 0, run.epochs * -(-count // run.batch), time.process_time()
    while len(losses) < run.epochs and (not losses or losses[-1] == losses[-1]):
        model.train()
        loss, taken = trainer.epoch(torch.randperm(count, generator=order), steps, total)
        losses.append(loss)
        steps += taken
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(images).argmax(1) == labels).sum()) for images, labels in scored.batches(500, augment=run.augment)
        )
    return {"accuracy": right / SCORED, "losses": losses, "cpu_seconds": time.process_time() - started}


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = replace(preset("resnet18-reduced").base, width=options.width, epochs=options.epochs, weight_decay=5e-4, batch=128)
    for network in options.networks:
        for method in options.methods:
            spec, _, rate = method.partition("@")
            for seed in options.seeds:
                same = replace(
                    base, network=network, lr=float(rate or 0.1), seed=seed, bfloat16=options.bfloat16, held_out=True
                )
                run = parse(spec, same).canonical()
                found = trial(run, in_memory.load(run, options.data), options.images)
                yield {"network": network, "method": spec, "lr": run.lr, "seed": seed, "images": options.images, **found}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["resnet18c"], choices=["resnet18c", "resnet18"])
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16, where the machine has it")
    options = parser.parse_args()
    report((record | machine() for record in records(options)), options.output)


if __name__ == "__main__":
    main()
