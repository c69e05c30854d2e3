"""Weight matching: equinorm.align beside the public rebasin package, on two networks of torchvision with random weights.

    python benchmarks/alignment.py resnet18 resnet50 [--output results.jsonl]

Each takes the same two networks, permutes one near to the other, and is timed in CPU seconds on one thread, discovery of what
moves together included. rebasin is left out where it is not installed.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import equinorm
from common import machine, options_of, report
from zoo.from_torchvision import import_models


def by_equinorm(a: nn.Module, b: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a near to b."""
    return equinorm.align(a, b, x, rescale=False, flip=False).model


def by_rebasin(a: nn.Module, b: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a near to b."""
    from rebasin import PermutationCoordinateDescent

    moved = copy.deepcopy(a)
    PermutationCoordinateDescent(model_a=b, model_b=moved, input_data_b=x).rebasin()
    return moved


def distance(one: nn.Module, other: nn.Module) -> float:
    """‖a − b‖₂ / ‖b‖₂ over all parameters."""
    a, b = (torch.cat([p.detach().double().flatten() for p in model.parameters()]) for model in (one, other))
    return float((a - b).norm() / b.norm())


def records(name: str) -> Iterator[dict[str, Any]]:
    """One line for each way."""
    pair = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pair.append(getattr(import_models(), name)().eval())
    a, b = pair
    x = torch.randn(2, 3, 64, 64)
    ways: dict[str, Callable[[nn.Module, nn.Module, Tensor], nn.Module]] = {"equinorm": by_equinorm, "rebasin": by_rebasin}
    for way, move in ways.items():
        started = time.process_time()
        try:
            moved = move(a, b, x)
        except Exception as error:
            yield {"model": name, "way": way, "error": f"{type(error).__name__}: {error}"}
            continue
        yield {
            "model": name,
            "way": way,
            "cpu_seconds": round(time.process_time() - started, 1),
            "distance_before": round(distance(a, b), 6),
            "distance_after": round(distance(moved, b), 6),
            "deviation": equinorm.deviation(moved, a, x),
            **machine(),
        }


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        report(records(name), options.output)


if __name__ == "__main__":
    main()
