"""Ways in which weights lie in memory, and the hook beside the plain loop on them."""

import copy

import torch
from algorithm_1 import algorithm_1_, convolutional, layers_of, mlp, unbalance_
from torch import nn

from equinorm import ENorm

NETWORKS = {"fully connected": (mlp, (5,)), "convolutional": (convolutional, (2, 8, 8))}


def transposed(model: nn.Module) -> nn.Module:
    """The same weights, with the last axis slowest in memory."""
    for parameter in model.parameters():
        order = list(range(parameter.dim()))[::-1]
        parameter.data = parameter.data.permute(order).contiguous().permute(order)
    return model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def spread(model: nn.Module) -> nn.Module:
    """The same weights, every second entry of a larger memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.repeat_interleave(2, -1)[..., ::2]
    return model


def follows_algorithm_1(lay_out, network: str, p: float, **options) -> ENorm:
    """The hook, after two cycles that were Algorithm 1 on weights that lie so in memory."""
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, inputs = build(), torch.randn(4, *shape, dtype=torch.float64)
    unbalance_(model, inputs)
    plain = copy.deepcopy(model)
    lay_out(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), p=p, c=1.1, **options)
    for _ in range(2):
        hook.cycle_()
        algorithm_1_(layers_of(plain), p, 1.1)
    for moved, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)
    return hook
