"""Time and memory of `balance` and `apply_`, apart from export, against one read of all weights, by size of the network.

    python benchmarks/balancing.py [--networks mlp resnet decoder] [--sizes 1e6 1e7 1e8 1e9] [--dtypes float32 bfloat16]
        [--norms 2 1] [--tols 1e-6 1e-10] [--threads 2] [--rounds 3] [--device cpu] [--plain]
        [--output benchmarks/results/convergence.jsonl]
    python benchmarks/balancing.py --draw docs/images/convergence.png --output benchmarks/results/convergence.jsonl

Networks have 16 hidden layers (mlp), ResNet-50's blocks (resnet) or 8 blocks of attention and SwiGLU (decoder), as wide as
their size asks. Every channel is first rescaled by 10^U(−2, 2). One read is the fastest reduction of all weights that there is
on a CPU: float32 weights multiplied with themselves, bfloat16 weights summed. Memory is the highest resident set during the
call beyond what was resident before it (Linux); on a GPU, of its memory. Medians over rounds; only ratios carry over to other
machines.
"""

import argparse
import gc
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import equinorm
from common import machine, options_of, read, report
from equinorm import native
from equinorm.experiments.config import Run
from equinorm.experiments.networks import build


class Attention(nn.Module):
    """Causal self-attention with 64 channels a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3 // 8 * 8
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        x2 = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(x2)) * self.up(x2))


def network(name: str, size: float) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of about so many weights, and its input."""
    if name == "mlp":
        width = max(8, round(math.sqrt(size / 16) / 8) * 8)
        layers = [part for _ in range(16) for part in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(width, 10)), (torch.zeros(1, width),)
    if name == "resnet":
        width = max(8, round(64 * math.sqrt(size / 25.5e6) / 8) * 8)
        return build(Run(network="resnet50", width=width), (3, 64, 64), 1000), (torch.zeros(1, 3, 64, 64),)
    width = max(64, round(math.sqrt(size / 96) / 64) * 64)
    layers = [Layer(width) for _ in range(8)]
    return nn.Sequential(*layers, nn.RMSNorm(width), nn.Linear(width, 64)), (torch.zeros(1, 8, width),)


def timed(function: Any, device: str = "cpu") -> tuple[float, Any]:
    """Seconds, with all that was started on the device, and what the function returns."""
    started = time.perf_counter()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


class Peak:
    """Most memory within the block beyond what was held at its start, in bytes: of a GPU, or (Linux only) of the process."""

    def __init__(self, device: str) -> None:
        self._is_cpu = device == "cpu"

    def __enter__(self) -> "Peak":
        gc.collect()
        if self._is_cpu:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._resident("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        most = self._resident("VmHWM") if self._is_cpu else torch.cuda.max_memory_allocated()
        self.bytes = most - self._before

    @staticmethod
    def _resident(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024


def measure(name: str, size: float, dtype: torch.dtype, compile: bool, options: argparse.Namespace) -> Iterator[dict]:
    """One record for each norm and tolerance."""
    torch.manual_seed(0)
    rounds, device = options.rounds, options.device
    with torch.device(device):
        model, args = network(name, size)
    symmetries = equinorm.symmetries(model, args)
    symmetries.rescale_((4 * torch.rand(symmetries.num_free, dtype=torch.float64) - 2) * math.log(10))
    model.to(dtype)
    weights = [parameter.detach().view(-1) for parameter in model.parameters()]
    nbytes = sum(weight.numel() * weight.element_size() for weight in weights)

    def read() -> None:
        for weight in weights:
            torch.dot(weight, weight) if dtype == torch.float32 else torch.sum(weight)

    timed(read, device)
    for sums in (torch.float32, torch.float64):  # not while time is taken
        _ = native.kernels_for(dtype, sums) if compile else None
    for p in options.norms:
        for tol in options.tols:
            reads, solving, applying, peaks = [], [], [], []
            for _ in range(rounds):
                reads.append(timed(read, device)[0])
                with Peak(device) as peak:
                    taken, balance = timed(lambda p=p, tol=tol: symmetries.balance(p=p, tol=tol, compile=compile), device)
                solving.append(taken)
                peaks.append(peak.bytes / nbytes)
                still = torch.zeros(symmetries.num_free, dtype=torch.float64)
                still += (
                    math.log(2) * torch.randint(-1, 2, still.shape).double()
                )  # apply_ would leave the next round nothing to do
                applying.append(timed(lambda still=still: symmetries.rescale_(still), device)[0])
                symmetries.rescale_(-still)
            one = statistics.median(reads)
            yield {
                "network": name,
                "parameters": sum(weight.numel() for weight in weights),
                "dtype": str(dtype).removeprefix("torch."),
                "compile": compile,
                "p": p,
                "tol": tol,
                "read_s": one,
                "balance_s": statistics.median(solving),
                "rescale_s": statistics.median(applying),
                "balance_reads": statistics.median(solving) / one,
                "rescale_reads": statistics.median(applying) / one,
                "spread": [min(solving) / one, max(solving) / one],
                "memory": max(peaks),
                "cycles": balance.cycles,
                "residual": balance.residual,
                "converged": balance.converged,
                **machine(device),
            }


def draw(results: Path, picture: Path) -> None:
    """Seconds against the number of weights, p = 2, float32, compiled."""
    import matplotlib.pyplot as plt

    latest = {(r["network"], r["parameters"], r["dtype"], r["p"], r["tol"]): r for r in read(results) if r["compile"]}
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    found = [r for r in latest.values() if r["dtype"] == "float32" and r["p"] == 2]
    for colour, name in zip(("tab:blue", "tab:orange", "tab:green"), ("mlp", "resnet", "decoder"), strict=True):
        for tol, style in ((1e-6, "-"), (1e-10, ":")):
            line = sorted(
                (r["parameters"], r["balance_s"] + r["rescale_s"]) for r in found if (r["network"], r["tol"]) == (name, tol)
            )
            label = f"{name}, residual {tol:g}"
            axes.loglog(*zip(*line, strict=True), style, color=colour, marker="o", markersize=3, label=label)
    for factor, word in ((1, "one read of all weights"), (10, "10 reads")):
        line = sorted((r["parameters"], factor * r["read_s"]) for r in found if (r["network"], r["tol"]) == ("mlp", 1e-6))
        axes.loglog(*zip(*line, strict=True), color="0.6", linestyle="--" if factor > 1 else "-", label=word)
    axes.set(xlabel="weights (float32)", ylabel="seconds for balance and apply_")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=160)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=["mlp", "resnet", "decoder"])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8, 1e9])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--norms", nargs="+", type=float, default=[2.0, 1.0])
    parser.add_argument("--tols", nargs="+", type=float, default=[1e-6, 1e-10])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plain", action="store_true", help="without the compiled kernels")
    parser.add_argument("--draw", type=Path, help="draw what --output holds into this .png, and measure nothing")
    options = parser.parse_args()
    if options.draw is not None:
        draw(options.output, options.draw)
        return
    torch.set_num_threads(options.threads)
    for name in options.networks:
        for size in options.sizes:
            for dtype, compile in itertools.product(options.dtypes, (False,) if options.plain else (False, True)):
                found = measure(name, size, getattr(torch, dtype), compile, options)
                report(found, options.output)


if __name__ == "__main__":
    main()
