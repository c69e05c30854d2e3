"""The hook where squares leave float32's range."""

import math

import pytest
import torch
from algorithm_1 import mlp, needs_compiler
from torch import nn

import equinorm
from equinorm import ENorm


def _extreme(dtype: torch.dtype, decades: float = 25.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = mlp(depth=2, bias=False).to(dtype)
    with torch.no_grad():
        net[0].weight.mul_(10.0**-decades)
        net[4].weight.mul_(10.0**decades)
    return net


def _hook(net: nn.Sequential, **options) -> ENorm:
    inputs = torch.randn(4, 5, dtype=net[0].weight.dtype)
    return ENorm(torch.optim.SGD(net.parameters(), lr=0.0), net, (inputs,), **options)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_very_different_size(p, dtype, compile):
    net = _extreme(dtype)
    wanted = equinorm.symmetries(net, torch.randn(4, 5, dtype=dtype)).balance(p=p, method="cyclic", cycles=2)
    hook = _hook(net, p=p, cycles=2, compile=compile)
    assert hook.residual() > 0.99
    hook.cycle_()
    after = equinorm.symmetries(net, torch.randn(4, 5, dtype=dtype)).balance(p=p, cycles=0)
    assert after.norm_before == pytest.approx(wanted.norm_after, rel=1e-5 if dtype == torch.float32 else 1e-10)


def test_one_tiny_channel():
    net = mlp(depth=1, bias=False).float()
    with torch.no_grad():
        net[0].weight[3] *= 1e-25
        net[2].weight[:, 3] *= 1e25
    least = equinorm.symmetries(net, torch.randn(4, 5)).balance().norm_after
    _hook(net).cycle_()
    assert math.sqrt(sum(float(w.detach().double().square().sum()) for w in net.parameters())) == pytest.approx(least, rel=1e-5)


def test_weights_that_leave_the_range_while_training():
    net = mlp(depth=2, bias=False).float()
    hook = _hook(net)
    assert hook.residual() < 0.99
    with torch.no_grad():
        net[0].weight.mul_(1e-25)
        net[4].weight.mul_(1e25)
    assert hook.residual() > 0.99
    hook.cycle_()
    assert float(net[0].weight.detach().abs().max()) > 1e-14
