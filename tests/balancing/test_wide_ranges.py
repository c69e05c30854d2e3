"""Channels whose scales are so far apart that energies, or the factors beside them, leave the range of numbers."""

import math

import pytest
import torch
from torch import nn

import equinorm
from equinorm._scaling import Scaling
from equinorm.balancing.assemble import problem_of
from equinorm.balancing.layout import lay_out
from equinorm.balancing.options import BalanceOptions


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)


@pytest.mark.parametrize(("p", "spread"), [(1, 60.0), (1.5, 45.0), (2, 33.0)])
@pytest.mark.parametrize("compile", [False, True])
def test_factors_beyond_single_precision(p, spread, compile):
    """At the solution factors of e^(−2 · 66) stand beside 1, and energies of e^66 make up for them."""
    symmetries = equinorm.symmetries(perceptron(), torch.zeros(1, 4))
    expected = symmetries.balance(p).log_scales
    shift = torch.zeros(16, dtype=torch.float64)
    shift[:8] = spread * torch.tensor([1.0, -1.0] * 4)
    symmetries.rescale_(shift)
    found = symmetries.balance(p, compile=compile)
    assert found.converged
    torch.testing.assert_close(found.log_scales + shift, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("p", [10, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_faint_weight_keeps_a_channel_alive(p, dtype):
    """What leaves channel 1 goes to channel 3, which is dead, or by a weight whose power vanishes beside that of the other."""
    first, second, last = (nn.Linear(2, n, bias=False) for n in (2, 2, 1))
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).to(dtype)
    faint = 1e-4 if p == 100 else 1e-33
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.5, 0.25], [1.0, 0.5]]))
        second.weight.copy_(torch.tensor([[1.0, 0.5], [faint, 1.0]]))
        last.weight.copy_(torch.tensor([[0.0, 0.5]]))
    balance = equinorm.symmetries(net, torch.zeros(1, 2, dtype=dtype)).balance(p, tol=1e-9)
    assert balance.converged
    assert balance.dead == (3,)
    z = balance.log_scales
    into = math.log(0.5) + math.log1p(0.5**p) / p + z[0]
    assert float(into) == pytest.approx(math.log(faint) + float(z[3] - z[0]), abs=1e-5)


def test_faint_terms():
    """Exponents 1 and −2 of the same classes make a list of terms, in which powers that vanish stand as logarithms."""
    weight = torch.exp(-torch.arange(16.0).view(4, 4).fmod(7.0) * 2)
    ids = torch.arange(1, 5)
    scaling = Scaling(("w",), (4, 4), torch.float32, "parameter", "weight", 1, ((1.0, ids[:, None]), (-2.0, ids[None])))
    network = lay_out([scaling], [(1, 5)], 4, torch.zeros(5, dtype=torch.bool))
    found = problem_of(network, {"w": weight}, BalanceOptions(100))
    logs = torch.cat([block.log_energies(0, torch.zeros(5, dtype=torch.float64), found.norm) for block in found.blocks])
    assert not network.layouts[0].is_matrix
    torch.testing.assert_close(logs.sort().values, (100 * weight.double().log()).flatten().sort().values)
