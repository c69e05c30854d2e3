"""Mixtures of experts beside a dense model of the same size: discovery, balance, steps of the hook, memory.

    python benchmarks/experts.py [--models mixtral llama] [--rounds 3] [--output benchmarks/results/experts.jsonl]

The mixture has 8 experts of 4096 in 2 layers of width 2048, packed as transformers keeps them (experts, out, in). The dense
model has the same layers with one feed-forward block as wide as all experts together. Weights are float32 and random, channels
rescaled by 10^U(-1, 1). Seconds are those of one processor (one thread), medians over rounds; memory is the highest resident
set during the call beyond what was resident before it (Linux), in bytes of the weights. A step is the hook's, with the momentum
of SGD.
Each model runs in a process of its own. Needs transformers.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import equinorm
from balancing import Peak
from common import machine, options_of, report
from equinorm import native
from zoo.from_transformers import import_transformers

LAYERS, WIDTH, INNER, EXPERTS = 2, 2048, 4096, 8
SIZES = {"vocab_size": 1024, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 16}
SIZES |= {"num_key_value_heads": 8, "max_position_embeddings": 128}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"intermediate_size": INNER * EXPERTS}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"intermediate_size": INNER, "num_local_experts": EXPERTS}),
}
"""Classes of model and configuration, and sizes."""


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights, and eight tokens."""
    transformers = import_transformers()
    model_class, config_class, sizes = MODELS[name]
    config = getattr(transformers, config_class)(**SIZES, **sizes)
    config._experts_implementation = "batched_mm"
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.requires_grad_(), {"input_ids": torch.randint(0, 100, (1, 8)), "use_cache": False}


def timed(function: Callable[[], Any]) -> tuple[float, int, Any]:
    """Processor seconds of a call, the most bytes that it held beyond those before, and its result."""
    with Peak() as peak:
        started = time.process_time()
        result = function()
        seconds = time.process_time() - started
    return seconds, peak.bytes, result


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One record."""
    torch.set_num_threads(1)
    for kind in (torch.float32, torch.float64):  # not while time is taken
        native.kernels_for(torch.float32, kind)
    model, inputs = build(name)
    found: dict[str, list[tuple[float, int]]] = {}

    def take(what: str, function: Callable[[], Any]) -> Any:
        seconds, used, result = timed(function)
        found.setdefault(what, []).append((seconds, used))
        return result

    weights = [parameter.detach().view(-1) for parameter in model.parameters()]
    symmetries = take("symmetries", lambda: equinorm.symmetries(model, (), inputs))
    generator = torch.Generator().manual_seed(0)
    spread = (2 * torch.rand(symmetries.num_free, dtype=torch.float64, generator=generator) - 1) * math.log(10)
    balance = None
    for _ in range(rounds):
        take("read", lambda: [torch.dot(weight, weight) for weight in weights])
        symmetries.rescale_(spread)
        for compile in (False, True):
            balance = take("balance" + ", compiled" * compile, partial(symmetries.balance, compile=compile))
        take("apply_", balance.apply_)
    for compile in (False, True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        for parameter in model.parameters():  # a step without gradients leaves the hook's work alone
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 1e-4, requires_grad=False)
        hook = equinorm.ENorm(optimizer, model, (), inputs, compile=compile)
        for number in range(rounds + 1):
            take("warm-up" if not number else "step" + ", compiled" * compile, hook.cycle_)
        hook.remove()
        optimizer.state.clear()
    nbytes = sum(weight.nbytes for weight in weights)
    return {
        "model": name,
        "parameters": sum(weight.numel() for weight in weights),
        "experts": sum(p.numel() for n, p in model.named_parameters() if p.dim() == 3),
        "free scales": symmetries.num_free,
        "seconds of labels": symmetries.seconds[1],
        "seconds": {what: statistics.median(seconds for seconds, _ in values) for what, values in found.items()},
        "memory": {what: max(used for _, used in values) / nbytes for what, values in found.items()},
        "cycles": balance.cycles if balance else 0,
        "residual": balance.residual if balance else 0.0,
        "norms": (balance.norm_before, balance.norm_after) if balance else (),
    }


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in options.models:
        command = [sys.executable, __file__, "--inside", "--models", name, "--rounds", str(options.rounds)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
        yield json.loads(done.stdout.splitlines()[-1]) | machine() | {"threads": 1}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.models[0], options.rounds)))
    else:
        report(records(options), options.output)


if __name__ == "__main__":
    main()
