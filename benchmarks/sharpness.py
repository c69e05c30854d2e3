"""Why one network bears larger steps than another: curvature, signal and rates by layer, at the start and after some steps.

    python benchmarks/sharpness.py --data DIR [--networks conv resnet18c resnet18] [--methods bn enorm 'bn:head=0.1@0.1' ...]
        [--steps 0 20 200] [--images 128] [--output benchmarks/results/sharpness.jsonl]

Networks, widths, momentum and images are those of `equinorm train`; methods are written as for its --methods, with a learning
rate behind "@" (else 0.05), which stays constant here. Everything is measured in float32 on one batch of training images, in
training mode: BN takes its statistics from that batch. At step 0 ENorm has run its first cycle. One JSON line for each
network, method and number of steps, none once the loss is no number:

    loss, logits: of the batch; root mean square.
    alike: mean cosine between what the last layer reads of two different images; 1 where it cannot tell them apart.
    eigenvalue: of the loss's Hessian, the largest by absolute value, by power iteration.
    rate: largest power of four by which a step along the negative gradient does not raise the loss, up to 256.
    layers: for each weight its norm, its gradient's norm, and the rate of a step on it alone.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import machine, options_of, report
from equinorm.experiments import networks
from equinorm.experiments.config import Run, parse
from equinorm.experiments.datasets import in_memory
from equinorm.experiments.presets import preset
from equinorm.experiments.trainer import Trainer

PRESETS = {"conv": "conv-short", "resnet18c": "resnet18-reduced", "resnet18": "resnet18-reduced"}
METHODS = ["bn", "baseline", "enorm", *(f"{name}:head=0.1,centralise=1" for name in ("bn", "baseline", "enorm"))]
ITERATIONS = 10
LEAST, MOST = -10, 4
"""Powers of four that are tried as rates; the last stands for all above."""


def largest_eigenvalue(loss: Tensor, weights: Sequence[Tensor]) -> float:
    """Rayleigh quotient of the Hessian after power iteration from a fixed random start."""
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vectors, found = [torch.randn(weight.shape, generator=generator) for weight in weights], 0.0
    for _ in range(ITERATIONS):
        norm = torch.stack([vector.norm() for vector in vectors]).norm()
        vectors = [vector / norm for vector in vectors]
        products = torch.autograd.grad(gradients, weights, vectors, retain_graph=True)
        found = float(sum((one * two).sum() for one, two in zip(products, vectors, strict=True)))
        vectors = [product.detach() for product in products]
    return found


@torch.no_grad()
def largest_rate(loss: Callable[[], Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
    """The largest power of four up to which steps of these weights do not raise the loss; 0 if none is small enough."""
    before, old = float(loss()), [weight.clone() for weight in weights]

    def bears(power: int) -> bool:
        for weight, start, gradient in zip(weights, old, gradients, strict=True):
            weight.copy_(start - 4.0**power * gradient)
        return float(loss()) <= before

    power = 0
    while power >= LEAST and not bears(power):
        power -= 1
    while 0 <= power < MOST and bears(power + 1):
        power += 1
    for weight, start in zip(weights, old, strict=True):
        weight.copy_(start)
    return 4.0**power if power >= LEAST else 0.0


def measured(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Everything about the weights as they are."""
    read: list[Tensor] = []
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    last = [*layers.values()][-1]
    handle = last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    logits = model(images)
    handle.remove()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loss = nn.functional.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, weights, retain_graph=True)
    of = {id(weight): gradient for weight, gradient in zip(weights, gradients, strict=True)}

    def again() -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    def one(weight: Tensor) -> dict[str, float]:
        rate = largest_rate(again, [weight], [of[id(weight)]])
        return {"norm": float(weight.detach().norm()), "gradient": float(of[id(weight)].norm()), "rate": rate}

    rows, count = nn.functional.normalize(read[0].flatten(1), dim=1), len(images)
    return {
        "loss": float(loss.detach()),
        "logits": float(logits.detach().square().mean().sqrt()),
        "alike": float((rows.sum(0).square().sum() - count) / (count * (count - 1))),
        "eigenvalue": largest_eigenvalue(loss, weights),
        "rate": largest_rate(again, weights, gradients),
        "layers": {name: one(layer.weight) for name, layer in layers.items()},
    }


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for network in options.networks:
        base = replace(preset(PRESETS[network]).base, network=network, batch=128, weight_decay=5e-4, c=1.2)
        for method in options.methods:
            spec, _, rate = method.partition("@")
            run = parse(spec, replace(base, held_out=True, lr=float(rate or 0.05))).canonical()
            for step, found in watched(run, options):
                yield {"network": network, "width": run.width, "method": spec, "lr": run.lr, "step": step, **found}


def watched(run: Run, options: argparse.Namespace) -> Iterator[tuple[int, dict[str, Any]]]:
    """Train at a constant rate, and measure after these many steps; stops where the loss is no number."""
    data = in_memory.load(run, options.data)
    torch.manual_seed(run.seed)
    model = networks.build(run, data.shape, data.classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer(run, model, data.kept, data.held_out, data, "cpu")
    torch.manual_seed(1)
    images, labels = next(iter(data.kept.batches(options.images, torch.arange(options.images), run.augment)))
    order, done = torch.randperm(len(data.kept), generator=torch.Generator().manual_seed(0)), 0
    if trainer.hook:
        trainer.hook.cycle_()
    model.train()
    for step in options.steps:
        if step > done:
            loss, _ = trainer.epoch(order[done * run.batch : step * run.batch], done, 10**9)
            if not math.isfinite(loss):
                return
        yield (done := step), measured(model, images, labels)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=[*PRESETS], choices=[*PRESETS])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 20, 200])
    parser.add_argument("--images", type=int, default=128)
    options = parser.parse_args()
    report((record | machine() for record in records(options)), options.output)


if __name__ == "__main__":
    main()
