"""Does a step with the hook wait for the GPU? PyTorch raises an error at every synchronisation within.

    python benchmarks/synchronisation.py [--device cuda] [--hooks plain compiled] [--output FILE]

Elsewhere than on CUDA the same steps run, and nothing is checked: the record says so.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import equinorm
from common import add_hooks, machine, options_of, report
from equinorm.experiments.config import Run
from equinorm.experiments.networks import build

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "SGD with decay": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
}
STEPS = 3


def waits(optimizer: str, method: str, is_compiled: bool, device: str) -> dict[str, Any]:
    """One record: what PyTorch said of the first synchronisation, or None."""
    torch.manual_seed(0)
    model = build(Run(network="conv", width=16), (3, 28, 28), 10).to(device)
    images, labels = torch.randn(8, 3, 28, 28, device=device), torch.randint(10, (8,), device=device)
    stepping = OPTIMIZERS[optimizer](model.parameters())
    hook = equinorm.ENorm(stepping, model, (images,), c=1.1, method=method, compile=is_compiled)
    found = None
    for number in range(2 * STEPS):
        stepping.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        watched = device != "cpu" and number >= STEPS  # the first steps make states, and compile
        try:
            if watched:
                torch.cuda.set_sync_debug_mode("error")
            stepping.step()
        except (RuntimeError, equinorm.EquinormError) as error:  # within a write it comes as one of ours
            found = str(error)
            break
        finally:
            if watched:
                torch.cuda.set_sync_debug_mode("default")
    made = {"optimizer": optimizer, "method": method, "compile": is_compiled, "steps": hook.steps}
    return made | {"checked": device != "cpu", "waits": found}


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for hooks in options.hooks:
        for optimizer in OPTIMIZERS:
            for method in ("cyclic", "two-level"):
                yield waits(optimizer, method, hooks == "compiled", options.device) | machine(options.device)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--device", default="cuda")
    add_hooks(parser)
    options = parser.parse_args()
    report(records(options), options.output)


if __name__ == "__main__":
    main()
