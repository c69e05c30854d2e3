"""Train one network, epoch by epoch; a run that was stopped goes on where it was."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equinorm
from barriers.networks import SETTINGS, Setting
from equinorm.experiments.config import Run
from equinorm.experiments.datasets.in_memory import Data, load

BATCH, MOMENTUM, WEIGHT_DECAY = 128, 0.9, 5e-4


def images(folder: Path) -> Data:
    """CIFAR-10."""
    return load(Run(data="cifar10"), folder)


def path_of(name: str, seed: int, enorm: bool, folder: Path) -> Path:
    """Where a network is kept."""
    kind = name.lower().replace(" ×", "-x")
    return folder / f"{kind}-{'enorm' if enorm else 'plain'}-{seed}.pt"


def train(name: str, seed: int, enorm: bool, data: Data, folder: Path) -> None:
    """Train a network to the end, from where its file stands."""
    setting, path = SETTINGS[name], path_of(name, seed, enorm, folder)
    torch.manual_seed(seed)
    model = setting.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    total = setting.epochs * (len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.lr, total, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False
    )
    begun, state = 0, {}
    if path.exists():
        state = torch.load(path)
        begun = state["epochs"]
        if begun == setting.epochs:
            return
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    if setting.width:
        model = model.to(memory_format=torch.channels_last)
    hook = equinorm.ENorm(optimizer, model, (setting.example(),)) if enorm else None
    if hook is not None and state:
        hook.load_state_dict(state["enorm"])
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(begun, setting.epochs):
        started, loss = time.perf_counter(), 0.0
        torch.manual_seed(1000 * seed + epoch)
        for batch, labels in data.train.batches(BATCH, torch.randperm(len(data.train))[: total // setting.epochs * BATCH]):
            loss = 0.99 * loss + 0.01 * _step(model, setting, optimizer, _flipped(batch), labels)
            schedule.step()
        seconds = time.perf_counter() - started
        print(f"{path.stem}: epoch {epoch + 1} of {setting.epochs}, loss {loss:.3f}, {seconds:.0f} s", flush=True)
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule} | ({"enorm": hook} if hook else {})
        kept = {key: part.state_dict() for key, part in parts.items()} | {"epochs": epoch + 1}
        torch.save(kept, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    if hook is not None:
        hook.remove()


def _flipped(batch: Tensor) -> Tensor:
    """Half of the images, from left to right."""
    return torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch, batch.flip(-1))


def _step(model: nn.Module, setting: Setting, optimizer: torch.optim.Optimizer, batch: Tensor, labels: Tensor) -> float:
    batch = setting.images(batch)
    batch = batch.to(memory_format=torch.channels_last) if setting.width else batch
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.half):
        outputs = model(batch)
    loss = F.cross_entropy(outputs.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss)
