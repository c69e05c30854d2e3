"""Solving plus applying, side by side with brevitas' EqualizeGraph and scipy's L-BFGS in one run.

    python benchmarks/equalization.py [--models alexnet vgg11_bn resnet50 densenet121] [--repeats 5] [--threads 2]
        [--clock wall] [--again] [--without L-BFGS] [--output benchmarks/results/equalization.jsonl]

Needs torchvision, scipy and brevitas (`pip install --no-deps brevitas dependencies==2.0.1 unfoldNd`). Every channel is first
rescaled by 10^U(−1, 1); all sides get the same float32 weights and threads. Discovery (export here, region walk there) is
timed apart. brevitas runs its 10 iterations of cross-layer equalization; Equinorm runs until the residual is at most 1e-6, for
p = 2 and for p = ∞; L-BFGS minimises the same objective (p = 2), on energies that are kept, until its residual is at most 1e-6
or for a minute. Times are medians of alternating repeats after one warm-up; only their ratios carry over to other machines.
With --again it is the second balance of the same symmetries, weights being as before, that counts: what follows from the layout
alone is kept. --clock cpu counts the time of the process, for machines that do other things too; with one thread.
"""

import contextlib
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import nn

import equinorm
from common import machine, options_of, report
from equinorm import native
from equinorm.balancing.assemble import problem_of
from equinorm.balancing.layout import lay_out
from equinorm.balancing.options import BalanceOptions
from equinorm.balancing.scope import counted
from zoo.from_torchvision import import_models

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = "wall"
"""Which one counts; set from the command line."""

AGAIN = False
"""Does the second balance count? Set from the command line."""


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the function returns."""
    started = CLOCKS[CLOCK]()
    result = function()
    return CLOCKS[CLOCK]() - started, result


def ours(model: nn.Module, args: tuple, p: float) -> dict[str, float]:
    """Seconds for discovery, and for solving plus applying."""
    discovery, symmetries = timed(lambda: equinorm.symmetries(model, args))
    if AGAIN:
        before = [tensor.clone() for tensor in model.state_dict().values()]
        symmetries.balance(p=p).apply_()
        for tensor, old in zip(model.state_dict().values(), before, strict=True):
            tensor.copy_(old)
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


OPTIONS = {"maxiter": 10**6, "maxfun": 10**6, "ftol": 0.0, "gtol": 0.0}
"""L-BFGS stops where we say."""


class DoneError(Exception):
    """L-BFGS has got there, or its time is over."""


def lbfgs(model: nn.Module, args: tuple, limit: float = 60.0) -> dict[str, float]:
    """Seconds for scipy's L-BFGS-B on log φ, p = 2, and for applying where it ends."""
    symmetries = equinorm.symmetries(model, args)
    scalings = counted(symmetries.scalings, biases=False)
    held = torch.zeros(symmetries.num_free + 1, dtype=torch.bool)
    started = time.perf_counter()
    network = lay_out(scalings, symmetries.family_ranges, symmetries.num_free, held)
    found = problem_of(network, symmetries.tensors, BalanceOptions(method="cyclic"))
    evaluations, residual, best = 0, 1.0, torch.zeros(symmetries.num_free, dtype=torch.float64)

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations, residual, best
        padded = torch.cat([torch.zeros(1, dtype=torch.float64), torch.from_numpy(z)])
        total, gradient, both = 0.0, torch.zeros_like(padded), 0.0
        for block in found.blocks:
            for place, side in enumerate(block.sides):
                energies = block.log_energies(0 if not block.is_matrix else place, padded, found.norm).exp()
                gradient.index_add_(0, side.ids, 2 * side.exponent * energies)
                both += 2 * float(energies[side.ids > 0].sum())
                total += float(energies.sum()) if place == 0 else 0.0
        evaluations += 1
        residual, best = float(gradient[1:].abs().sum()) / both, padded[1:]
        if residual <= 1e-6 or time.perf_counter() - started > limit:
            raise DoneError
        return math.log(total), (gradient[1:] / total).numpy()

    with contextlib.suppress(DoneError):
        optimize.minimize(objective, best.numpy(), jac=True, method="L-BFGS-B", options=OPTIONS)
    symmetries.rescale_(best)
    seconds = time.perf_counter() - started
    return {"discovery": 0.0, "solve_apply": seconds, "cycles": evaluations, "residual": residual}


def measure(name: str, repeats: int, without: Sequence[str]) -> dict[str, Any]:
    """Medians and spreads of one model."""
    torch.manual_seed(0)
    model = import_models().get_model(name, weights=None).eval()
    args = (torch.randn(1, 3, 224, 224),)
    spread = equinorm.symmetries(model, args)
    spread.rescale_((2 * torch.rand(spread.num_free, dtype=torch.float64) - 1) * math.log(10))
    contestants = {
        "p=2": lambda m: ours(m, args, 2.0),
        "p=inf": lambda m: ours(m, args, math.inf),
        "brevitas": lambda m: brevitas(m, args),
        "L-BFGS": lambda m: lbfgs(m, args),
    }
    contestants = {key: run for key, run in contestants.items() if key not in without}
    runs: dict[str, list[dict[str, float]]] = {key: [] for key in contestants}
    for repeat in range(repeats + 1):
        for key, run in contestants.items():
            twin = copy.deepcopy(model)
            with torch.no_grad():
                result = run(twin)
            if repeat:
                runs[key].append(result)
    record: dict[str, Any] = {"model": name, "repeats": repeats, "clock": CLOCK, "again": AGAIN}
    for key, results in runs.items():
        seconds = [result["solve_apply"] for result in results]
        record[key] = {
            "solve_apply_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "discovery_s": statistics.median(result["discovery"] for result in results),
            "cycles": results[0]["cycles"],
            **({"residual": results[0]["residual"]} if "residual" in results[0] else {}),
        }
    for other, key in (("brevitas", "p=2"), ("brevitas", "p=inf"), ("L-BFGS", "p=2")):
        if other not in record:
            continue
        record[f"{other} / {key}"] = record[other]["solve_apply_s"] / record[key]["solve_apply_s"]
    return record | {"kernels": native.are_shipped()} | machine()


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--models", nargs="+", default=["alexnet", "vgg11_bn", "resnet50", "densenet121"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--without", nargs="+", default=[], choices=["L-BFGS", "brevitas"])
    options = parser.parse_args()
    global CLOCK, AGAIN
    CLOCK, AGAIN = options.clock, options.again
    torch.set_num_threads(options.threads)
    report((measure(name, options.repeats, options.without) for name in options.models), options.output)


if __name__ == "__main__":
    main()
