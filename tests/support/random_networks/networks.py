"""Random small networks: straight-line programs over a pool of values."""

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from random_networks import (
    layers as network_layers,
    masks as network_masks,
    moves as network_moves,
    values as network_values,
)
from random_networks.operations import OPS

assert network_layers
assert network_masks
assert network_moves
assert network_values  # imported for what they enter into OPS

INPUTS = {"vector": (5, 3), "sequence": (3, 4, 3), "map": (3, 2, 4, 4)}
LARGEST = 600
"""Values with more entries end a program's growth there."""


@dataclass(frozen=True)
class Step:
    """One operation on earlier values, which may share its weights with another step."""

    op: str
    values: tuple[int, ...]
    part: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        arguments = [f"v{i}" for i in self.values] + [f"{k}={v}" for k, v in self.options.items()]
        return f"{self.op}({', '.join(arguments)})" + (f" with {self.part}" if self.part else "")


class Network(nn.Module):
    """Runs its steps; `rewritten` in the other way that operations can be written."""

    def __init__(self, inputs: tuple[str, ...], training: bool, rewritten: bool = False) -> None:
        super().__init__()
        self.inputs, self.rewritten = inputs, rewritten
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self.parts = nn.ModuleDict()
        self.train(training)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        pool = [value.clone() for value in inputs]
        for step in self.steps:
            pool.append(self.apply_step(step, pool))
        return tuple(pool[i] for i in self.outputs)

    def apply_step(self, step: Step, pool: list[Tensor]) -> Tensor:
        op = OPS[step.op]
        run = op.also if self.rewritten and op.also else op.run
        part = self.parts[step.part] if step.part else None
        return run(part, *(pool[i] for i in step.values), **step.options)

    def rewrite(self) -> "Network":
        """The same function of the same weights, written in another way."""
        other = Network(self.inputs, self.training, rewritten=True)
        other.steps, other.outputs, other.parts = self.steps, self.outputs, self.parts
        return other

    @property
    def is_exact(self) -> bool:
        return all(OPS[step.op].exact for step in self.steps)

    @property
    def is_rewritable(self) -> bool:
        """Must its other form give the same group?"""
        return any(OPS[step.op].also for step in self.steps)

    @property
    def casts(self) -> bool:
        return any(OPS[step.op].casts for step in self.steps)

    def __repr__(self) -> str:
        mode = "train" if self.training else "eval"
        lines = [f"v{i} = input {name} {INPUTS[name]}" for i, name in enumerate(self.inputs)]
        lines += [f"v{i} = {step}" for i, step in enumerate(self.steps, len(lines))]
        return "\n  ".join([f"Network ({mode})", *lines, f"return {', '.join(f'v{i}' for i in self.outputs)}"])


def arguments(network: Network, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(INPUTS[name], generator=generator, dtype=torch.float64) for name in network.inputs)


@torch.no_grad()
def randomise_(part: nn.Module, name: str) -> nn.Module:
    """Weights of either sign, none near zero, the same for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    part.double()
    for tensor in part.parameters():
        size = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        tensor.copy_(size * (torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1))
    for key, buffer in part.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return part


@st.composite
def networks(draw, steps: int = 14) -> Network:
    """Programs of at most so many steps. Steps that do not suit the values, or blow them up, are left out."""
    inputs = tuple(draw(st.lists(st.sampled_from(list(INPUTS)), min_size=1, max_size=2)))
    network = Network(inputs, draw(st.booleans()))
    pool = [value.clone() for value in arguments(network)]
    menu = [name for name, op in OPS.items() for _ in range(op.often)]
    for name in draw(st.lists(st.sampled_from(menu), min_size=4, max_size=steps)):
        _grow(draw, network, pool, name)
    last = len(pool) - 1
    chosen = {last} | draw(st.sets(st.integers(0, last), max_size=1))
    for i in sorted(chosen):
        headed = _grow(draw, network, pool, "linear", fixed=i) if draw(st.integers(0, 3)) else False
        network.outputs.append(len(pool) - 1 if headed else i)
    return network


def _grow(draw, network: Network, pool: list[Tensor], name: str, fixed: int | None = None) -> bool:
    """Append one step if it suits; its first value is most often a recent one."""
    op = OPS[name]
    back = draw(st.sampled_from([0, 0, 0, 1, 2, 3]))
    first = max(len(pool) - 1 - back, 0) if fixed is None else fixed
    alike = [i for i, value in enumerate(pool) if value.shape == pool[first].shape]
    values = (first, *(draw(st.sampled_from(alike)) for _ in range(op.arity - 1)))
    operands = [pool[i] for i in values]
    options = op.choose(draw, *operands)
    if options is None:
        return False
    part = None
    if op.part is not None:
        signature = "_".join(str(v) for v in (name, *operands[0].shape[1:], *options.values())).replace(".", "-")
        used = [key for key in network.parts if key.rsplit("__", 1)[0] == signature]
        part = draw(st.sampled_from([f"{signature}__{len(used)}"] * 3 + used))
        if part not in network.parts:
            network.parts[part] = randomise_(op.part(operands[0], **options), part).train(network.training)
    step = Step(name, values, part, options)
    copies = [value.clone() for value in pool]  # what operations in place do to others is replayed on these
    with torch.no_grad():
        result = network.apply_step(step, pool)
    is_tame = 0 < result.numel() <= LARGEST and bool(result.isfinite().all()) and 0.01 < float(result.abs().max()) < 1e4
    if not is_tame:
        pool[:] = copies
        if part is not None and all(other.part != part for other in network.steps):
            del network.parts[part]
        return False
    network.steps.append(step)
    pool.append(result)
    return True
