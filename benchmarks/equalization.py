"""Solving plus applying, side by side with brevitas' EqualizeGraph in one run.

    python benchmarks/equalization.py [--models alexnet vgg11_bn resnet50 densenet121] [--repeats 5]
        [--output benchmarks/results/equalization.jsonl]

Needs torchvision and brevitas (`pip install --no-deps brevitas dependencies unfoldNd`). Both sides get the same float32
weights and two threads; discovery (export here, region walk there) is timed apart. brevitas runs its 10 iterations of
cross-layer equalization; Equinorm runs until the residual is at most 1e-6, for p = 2 and for p = ∞. Times are medians of
alternating repeats after one warm-up; only their ratios carry over to other machines.
"""

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import equinorm
from common import machine, report
from zoo import import_models


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the function returns."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def ours(model: nn.Module, args: tuple, p: float) -> dict[str, float]:
    """Seconds for discovery, and for solving plus applying."""
    discovery, symmetries = timed(lambda: equinorm.symmetries(model, args))
    solving, balance = timed(lambda: symmetries.balance(p=p))
    applying, _ = timed(balance.apply_)
    return {"discovery": discovery, "solve_apply": solving + applying, "cycles": balance.cycles, "converged": balance.converged}


def brevitas(model: nn.Module, args: tuple) -> dict[str, float]:
    """Seconds for the region walk, and for its 10 iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas.fx import value_trace
        from brevitas.graph import equalize

    graph = value_trace(model, {"x": args[0]})
    tool = equalize.EqualizeGraph()
    sinks = tuple(layer for layer in equalize._supported_layers if layer not in (nn.LayerNorm, *equalize._batch_norm))
    discovery, regions = timed(lambda: equalize._extract_regions(graph, state_impl_kwargs={"supported_sinks": sinks}))
    options = (tool.iterations, tool.threshold, tool.merge_bias, tool.bias_shrinkage, tool.scale_computation_type)
    seconds, _ = timed(lambda: equalize._equalize(graph, regions, *options))
    return {"discovery": discovery, "solve_apply": seconds, "cycles": tool.iterations}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Medians and spreads of one model."""
    torch.manual_seed(0)
    model = import_models().get_model(name, weights=None).eval()
    args = (torch.randn(1, 3, 224, 224),)
    contestants = {
        "p=2": lambda m: ours(m, args, 2.0),
        "p=inf": lambda m: ours(m, args, math.inf),
        "brevitas": lambda m: brevitas(m, args),
    }
    runs: dict[str, list[dict[str, float]]] = {key: [] for key in contestants}
    for repeat in range(repeats + 1):
        for key, run in contestants.items():
            twin = copy.deepcopy(model)
            with torch.no_grad():
                result = run(twin)
            if repeat:
                runs[key].append(result)
    record: dict[str, Any] = {"model": name, "repeats": repeats}
    for key, results in runs.items():
        seconds = [result["solve_apply"] for result in results]
        record[key] = {
            "solve_apply_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "discovery_s": statistics.median(result["discovery"] for result in results),
            "cycles": results[0]["cycles"],
        }
    for key in ("p=2", "p=inf"):
        record[f"brevitas / {key}"] = record["brevitas"]["solve_apply_s"] / record[key]["solve_apply_s"]
    return record | machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["alexnet", "vgg11_bn", "resnet50", "densenet121"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    report((measure(name, options.repeats) for name in options.models), options.output)


if __name__ == "__main__":
    main()
