"""What ENorm costs in a training step, side by side in one run.

    python benchmarks/training_step.py [--networks fc conv resnet18 resnet50 vit] [--dtypes float32 bfloat16] [--decays 0 1e-4]
        [--hooks plain compiled] [--threads 2] [--device cpu] [--clock wall] [--rounds 20]
        [--output benchmarks/results/step.jsonl]
    python benchmarks/training_step.py --norms [--normed resnet18 resnet50] [--batch 32] [--size 224] ...

The floor is one in-place product with all weights and momentum buffers. The cost of the hook is a step of SGD (momentum 0.9)
with it, minus one without it, in the same round; all contestants of one network take turns, in an order that is turned round
every time. Gradients are there and move along, as is the default, but for hooks "without gradients". --clock cpu counts the
time of the process, for machines that do other things too; with one thread. With --norms: seconds of one
training iteration of a residual network (identity skips) without normalization, with batch and with group normalization, and
of ENorm's hook on the first, compiled if that is among --hooks.
Medians and quartiles over rounds, after a warm-up; only ratios carry over to other machines.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import equinorm
from common import add_hooks, machine, options_of, report, summary
from equinorm.experiments.config import Run
from equinorm.experiments.networks import build
from zoo.from_torchvision import import_models

HOOKS = {
    "cyclic": {"method": "cyclic", "compile": False},
    "two-level": {"method": "two-level", "compile": False},
    "cyclic, compiled": {"method": "cyclic", "compile": True},
    "two-level, compiled": {"method": "two-level", "compile": True},
    "cyclic, without gradients": {"method": "cyclic", "compile": False, "gradients": False},
    "cyclic, compiled, without gradients": {"method": "cyclic", "compile": True, "gradients": False},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 3


def network(name: str, width: int | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """A network without normalization (but ViT's own), and the shape of its input."""
    if name == "fc":
        return build(Run(depth=15, width=width or 500), (3, 32, 32), 10), (3, 32, 32)
    if name == "conv":
        return build(Run(network="conv", width=width or 128), (3, 28, 28), 10), (3, 28, 28)
    if name == "vit":
        return import_models().vit_b_16(weights=None), (3, 224, 224)
    return build(Run(network=name, width=width or 64), (3, 224, 224), 1000), (3, 224, 224)


def seconds(function: Callable[[], Any], device: str, clock: str = "wall") -> float:
    """Of one call, with everything that it has started on the device."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = CLOCKS[clock]()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return CLOCKS[clock]() - started


def rounds(contestants: dict[str, Callable[[], Any]], count: int, device: str, clock: str = "wall") -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after the warm-up."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(WARM_UP + count):
        for name in [*contestants] if number % 2 else [*reversed(contestants)]:
            taken = seconds(contestants[name], device, clock)
            if number >= WARM_UP:
                found[name].append(taken)
    return found


def step(name: str, dtype: torch.dtype, decay: float, options: argparse.Namespace) -> dict[str, Any]:
    """Floor, SGD and the hooks on one network."""
    device, count = options.device, options.rounds
    torch.manual_seed(0)
    model, shape = network(name, options.width)
    model = model.to(device, dtype)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-4
    settings = {"lr": 1e-6, "momentum": 0.9, "weight_decay": decay}
    plain = torch.optim.SGD(parameters, **settings)
    fused = torch.optim.SGD(parameters, **settings, fused=True)
    adam = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=decay)
    contestants: dict[str, Callable[[], Any]] = {"SGD": plain.step, "SGD fused": fused.step, "AdamW": adam.step}
    example = (torch.zeros(2, *shape, device=device, dtype=dtype),)
    exact = {"power_of_two": True} if dtype == torch.bfloat16 else {}
    hooks = {hook: kind for hook, kind in HOOKS.items() if ("plain", "compiled")[kind["compile"]] in options.hooks}
    for hook, kind in hooks.items():
        optimizer = torch.optim.SGD(parameters, **settings)
        equinorm.ENorm(optimizer, model, example, **kind, **exact)
        contestants[hook] = optimizer.step
    plain.step()
    weights = [parameter.detach() for parameter in parameters]
    momentum = [plain.state[parameter]["momentum_buffer"] for parameter in parameters]

    def floor() -> None:
        torch._foreach_mul_(weights, 1.0)
        torch._foreach_mul_(momentum, 1.0)

    found = rounds({"floor": floor, **contestants}, count, device, options.clock)
    pairs = {hook: list(zip(found[hook], found["SGD"], found["floor"], strict=True)) for hook in hooks}
    return {
        "network": name,
        "dtype": str(dtype).removeprefix("torch."),
        "weight_decay": decay,
        "gradients": True,
        "clock": options.clock,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "seconds": {key: summary(found[key]) for key in ("floor", "SGD", "SGD fused", "AdamW")}
        | {hook: summary([whole - without for whole, without, _ in pairs[hook]]) for hook in hooks},
        "hook / floor": {hook: summary([(w - s) / f for w, s, f in pairs[hook]]) for hook in hooks},
        "hook / SGD": {hook: summary([(w - s) / s for w, s, _ in pairs[hook]]) for hook in hooks},
    }


def norms(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Iterations of a residual network without and with normalization, and the hook."""
    batch, size, device = options.batch, options.size, options.device
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    contestants: dict[str, Callable[[], Any]] = {}
    for method in ("baseline", "bn", "gn", "enorm"):
        torch.manual_seed(0)
        model = build(Run(network=name, width=options.width or 64, method=method), (3, size, size), 1000).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
        if method == "enorm":
            equinorm.ENorm(optimizer, model, (images[:2],), compile="compiled" in options.hooks)

        def forward(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()

        forward()
        contestants[method] = optimizer.step if method == "enorm" else forward
        if method == "baseline":
            contestants["SGD"] = optimizer.step
    found = rounds(contestants, options.rounds, device, options.clock)
    pairs = {"bn": "baseline", "gn": "baseline", "enorm": "SGD"}
    costs = {
        name: [whole - without for whole, without in zip(found[name], found[base], strict=True)] for name, base in pairs.items()
    }
    middle = {name: summary(values)["median"] for name, values in costs.items()}
    return {
        "network": f"{name} at {size}",
        "batch": batch,
        "gradients": True,
        "compile": "compiled" in options.hooks,
        "seconds": {name: summary(found[name]) for name in ("baseline", "bn", "gn", "SGD")},
        "cost": {name: summary(values) for name, values in costs.items()},
        "BN / ENorm": middle["bn"] / middle["enorm"],
        "GN / ENorm": middle["gn"] / middle["enorm"],
    }


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.norms:
        yield from (norms(name, options) for name in options.normed)
        return
    for name in options.networks:
        for dtype in options.dtypes:
            for decay in options.decays:
                yield step(name, getattr(torch, dtype), decay, options)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=["fc", "conv", "resnet18", "resnet50", "vit"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--decays", nargs="+", type=float, default=[0.0, 1e-4])
    add_hooks(parser)
    parser.add_argument("--norms", action="store_true")
    parser.add_argument("--normed", nargs="+", default=["resnet18"], choices=["resnet18", "resnet50"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--width", type=int, help="of the networks, to try this out on small ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report((record | machine(options.device) for record in records(options)), options.output)


if __name__ == "__main__":
    main()
