"""What balancing says where there is nothing to do, and where it cannot be done as asked."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

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


class Loop(nn.Module):
    """Layers without bias, the middle one applied several times in a row."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.first, self.again, self.last = (nn.Linear(i, o, bias=False).double() for i, o in ((4, 6), (6, 6), (6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for _ in range(self.times):
            x = self.again(x).relu()
        return self.last(x)


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_layer_without_bias_that_is_applied_again_and_again_is_not_dead(times, p):
    torch.manual_seed(times)
    model, inputs = Loop(times), (torch.randn(2, 4, dtype=torch.float64),)
    first, again, last = (layer.weight.detach().numpy().copy() for layer in (model.first, model.again, model.last))

    def norm(logs: np.ndarray) -> float:
        """Of weights that the scales of channels and one of the loop have moved."""
        scales, loop = np.exp(logs[:6]), np.exp(logs[6])
        moved = (first * scales[:, None], again * loop * scales[:, None] / scales, last / (scales * loop**times))
        return float(sum((np.abs(weight) ** p).sum() for weight in moved))

    least = optimize.minimize(norm, np.zeros(7), method="BFGS", options={"gtol": 1e-9}).fun ** (1 / p)
    found = equinorm.balance_(model, inputs, p=p, tol=1e-12)
    assert (found.dead, found.converged) == ((), True)
    assert found.norm_after == pytest.approx(least, rel=1e-9)
