"""The paper's fully convolutional network on CIFAR-10 at full width, one method a process, made for one large GPU.

    python benchmarks/convolutional.py METHOD --data FOLDER [--device cuda] [--width 128] [--epochs 128] [--seed 0]
        [--checkpoints FOLDER] [--output FILE]

Images stay on the GPU; products are in bfloat16 (autocast) and channels last, and the network is compiled. Learning rate 0.05,
linear to 0, momentum 0.9, weight decay 0.001, batches of 256, crops and flips, c = 1.1: as PAPER.md's figures were made. Every
few epochs the run is saved; the same command goes on from there. One record at the end, with the accuracy after every epoch.
--data digits trains on scikit-learn's digits, to try the script out.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import equinorm
from common import machine, report
from equinorm.experiments.config import METHODS, Run
from equinorm.experiments.datasets.in_memory import Data, Memory, load
from equinorm.experiments.networks import build

SAVED_EVERY = 8
"""Epochs between two checkpoints."""


class Training:
    """One run, which can be left and taken up again."""

    def __init__(self, run: Run, data: Data, options: argparse.Namespace) -> None:
        self.run, self.data, self.device = run, data, options.device
        torch.manual_seed(run.seed)
        model = build(run, data.shape, data.classes).to(self.device)
        self.model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.forward = torch.compile(self.model) if self.device != "cpu" else self.model
        settings = {"weight_decay": run.weight_decay, "fused": True}
        self.optimizer = torch.optim.SGD(self.model.parameters(), run.lr, run.momentum, **settings)
        self.hook = self._hook(METHODS[run.method]) if METHODS[run.method].balancing else None
        self.path = options.checkpoints / f"{run.method}-{run.seed}.pt"
        self.accuracies: list[float] = []
        self.seconds = 0.0
        if self.path.exists():
            self._load()

    def _hook(self, method: Any) -> equinorm.ENorm:
        images = next(iter(self.data.train.batches(2, torch.arange(2), self.run.augment)))[0]
        statistics = {"batch_norm": "statistics"} if method.norm == "batch" else {}
        compile = self.device != "cpu"
        settings = {"c": self.run.c, "method": method.balancing, "gradients": False, "compile": compile, **statistics}
        return equinorm.ENorm(self.optimizer, self.model, (images,), **settings)

    def train(self) -> dict[str, Any]:
        """The remaining epochs; the record of all."""
        for epoch in range(len(self.accuracies), self.run.epochs):
            started = time.perf_counter()
            self._epoch(epoch)
            self.accuracies.append(self._accuracy())  # waits for the GPU
            self.seconds += time.perf_counter() - started
            if (epoch + 1) % SAVED_EVERY == 0:
                self._save()
        run = self.run
        made = {"method": run.method, "width": run.width, "epochs": run.epochs, "seed": run.seed, "data": run.data}
        return made | {"accuracy": self.accuracies[-1], "accuracies": self.accuracies, "seconds": self.seconds}

    def _epoch(self, epoch: int) -> None:
        run, total = self.run, len(self.data.train)
        torch.manual_seed(run.seed * 100_003 + epoch)  # so that a run that is taken up sees the same crops
        order = torch.randperm(total, generator=torch.Generator().manual_seed(run.seed * 100_003 + epoch))
        steps = -(-total // run.batch)
        self.model.train()
        for number, (images, labels) in enumerate(self.data.train.batches(run.batch, order, run.augment)):
            for group in self.optimizer.param_groups:
                group["lr"] = run.lr * (1 - (epoch * steps + number) / (run.epochs * steps))
            self.optimizer.zero_grad()
            with torch.autocast(self.device, dtype=torch.bfloat16):
                outputs = self.forward(images.contiguous(memory_format=torch.channels_last))
            nn.functional.cross_entropy(outputs.float(), labels).backward()
            self.optimizer.step()

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        right = torch.zeros((), dtype=torch.long, device=self.device)
        for images, labels in self.data.test.batches(1000, augment=self.run.augment):
            right += (self.model(images).argmax(1) == labels).sum()
        return int(right) / len(self.data.test)

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer}
        return parts if self.hook is None else {**parts, "hook": self.hook}

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save(state | {"accuracies": self.accuracies, "seconds": self.seconds}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def _load(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.accuracies, self.seconds = state["accuracies"], state["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["baseline", "bn", "gn", "enorm", "enorm_bn"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    is_small = options.data == "digits"
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "batch": 256, "c": 1.1, "augment": not is_small}
    sizes = {"network": "conv", "width": options.width, "epochs": options.epochs, "seed": options.seed}
    run = Run(data="digits" if is_small else "cifar10", method=options.method, **sizes, **settings)
    data = load(run, None if is_small else Path(options.data), options.device)
    assert isinstance(data.train, Memory)
    report([Training(run, data, options).train() | machine(options.device)], options.output)


if __name__ == "__main__":
    main()
