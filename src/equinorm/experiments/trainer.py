"""One training run."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

import equinorm
from equinorm._errors import EquinormError
from equinorm.experiments import networks, thumbnails
from equinorm.experiments.config import METHODS, Run
from equinorm.experiments.datasets.in_memory import Data, Images
from equinorm.experiments.path_norms import PathSGD, condition_
from equinorm.experiments.results import Curves, Result, provenance, rounded
from equinorm.experiments.unfinished import State, Unfinished

Progress = Callable[[int, float, float], None]
"""Called after every epoch with its number, the training loss and the accuracy."""

_CHECK = 25
"""Steps between two looks at the loss: on a GPU each look waits for it."""

_SCORED_AT_ONCE = {"fc": 2000}


def train(
    run: Run, data: Data, device: str = "cpu", progress: Progress = lambda *_: None, unfinished: Path | None = None
) -> Result:
    """Train once, and score the final weights.

    The learning rate grows linearly during `warmup` and falls linearly to 0; weight decay acts on every parameter. All
    methods of one seed start from the same weights and see the same batches.

    A run that was interrupted goes on from the folder `unfinished`, and ends in the same weights, bit for bit on a CPU.
    """
    torch.manual_seed(run.seed)
    model = networks.build(run, data.shape, data.classes).to(device)
    if run.network != "fc":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster
    trained, scored = (data.kept, data.held_out) if run.held_out else (data.train, data.test)
    return Trainer(run, model, trained, scored, data, device).train(progress, Unfinished(unfinished, run))


class Trainer:
    """A network on its way, with its optimizer and what a method adds to that."""

    def __init__(self, run: Run, model: nn.Module, trained: Images, scored: Images, data: Data, device: str) -> None:
        self.run, self.model, self.trained, self.scored, self.data, self.device = run, model, trained, scored, data, device
        self.method = METHODS[run.method]
        images = next(iter(trained.batches(2, torch.arange(2), run.augment)))[0]
        self.args, self.shape = (images,), tuple(images.shape[1:])
        options: dict[str, Any] = {"batch_norm": "statistics"} if self.method.norm == "batch" else {}
        if self.method.init == "pathcond":
            condition_(equinorm.symmetries(model, self.args), self.shape)
        elif self.method.init == "balanced":
            equinorm.balance_(model, self.args, p=run.p, c=run.c, biases=run.count_biases)
        self.curves, self.symmetries = Curves(residuals_at=(run.p, run.c)), None
        if not run.held_out and not self.method.weight_norm:  # imbalance of v in g·v/‖v‖ would compare with nothing
            self.symmetries = equinorm.symmetries(model, self.args, **options)
        self.layers = networks.layers_of(model)
        parameters = list(model.parameters())
        self.optimizer = optim.SGD(parameters, run.lr, run.momentum, weight_decay=run.weight_decay, fused=True)
        self.paths = PathSGD(model, self.shape, run.path_every) if self.method.path else None
        self.hook = self._balancing(options) if self.method.balancing else None
        self.forward = torch.compile(model) if run.compiled else model
        self.order = torch.Generator().manual_seed(run.seed)
        self.steps, self.seconds = 0, 0.0
        self.source = provenance(device)

    def _balancing(self, options: dict[str, Any]) -> equinorm.ENorm:
        run = self.run
        return equinorm.ENorm(
            self.optimizer,
            self.model,
            self.args,
            p=run.p,
            c=run.c,
            cycles=run.cycles,
            every=run.every,
            method=self.method.balancing,
            biases=run.count_biases,
            match_biases=run.match_biases,
            symmetric_biases=run.symmetric_biases,
            gradients=False,
            compile=True if run.compiled else None,
            **options,
        )

    def train(self, progress: Progress, unfinished: Unfinished | None = None) -> Result:
        """All epochs that are left, and the score of the final weights."""
        run, diverged = self.run, False
        unfinished = unfinished or Unfinished(None, run)
        pictures = thumbnails.matrices(self.model) if run.seed == 0 and not run.held_out else {}
        per_epoch = -(-len(self.trained) // run.batch)
        state = unfinished.load(self.device, self._maker())
        if state is None:
            self._watch()
        else:
            self._resume(state)
        for epoch in range(len(self.curves.loss), run.epochs):
            self.model.train()
            if self.hook and run.c_end:
                self.hook.c = run.c + (run.c_end - run.c) * epoch / max(run.epochs - 1, 1)
            started = time.perf_counter()
            order = torch.randperm(len(self.trained), generator=self.order)
            loss, taken = self.epoch(order, self.steps, run.epochs * per_epoch)
            self.seconds += time.perf_counter() - started
            self.steps += taken
            diverged = not math.isfinite(loss) or not self._finite()
            accuracy = 1 / self.data.classes if diverged else self._accuracy()
            self.curves.loss.append(*rounded([loss]))
            self.curves.accuracy.append(accuracy)
            self._watch()
            progress(epoch + 1, loss, accuracy)
            if diverged:
                break
            unfinished.save(self._state)
        return self._result(diverged, pictures)

    def _result(self, diverged: bool, pictures: dict[str, Tensor]) -> Result:
        """What is recorded of a run that is over; pictures of weights as they began."""
        after = thumbnails.matrices(self.model) if pictures and not diverged else {}
        return Result(
            run=self.run,
            accuracy=self.curves.accuracy[-1] if self.curves.accuracy else self._accuracy(),
            diverged=diverged,
            steps=self.steps,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            num_free=None if self.symmetries is None else self.symmetries.num_free,
            curves=self.curves,
            pictures={name: [thumbnails.encode(pictures[name]), thumbnails.encode(last)] for name, last in after.items()},
            seconds=round(self.seconds, 3),
            images_per_second=round(self.steps * self.run.batch / self.seconds, 1) if self.seconds else 0.0,
            images=(len(self.trained), len(self.scored)),
            digest=self.data.digest,
            source=self.source,
        )

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own."""
        parts = {"model": self.model, "optimizer": self.optimizer, "hook": self.hook, "paths": self.paths}
        return {name: part for name, part in parts.items() if part is not None}

    def _state(self) -> State:
        """All that the epochs to come depend on, and what is recorded so far."""
        random = {"cpu": torch.get_rng_state(), "order": self.order.get_state()}
        if self.device != "cpu":
            random["device"] = torch.cuda.get_rng_state(self.device)
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        record = {"curves": asdict(self.curves), "steps": self.steps, "seconds": self.seconds}
        return {**parts, **record, "random": random, "maker": self._maker()}

    def _maker(self) -> dict[str, Any]:
        """What all epochs of one run must share."""
        names = ("equinorm", "commit", "torch", "device", "threads")
        return {**{name: self.source[name] for name in names}, "images": self.data.digest}

    def _resume(self, state: State) -> None:
        """Go on where this state was kept."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        random = {name: value.cpu() for name, value in state["random"].items()}
        torch.set_rng_state(random["cpu"])
        self.order.set_state(random["order"])
        if self.device != "cpu":
            torch.cuda.set_rng_state(random["device"], self.device)
        self.curves, self.steps, self.seconds = Curves(**state["curves"]), state["steps"], state["seconds"]

    def epoch(self, order: Tensor, done: int, total: int) -> tuple[float, int]:
        """Mean loss and steps of one epoch; stops at a loss that is not finite."""
        run, losses, count = self.run, torch.zeros((), device=self.device), 0
        warmup = run.warmup * total / run.epochs
        parameters = list(self.model.parameters())
        matrices, centred = [*networks.matrices_of(self.model).values()], networks.centred(self.model, run)
        for images, labels in self.trained.batches(run.batch, order, run.augment):
            step = done + count
            rate = run.lr * min(1.0, (step + 1) / warmup if warmup else 1.0) * (1 - step / total)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=run.bfloat16):
                outputs = self.forward(images)
            loss = nn.functional.cross_entropy(outputs.float(), labels)
            loss.backward()
            if self.paths:
                self.paths.divide_()
            if run.centralise:
                for gradient in [weight.grad for weight in matrices[1:] if weight.grad is not None]:
                    networks.centre_(gradient)
            if run.agc:
                for weight in matrices[:-1]:
                    networks.clip_units_(weight, run.agc)
            if run.clip:
                nn.utils.clip_grad_norm_(parameters, run.clip)
            losses += loss.detach()
            count += 1
            if count % _CHECK == 0 and not bool(losses.isfinite()):
                break
            try:
                self.optimizer.step()
            except EquinormError:
                if self._finite():
                    raise
                return math.nan, count  # the balancing refused weights that are not finite
            for weight in centred:
                networks.centre_(weight)
        return float(losses) / max(count, 1), count

    def _finite(self) -> bool:
        return bool(torch.stack([parameter.detach().norm() for parameter in self.model.parameters()]).isfinite().all())

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        right = torch.zeros((), dtype=torch.long, device=self.device)
        size = _SCORED_AT_ONCE.get(self.run.network, 250)
        for images, labels in self.scored.batches(size, augment=self.run.augment):
            right += (self.model(images).argmax(1) == labels).sum()
        return int(right) / len(self.scored)

    def _watch(self) -> None:
        """Norms of the weights, and their imbalance at the p and c that the run balances for."""
        values = torch.stack([layer.weight.detach().norm() for layer in self.layers.values()]).tolist()
        for name, value in zip(self.layers, rounded(values), strict=True):
            self.curves.norms.setdefault(name, []).append(value)
        if self.symmetries is not None and self.symmetries.num_free and self._finite():
            c = self.hook.c if self.hook else self.run.c
            self.curves.residuals.append(*rounded([self.symmetries.balance(self.run.p, c, cycles=0).residual]))
