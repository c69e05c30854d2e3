"""ENorm on deep networks: biases beside an asymmetry, and how closely the minimiser is followed."""

import copy

import pytest
import torch
from algorithm_1 import layers_of, step
from torch import nn

import equinorm
from equinorm import ENorm


def deep(depth: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in [(20, 32), *[(32, 32)] * depth]:
        layers += [nn.Linear(into, out, bias=bias), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
    return nn.Sequential(*layers, nn.Linear(32, 4, bias=bias))


def test_bias_steps_are_those_of_the_symmetric_point():
    """At c the first update of a bias, carried back to c = 1, is the update that it has there."""
    torch.manual_seed(0)
    start, inputs = deep(11).double(), torch.randn(64, 20, dtype=torch.float64)
    equinorm.balance_(start, (inputs,), tol=1e-12)
    updates, scales = {}, {}
    for c in (1.0, 1.2):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        hook = ENorm(optimizer, model, (inputs,), c=c, method="two-level", cycles=50, every=100)
        hook.cycle_()
        pairs = zip(layers_of(model), layers_of(start), strict=True)
        scales[c] = [float((a.bias.norm() / b.bias.norm()).detach()) for a, b in pairs]
        before = [layer.bias.detach().clone() for layer in layers_of(model)]
        step(model, optimizer, inputs)
        updates[c] = [layer.bias.detach() - b for layer, b in zip(layers_of(model), before, strict=True)]
    assert min(scales[1.2]) < 0.03  # c^{k(k − q)/2} in the middle of 13 layers
    for symmetric, asymmetric, scale in zip(updates[1.0], updates[1.2], scales[1.2], strict=True):
        ratio = float(asymmetric.norm() / (scale * symmetric.norm()))
        assert 0.4 < ratio < 2.5  # energies are about equal, not exactly: single channels differ


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_matched_biases_in_deep_networks(symmetric, biases):
    """15 layers, c = 1.2: plain steps of biases diverge (seen as NaN where the paper was replicated), symmetric ones do not.

    In float64: what divergence ends in, NaN or a dead network, depends on rounding otherwise.
    """
    torch.manual_seed(2)
    model = deep(15).double()
    inputs, targets = torch.randn(256, 20).double(), torch.randint(4, (256,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ENorm(optimizer, model, (inputs,), c=1.2, biases=biases, symmetric_biases=symmetric)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        losses.append(float(loss.detach()))
        if not bool(loss.isfinite()):
            break
        loss.backward()
        optimizer.step()
    if symmetric:
        assert max(losses) < 10
        assert losses[-1] < losses[0]
    else:
        assert max(losses) > 1e6


def test_two_level_stays_at_the_minimiser_while_training():
    torch.manual_seed(0)
    start, inputs, targets = deep(12, bias=False), torch.randn(128, 20), torch.randint(4, (128,))
    residuals = {}
    for method in ("cyclic", "two-level"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        hook = ENorm(optimizer, model, (inputs,), c=1.2, method=method)
        for number in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if number >= 10:  # the way to the minimiser takes a few bounded steps
                residuals.setdefault(method, []).append(hook.residual())
    assert max(residuals["two-level"]) < 1e-3 < min(residuals["cyclic"])


def test_rates_by_layer_are_another_asymmetry():
    """With scales s_k = c^(k − mean), rates η·s_k² at c from s_k·w_k are the rate η at c = 1 from w_k, step for step."""
    torch.manual_seed(0)
    c, plain, inputs = 1.2, deep(6, bias=False).double(), torch.randn(64, 20, dtype=torch.float64)
    scaled, depth = copy.deepcopy(plain), len(layers_of(plain))
    scales = [c ** (k - (depth - 1) / 2) for k in range(depth)]
    for layer, scale in zip(layers_of(scaled), scales, strict=True):
        layer.weight.data.mul_(scale)
    groups = [{"params": [layer.weight], "lr": 0.02 * scale**2} for layer, scale in zip(layers_of(scaled), scales, strict=True)]
    for model, parameters, asymmetry in ((plain, plain.parameters(), 1.0), (scaled, groups, c)):
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
        ENorm(optimizer, model, inputs, c=asymmetry)
        for _ in range(10):
            step(model, optimizer, inputs)
    for one, other, scale in zip(layers_of(plain), layers_of(scaled), scales, strict=True):
        torch.testing.assert_close(other.weight, scale * one.weight, rtol=1e-10, atol=1e-12)
