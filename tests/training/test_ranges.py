"""Steps of ENorm in networks of extreme weights: no number of a state, a gradient or an average leaves its dtype."""

import copy

import pytest
import torch
from torch import nn, optim

import equinorm
from equinorm import ENorm
from equinorm.rescaling import mover
from equinorm.rescaling.bounds import room


def extreme(size, dtype=torch.float32):
    """Two layers that a rescaling far from 1 balances."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).to(dtype)
    with torch.no_grad():
        net[0].weight.mul_(size)
        net[2].weight.div_(size)
    return net, torch.randn(6, 4, dtype=dtype)


def numbers(net, optimizer):
    state = [value for parameter in net.parameters() for value in optimizer.state[parameter].values()]
    return [*net.parameters(), *(parameter.grad for parameter in net.parameters()), *state]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("size", [1e25, 1e-25, 1e8])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_states_stay_finite(kind, size, compile):
    """exp_avg_sq would grow by 1e50, and the scales' squares and their inverses leave float32."""
    net, inputs = extreme(size)
    options = {"momentum": 0.9} if kind is optim.SGD else {}
    optimizer = kind(net.parameters(), lr=0.0, **options)
    hook = ENorm(optimizer, net, (inputs,), p=1.0, compile=compile)
    (net(inputs).square().mean() * 1e-15).backward()  # Adam's own squares stay in range
    before = copy.deepcopy(net)
    for _ in range(6):
        optimizer.step()
    assert all(bool(value.isfinite().all()) for value in numbers(net, optimizer))
    assert equinorm.deviation(net, before, (inputs,)) <= 1e-5
    assert hook.steps == 6
    assert not torch.equal(net[0].weight, before[0].weight)
    for parameter, old in zip(net.parameters(), before.parameters(), strict=True):
        scale = parameter.detach().double() / old.detach().double()
        moved = parameter.grad.double() * scale
        assert bool(moved.isfinite().all())


@pytest.mark.parametrize("value", [1e36, 1e30])
def test_steps_are_cut_where_a_state_would_overflow(value, monkeypatch):
    net, inputs = extreme(1e6)
    optimizer = optim.Adam(net.parameters(), lr=0.0)
    hook = ENorm(optimizer, net, (inputs,))
    net(inputs).square().mean().backward()
    optimizer.step()
    found = equinorm.symmetries(net, (inputs,))
    found.rescale_(torch.full((8,), 14.0), optimizer)  # far from the minimum again
    with torch.no_grad():
        for parameter in net.parameters():
            optimizer.state[parameter]["exp_avg_sq"].fill_(value)
    before = copy.deepcopy(net)
    for _ in range(20):
        hook.cycle_()
    assert all(bool(found.isfinite().all()) for found in numbers(net, optimizer))
    assert equinorm.deviation(net, before, (inputs,)) <= 1e-5
    assert not torch.equal(net[0].weight, before[0].weight)
    looked = []
    monkeypatch.setattr(mover, "room", lambda *given: looked.append(given) or room(*given))
    with torch.no_grad():
        for parameter in net.parameters():
            optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    hook.cycle_()
    looked.clear()
    hook.cycle_()
    assert not looked
    for _ in range(60):  # short steps, each of which uses some of the room that was seen
        with torch.no_grad():
            net[0].weight.mul_(4.0)
            net[2].weight.div_(4.0)
        hook.cycle_()
    assert looked


def test_ordinary_steps_are_not_cut():
    """Two steps of a network whose layers differ by 1e8 end where one exact step ends."""
    net, inputs = extreme(1e4, torch.float64)
    hook = ENorm(optim.SGD(net.parameters(), lr=0.0), net, (inputs,))
    hook.cycle_()
    assert hook.residual() <= 1e-12
