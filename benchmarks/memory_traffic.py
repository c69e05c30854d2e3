"""Ways to find the energies of a training step, by the memory that each moves: predicted, and on the clock.

    python benchmarks/memory_traffic.py [--networks fc conv resnet18 resnet50] [--threads 2] [--rounds 20]
        [--output benchmarks/results/traffic.jsonl]

One kernel (`traffic.cpp`) does SGD's update with momentum, scales, and sums of squares along both sides, in any combination:

    recomputed   update · sums of columns · sums of rows with the scales just found (Algorithm 1) · scale w and momentum
    previous     update · scale w and momentum, and sum the squares of what is written, for the next step
    fused        update and sums in one · scale w and momentum
    deferred     the last step's scales of momentum, update and sums in one · scale w

Only the first is Algorithm 1: the others sum rows before the scales of columns are known (all sides at once, not in turn), the
second of weights that are a step old; the last two replace the optimizer. Costs are those beyond the update alone, in floors:
an in-place product with weights and momentum, which moves as much as four reads of all weights. Scales are all 1.
"""

import argparse
import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common import machine, options_of, report, summary
from training_step import network, rounds

UPDATE, PENDING, SCALED, SUMS = 8, 4, 2, 1
READS = {"recomputed": 6, "previous": 4, "fused": 4, "deferred": 2}
"""Reads and writes of all weights or of all momentum that each adds to an update."""


def kernel() -> ctypes.CDLL:
    """`traffic.cpp` for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "traffic.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["c++", *flags, "-o", built, Path(__file__).with_suffix(".cpp")], check=True)
        return ctypes.CDLL(str(built))


class Matrix:
    """One weight as rows and columns, with what a step keeps beside it."""

    def __init__(self, weight: torch.Tensor, library: ctypes.CDLL) -> None:
        self.weight = weight.detach().flatten(1).contiguous()
        self.momentum, self.gradient = torch.zeros_like(self.weight), torch.randn_like(self.weight) * 1e-4
        rows, columns = self.weight.shape
        self.vectors = torch.ones(rows), torch.ones(columns), torch.empty(rows), torch.zeros(columns)
        tensors = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (self.weight, self.momentum, self.gradient)]
        vectors = [ctypes.c_void_p(vector.data_ptr()) for vector in self.vectors]
        self.weights = *tensors, ctypes.c_int64(rows), ctypes.c_int64(columns), *vectors
        self.momenta = tensors[1], *self.weights[1:]  # in the place of weights, to be scaled
        self.library = library

    def touch(self, what: int, momentum: bool = False) -> None:
        """One pass over the weights, or only over momentum."""
        switches = ((what & bit) // bit for bit in (UPDATE, PENDING, SCALED, SUMS))
        self.library.traffic(*switches, *(self.momenta if momentum else self.weights), torch.get_num_threads())


def ways(matrices: list[Matrix]) -> dict[str, Callable[[], None]]:
    """One step of each, and the update alone."""

    def all_of(*passes: tuple[int, bool]) -> None:
        for what, momentum in passes:
            for matrix in matrices:
                matrix.touch(what, momentum)

    def recomputed() -> None:
        all_of((UPDATE, False))
        for matrix in matrices:  # one after the other, as in Algorithm 1: what fits the cache is read from it
            matrix.touch(SUMS)
            matrix.touch(SUMS)
        all_of((SCALED, False), (SCALED, True))

    return {
        "update": lambda: all_of((UPDATE, False)),
        "recomputed": recomputed,
        "previous": lambda: all_of((UPDATE, False), (SCALED | SUMS, False), (SCALED, True)),
        "fused": lambda: all_of((UPDATE | SUMS, False), (SCALED, False), (SCALED, True)),
        "deferred": lambda: all_of((UPDATE | PENDING | SUMS, False), (SCALED, False)),
    }


def measure(name: str, library: ctypes.CDLL, count: int) -> dict[str, Any]:
    """Every way on the weights of one network."""
    torch.manual_seed(0)
    matrices = [Matrix(weight, library) for weight in network(name)[0].parameters() if weight.dim() > 1]
    weights, momenta = [m.weight for m in matrices], [m.momentum for m in matrices]

    def floor() -> None:
        torch._foreach_mul_(weights, 1.0)
        torch._foreach_mul_(momenta, 1.0)

    found = rounds({"floor": floor, **ways(matrices)}, count, "cpu")
    updates, floors = found.pop("update"), found["floor"]
    size = sum(weight.numel() for weight in weights)
    return {
        "network": name,
        "parameters": size,
        "seconds": {"floor": summary(floors), "update": summary(updates)},
        "bytes": {way: 4 * size * reads for way, reads in READS.items()},
        "floors": {way: summary([(t - u) / f for t, u, f in zip(found[way], updates, floors, strict=True)]) for way in READS},
    }


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    library = kernel()
    for name in options.networks:
        yield measure(name, library, options.rounds)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=["fc", "conv", "resnet18", "resnet50"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report((record | machine() for record in records(options)), options.output)


if __name__ == "__main__":
    main()
