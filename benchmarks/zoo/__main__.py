"""Discovery on everything that people run: free classes, coverage, pins, times, and the deviation of a random rescaling.

    python benchmarks/zoo torchvision timm transformers libraries large [--models resnet18] [--output results/zoo.jsonl]

Every model is looked at on the meta device, so that it fits any machine. Of each family (file of definitions) the smallest
model with free channels (of transformers, where all are tiny, and of torchvision each that fits) is also built in float64,
moved to a random point of what was found, and run before and after. Weights are random; statistics, gains, shifts and
zero-initialised heads are redrawn first, so that no violation can hide behind a zero or a one. What --output holds already is
not repeated.
"""

import argparse
import contextlib
import gc
import importlib
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import equinorm

ZOOS = {
    "torchvision": "from_torchvision",
    "timm": "from_timm",
    "transformers": "from_transformers",
    "libraries": "from_libraries",
    "large": "large_language_models",
}
"""Module that builds the models of each."""
LARGEST, LARGEST_OF_FAMILY = 120e6, 600e6
"""Parameters of the largest model that is run: more for the only one of a family."""


def _builder(zoo: str) -> Any:
    return importlib.import_module(f"zoo.{ZOOS[zoo]}")


class Double(TorchDispatchMode):
    """Computes in float64 where a model's forward asks for float32, as norms and gains in half-precision models do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextlib.contextmanager
def staying_double() -> Iterator[None]:
    """Let `tensor.float()` keep float64, for models that ask for float32 while they are exported too."""

    def keep(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_default_dtype())

    with mock.patch.object(Tensor, "float", keep):
        yield


@torch.no_grad()
def randomise_(model: nn.Module) -> None:
    """Redraw statistics, vectors and constant tensors; small shifts, gains around 1."""
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.normal_(0, 0.1)
            variance.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        is_constant = parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())
        if parameter.dim() == 1 or is_constant:
            if (name.endswith("weight") and parameter.dim() == 1) or name.endswith(("layer_scale", "logit_scale")):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)


def build(zoo: str, name: str, seed: int = 0, **options: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model in evaluation mode and float64, none of whose tensors is zero or constant, and its inputs."""
    torch.manual_seed(seed)
    model, args, kwargs = _builder(zoo).build(name, **options)
    model.double().eval()
    randomise_(model)
    args, kwargs = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs))
    return model, args, kwargs


def look(zoo: str, name: str) -> dict[str, Any]:
    """What is found in a model on the meta device."""
    with torch.device("meta"):
        model, args, kwargs = _builder(zoo).build(name)
    return _found(equinorm.symmetries(model.eval(), args, kwargs))


def _found(symmetries: equinorm.Symmetries) -> dict[str, Any]:
    pins = Counter[str]()
    for pin in symmetries.pins:
        pins[f"{pin.reason.operation} ({pin.reason.detail})" if pin.reason.detail else pin.reason.operation] += pin.channels
    return {
        "free": symmetries.num_free,
        "pinned": sum(pins.values()),
        "coverage": round(symmetries.coverage, 6),
        "parameters": sum(p.numel() for p in symmetries.model.parameters()),
        "export_seconds": round(symmetries.seconds[0], 3),
        "interpretation_seconds": round(symmetries.seconds[1], 3),
        "pins": dict(pins.most_common()),
    }


@torch.no_grad()
@staying_double()
def measure(zoo: str, name: str, seed: int = 0) -> dict[str, Any]:
    """What is found, and how far a random rescaling moves the outputs: the largest change by the largest output.

    With powers of two nothing rounds, so that any change is one too many; with real scales rounding is seen as well.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of what forwards make themselves
    try:
        model, args, kwargs = build(zoo, name, seed)
        symmetries = equinorm.symmetries(model, args, kwargs)
        before = outputs(model, args, kwargs, seed)
        log_scales = torch.randn(symmetries.num_free, dtype=torch.float64)
        whole = (log_scales / math.log(2)).round() * math.log(2)
        symmetries.rescale_(whole)
        exact = _change(outputs(model, args, kwargs, seed), before)
        symmetries.rescale_(-whole)
        symmetries.rescale_(log_scales)
        return {
            **_found(symmetries),
            "deviation": _change(outputs(model, args, kwargs, seed), before),
            "deviation_powers_of_two": exact,
            "output_spread": max(float(value.std() / value.abs().max()) for value in before),
            "largest_log_scale": float(log_scales.abs().max()) if symmetries.num_free else 0.0,
            "seed": seed,
        }
    finally:
        torch.set_default_dtype(default)


def _change(after: list[Tensor], before: list[Tensor]) -> float:
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))


def outputs(model: nn.Module, args: tuple, kwargs: dict[str, Any], seed: int) -> list[Tensor]:
    """Every floating-point output that is not zero throughout."""
    torch.manual_seed(seed)
    with Double():
        found = tree_flatten(model(*args, **kwargs))[0]
    found = found if any(isinstance(value, Tensor) for value in found) else list(found[0].values())
    return [v for v in found if isinstance(v, Tensor) and v.is_floating_point() and v.numel() > 1 and bool(v.any())]


def record(zoo: str, name: str, run: bool, seed: int = 0) -> dict[str, Any]:
    """One line of results; a model that fails yields its error."""
    subject = {"zoo": zoo, "model": name, "family": _builder(zoo).family(name), "run": run}
    started = time.perf_counter()
    try:
        found = measure(zoo, name, seed) if run else look(zoo, name)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
    about = {
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),  # of this process so far
        "equinorm": equinorm.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return {**subject, **found, "seconds": round(time.perf_counter() - started, 2), **about}


def sweep(zoo: str, models: list[str] | None, known: list[dict[str, Any]], seed: int = 0) -> Iterator[dict[str, Any]]:
    """First every model on the meta device; then those that are run, one in memory at a time."""
    names = models or _builder(zoo).names()
    known = [record for record in known if record["zoo"] == zoo]
    looked = {record["model"]: record for record in known if not record["run"]}
    ran = {record["model"] for record in known if record["run"]}
    for name in names:
        if name not in looked:
            looked[name] = record(zoo, name, run=False)
            yield looked[name]
    chosen = sorted((looked[name] for name in names), key=lambda found: found.get("parameters", 0))
    telling = sorted((found for found in chosen if "error" not in found), key=lambda found: not found["free"])
    smallest = {found["family"]: found["model"] for found in reversed(telling)}.values()  # of each family
    for found in chosen:
        is_one = found["model"] in smallest and found.get("parameters", 0) <= LARGEST_OF_FAMILY
        fits = found.get("parameters", 0) <= LARGEST and (zoo != "timm" or bool(models))
        if found["model"] not in ran and (is_one or fits):
            yield record(zoo, found["model"], run=True, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("zoos", nargs="+", choices=ZOOS)
    parser.add_argument("--models", nargs="*", help="names; default: all")
    parser.add_argument("--output", type=Path, help="file of JSON lines to append to; default: print only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = common.read(options.output) if options.output and options.output.exists() else []
    for zoo in options.zoos:
        common.report(sweep(zoo, options.models, known, options.seed), options.output)


if __name__ == "__main__":
    main()
