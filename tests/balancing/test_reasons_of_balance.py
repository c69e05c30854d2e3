"""What balancing says where there is nothing to do, and where it cannot be done as asked."""

import math

import pytest
import torch
from torch import nn

import equinorm
from equinorm import BalanceError, ENorm, EquinormError


def _sigmoid() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1))


def test_balance_and_hook_name_the_same_pins():
    model, inputs = _sigmoid(), (torch.randn(4, 5),)
    shown = str(equinorm.balance_(model, inputs))
    assert shown.startswith("no hidden channel of Sequential can be rescaled: 6 channels of 0.weight[0] by aten.sigmoid")
    assert "3 channels of 2.weight[0] by aten.tanh" in shown
    with pytest.raises(BalanceError) as refused:
        ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, inputs)
    assert str(refused.value) == f"{shown}."


def test_nothing_within_the_chosen_modules():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    shown = str(equinorm.symmetries(model, (torch.randn(4, 5),)).balance(modules="2"))
    assert shown == "no hidden channel of Sequential can be rescaled: none moves within the chosen modules alone"


@pytest.mark.parametrize(("p", "reason"), [(-1, "only positive p make a norm"), (0, "only positive"), (1e-3, "underflow")])
def test_norms_that_are_none(p, reason):
    found = equinorm.symmetries(_sigmoid(), (torch.randn(4, 5),))
    with pytest.raises(BalanceError, match=reason):
        found.balance(p=p)


@pytest.mark.parametrize("progress", [3, "bar", True])
def test_progress_must_be_called(progress):
    found = equinorm.symmetries(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), (torch.randn(4, 5),))
    with pytest.raises(BalanceError, match="progress must be a function"):
        found.balance(progress=progress)


@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_without_a_compiler_are_refused_alike(monkeypatch, p, dtype):
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype), (torch.randn(4, 5, dtype=dtype),)
    equinorm.native.kernels_for.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    before = model[0].weight.detach().clone()
    with pytest.raises(EquinormError, match="no c\\+\\+, g\\+\\+ or clang\\+\\+ on the PATH"):
        equinorm.balance_(model, inputs, p=p, compile=True)
    with pytest.raises(EquinormError, match="no c\\+\\+, g\\+\\+ or clang\\+\\+ on the PATH"):
        ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, inputs, p=p, compile=True)
    assert torch.equal(model[0].weight, before)
