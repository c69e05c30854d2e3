"""Permutations on everything that people run: families, channels, pins, times, and the deviation of a random member.

    python benchmarks/permutations.py torchvision timm transformers [--models resnet18] [--output results.jsonl] [--small]

Of each family of the zoo the model that benchmarks/results/zoo.jsonl ran is built in float64, permuted at random, and run
before and after. The time of discovery stands beside that of scales on the same model. With --small timm's models see images
of half the height and width where they can, and scales are not timed. What --output holds already is not repeated. Families
whose smallest model has more than 60 million parameters are left out, or more than --largest says.
"""

import argparse
import gc
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import common
import equinorm
from zoo.__main__ import ZOOS, _change, build, outputs, staying_double

RUN = Path(__file__).parent / "results" / "zoo.jsonl"
LARGEST = 60e6
"""Parameters of the largest model that is run, if not said otherwise."""

LIMIT = 1e-12
"""Deviation beyond which it is measured what a change of the inputs in their last bits does."""


def last_bits(args: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Inputs whose numbers are drawn anew within one rounding."""
    generator = torch.Generator().manual_seed(seed)

    def near(x: Any) -> Any:
        is_real = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x * (1 + (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5) * 2**-52) if is_real else x

    return tuple(map(near, args))


@torch.no_grad()
@staying_double()
def measure(zoo: str, name: str, seed: int = 0, small: bool = False, part: int = 1) -> dict[str, Any]:
    """What is found, and how far a random permutation moves the outputs: the largest change by the largest output."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model, args, kwargs = build(zoo, name, seed, **({"part": part} if part > 1 else {}))
        permutations = equinorm.permutations(model, args, kwargs)
        scales = None if small else equinorm.symmetries(model, args, kwargs)
        before = outputs(model, args, kwargs, seed)
        started = time.perf_counter()
        permutations.permute_(permutations.random(torch.Generator().manual_seed(seed)))
        permuting = time.perf_counter() - started
        after = outputs(model, args, kwargs, seed)
        change = _change(after, before)
        rounding = _change(outputs(model, last_bits(args, seed), kwargs, seed), after) if change > LIMIT else None
    finally:
        torch.set_default_dtype(default)
    pins = Counter[str]()
    for pin in permutations.pins:
        pins[f"{pin.reason.operation} ({pin.reason.detail})" if pin.reason.detail else pin.reason.operation] += pin.channels
    return {
        "families": permutations.num_families,
        "channels": permutations.num_channels,
        "deviation": change,
        "output_spread": max(float(value.std() / value.abs().max()) for value in before),
        "export_seconds": round(permutations.seconds[0], 3),
        "interpretation_seconds": round(permutations.seconds[1], 3),
        **({} if scales is None else {"interpretation_seconds_of_scales": round(scales.seconds[1], 3)}),
        **({} if rounding is None else {"deviation_of_last_bits": rounding}),
        **({} if part == 1 else {"image": list(args[0].shape[2:])}),
        "permuting_seconds": round(permuting, 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "pins": dict(pins.most_common()),
    }


def record(zoo: str, name: str, small: bool = False) -> dict[str, Any]:
    """One line of results; a model that fails, at every size of image, yields its error."""
    found: dict[str, Any] = {}
    for part in (2, 1) if small and zoo == "timm" else (1,):
        try:
            found = measure(zoo, name, small=small, part=part)
            break
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        finally:
            gc.collect()
    about = {"equinorm": equinorm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"zoo": zoo, "model": name, **found, **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("zoos", nargs="+", choices=ZOOS)
    parser.add_argument("--models", nargs="*", help="names; default: the smallest of each family")
    parser.add_argument("--output", type=Path, help="file of JSON lines to append to; default: print only")
    parser.add_argument("--small", action="store_true", help="small images, and no scales beside permutations")
    parser.add_argument("--largest", type=float, default=LARGEST, help="parameters of the largest model; default: 6e7")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = common.read(options.output) if options.output and options.output.exists() else []
    done = {(line["zoo"], line["model"]) for line in known}
    smallest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in common.read(RUN):
        if line["run"] and "error" not in line and line["parameters"] <= options.largest:
            key = line["zoo"], line["family"]
            if key not in smallest or line["parameters"] < smallest[key]["parameters"]:
                smallest[key] = line
    for zoo in options.zoos:
        names = options.models or [line["model"] for (of, _), line in smallest.items() if of == zoo]
        common.report((record(zoo, name, options.small) for name in names if (zoo, name) not in done), options.output)


if __name__ == "__main__":
    main()
