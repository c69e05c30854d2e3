"""Algorithm 1 as a plain loop, and networks to run it on: the reference for every fast path."""

import itertools
import math
import shutil

import pytest
import torch
from torch import Tensor, nn

import equinorm

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="the kernels need a C++ compiler, and there is none"
)


def in_norm(weight: Tensor, p: float) -> Tensor:
    """ℓp norm over everything that enters each output channel."""
    return weight.flatten(1).abs().pow(p).sum(1).pow(1 / p)


def out_norm(weight: Tensor, channels: int, p: float) -> Tensor:
    """ℓp norm over everything that leaves each of `channels` inputs; a flattened map has several entries for each."""
    return weight.transpose(0, 1).reshape(channels, -1).abs().pow(p).sum(1).pow(1 / p)


def along(scale: Tensor, weight: Tensor, axis: int) -> Tensor:
    """A scale of channels, repeated for the entries that each has, in the shape that multiplies one axis of the weight."""
    scale = scale.repeat_interleave(weight.size(axis) // len(scale))
    return scale.reshape([-1 if i == axis else 1 for i in range(weight.dim())])


@torch.no_grad()
def algorithm_1_(layers: list[nn.Module], p: float, c: float = 1.0, biases: bool = False) -> list[Tensor]:
    """One cycle in place over layers in their order; returns the scales D of each hidden layer."""
    scales: list[Tensor] = []
    for before, after in itertools.pairwise(layers):
        left = in_norm(before.weight, p)
        if biases and before.bias is not None:
            left = (left.pow(p) + before.bias.abs().pow(p)).pow(1 / p)
        right = out_norm(after.weight, len(left), p)
        scale = (right / (c * left)).sqrt()
        before.weight.mul_(along(scale, before.weight, 0))
        if before.bias is not None:
            before.bias.mul_(scale)
        after.weight.div_(along(scale, after.weight, 1))
        scales.append(scale)
    return scales


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def mlp(depth: int = 4, width: int = 12, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A fully connected network of 5 inputs, `depth` hidden layers and 3 outputs."""
    sizes = [5, *[width] * depth]
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3, bias=bias)).to(dtype)


def convolutional(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolutions, pooling and a linear head on 2 × 8 × 8 images."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 7, bias=bias),
        nn.ReLU(),
        nn.Linear(7, 3, bias=bias),
    ).to(dtype)


def unbalance_(model: nn.Module, inputs: Tensor, decades: float = 1.0) -> None:
    """Scale hidden channels by 10^U(−decades, decades)."""
    found = equinorm.symmetries(model, (inputs,))
    found.rescale_((2 * torch.rand(found.num_free, dtype=torch.float64) - 1) * decades * math.log(10))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    """One step on the mean square of the outputs."""
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
