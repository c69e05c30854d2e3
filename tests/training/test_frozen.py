"""Frozen parameters keep still unless they are asked to move: what was saved of them elsewhere stays valid."""

import copy
import warnings

import pytest
import torch
from algorithm_1 import mlp
from torch import nn, optim

import equinorm
from equinorm import BalanceError, ENorm


class LowRank(nn.Module):
    """A linear layer with an adapter, as PEFT adds it."""

    def __init__(self, base, rank=3):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.into = nn.Linear(base.in_features, rank, bias=False)
        self.out = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.out(self.into(x))


def adapted():
    """A frozen network whose adapters train."""
    torch.manual_seed(0)
    base = mlp()
    adapters = nn.Sequential(*[LowRank(layer).double() if isinstance(layer, nn.Linear) else layer for layer in base])
    return adapters, torch.randn(16, 5, dtype=torch.float64)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model, optimizer, inputs):
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


WORDS = r"frozen parameters stay as they are, .*: .*frozen='move'"


def test_adapters_saved_alone_fit_the_base_that_they_were_trained_on():
    model, inputs = adapted()
    base = copy.deepcopy(model)
    optimizer = optim.Adam(trainable(model), lr=0.02)
    with pytest.warns(UserWarning, match=WORDS):
        hook = ENorm(optimizer, model, (inputs,))
    before = hook.residual()
    for _ in range(4):
        step(model, optimizer, inputs)
    assert hook.residual() < before  # the channels between the two parts of each adapter are balanced
    adapters = {name: value for name, value in model.state_dict().items() if "base" not in name}
    base.load_state_dict(adapters, strict=False)
    assert equinorm.deviation(base, model, (inputs,)) == 0.0


def test_frozen_parameters_move_if_asked():
    model, inputs = adapted()
    before = copy.deepcopy(model)
    optimizer = optim.SGD(trainable(model), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ENorm(optimizer, model, (inputs,), frozen="move").cycle_()
    assert not torch.equal(model[0].base.weight, before[0].base.weight)
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


@pytest.mark.parametrize("method", ["cyclic", "two-level"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_family_that_is_frozen_in_part(method, compile):
    """Half of a layer's channels lead into a frozen layer, half into one that trains."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.one, self.two = nn.Linear(5, 8), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            one, two = self.first(x).relu().chunk(2, -1)
            return self.one(one) + self.two(two)

    torch.manual_seed(0)
    model, inputs = Split().double(), torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.mul_(100)
    model.two.requires_grad_(False)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"two\.weight\. 4 of 8 scale classes are left"):
        hook = ENorm(optim.SGD(trainable(model), lr=0.0), model, (inputs,), method=method, compile=compile)
    hook.cycle_()
    assert torch.equal(model.two.weight, before.two.weight)
    assert torch.equal(model.first.weight[4:], before.first.weight[4:])
    assert not torch.equal(model.first.weight[:4], before.first.weight[:4])
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


@pytest.mark.parametrize("options", [{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}, {"lr": 0.05}])
def test_layers_unfrozen_one_by_one(options):
    """What is unfrozen moves from then on, its neighbours' momentum with it; training is that of a plain optimizer."""
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(8, 5, dtype=torch.float64)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in layers[:-2]:
        layer.requires_grad_(False)
    twin = copy.deepcopy(model)
    optimizers = [optim.SGD(net.parameters(), **options) for net in (model, twin)]
    with pytest.warns(UserWarning, match=WORDS):
        hook = ENorm(optimizers[0], model, (inputs,), p=1e-2 + 2)
    frozen = [layer.weight.detach().clone() for layer in layers]
    for index in reversed(range(len(layers) - 2)):
        for _ in range(2):
            step(model, optimizers[0], inputs)
        assert all(torch.equal(layer.weight, old) for layer, old in zip(layers[: index + 1], frozen, strict=False))
        layers[index].requires_grad_(True)
    before = copy.deepcopy(model)
    hook.cycle_()
    assert not torch.equal(layers[0].weight, before[0].weight)
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12
    assert hook.residual() < 0.5
    step(model, optimizers[0], inputs)


def test_layers_frozen_while_training():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(8, 5, dtype=torch.float64)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    hook = ENorm(optimizer, model, (inputs,))
    step(model, optimizer, inputs)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    before = [parameter.detach().clone() for parameter in model[0].parameters()]
    with pytest.warns(UserWarning, match=WORDS):
        step(model, optimizer, inputs)
    step(model, optimizer, inputs)  # said once
    assert all(torch.equal(parameter, old) for parameter, old in zip(model[0].parameters(), before, strict=True))
    model.requires_grad_(False)
    everything = [parameter.detach().clone() for parameter in model.parameters()]
    hook.cycle_()  # nothing is left to move: no error in the middle of a training
    assert hook.residual() == 0.0
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), everything, strict=True))
    model.requires_grad_(True)
    hook.cycle_()
    assert not torch.equal(model[0].weight, before[0])


def test_a_base_in_half_precision_does_not_hinder():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16().requires_grad_(False)
            self.adapter = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x):
            return self.base(x.bfloat16()).float() + self.adapter(x)

    model, inputs = Adapted(), torch.randn(2, 4)
    with pytest.warns(UserWarning, match=r"base\.0\.weight, base\.0\.bias, base\.2\.weight\. 8 of 16 scale classes"):
        hook = ENorm(optim.SGD(trainable(model), lr=0.1), model, (inputs,))
    hook.cycle_()
    assert hook.residual() < 1e-3


def test_nothing_but_frozen_parameters():
    model, inputs = mlp().requires_grad_(False), torch.randn(2, 5, dtype=torch.float64)
    head = model[-1].requires_grad_(True)
    with pytest.raises(BalanceError, match=r"every hidden channel of Sequential .* frozen parameter, as 0\.weight, .*'move'"):
        ENorm(optim.SGD(head.parameters(), lr=0.1), model, (inputs,))


def test_frozen_is_one_of_two_words():
    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(BalanceError, match="frozen must be 'hold' or 'move', not 'keep'"):
        ENorm(optim.SGD(model.parameters(), lr=0.1), model, (inputs,), frozen="keep")


def test_explicit_calls_move_what_is_frozen():
    """`balance_` and `apply_` rescale the whole network at once, and say so."""
    model, inputs = mlp().requires_grad_(False), torch.randn(2, 5, dtype=torch.float64)
    before = copy.deepcopy(model)
    equinorm.balance_(model, (inputs,))
    assert not torch.equal(model[0].weight, before[0].weight)


def test_biases_of_channels_that_are_held_take_plain_steps():
    """Also where others of their family move: c ≠ 1 asks nothing of a channel that keeps its scale."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.one, self.two = nn.Linear(5, 8), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            one, two = self.first(x).relu().chunk(2, -1)
            return self.one(one) + self.two(two)

    torch.manual_seed(0)
    model, inputs = Split().double(), torch.randn(16, 5, dtype=torch.float64)
    model.two.requires_grad_(False)
    before = copy.deepcopy(model.first.bias)
    optimizer = optim.SGD(trainable(model), lr=0.1)
    with pytest.warns(UserWarning, match=r"4 of 8 scale classes are left"):
        ENorm(optimizer, model, (inputs,), c=1.5, every=2)
    model(inputs).square().mean().backward()
    assert model.first.bias.grad is not None
    plain = -0.1 * model.first.bias.grad
    optimizer.step()
    steps = (model.first.bias - before).detach()
    torch.testing.assert_close(steps[4:], plain[4:], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(steps[:4], plain[:4] / 1.5, rtol=1e-12, atol=1e-15)


def test_a_bias_that_is_added_to_the_optimizer_takes_the_steps_of_others():
    """Unfrozen while training: with c = 1.3 its steps are those of a bias that was there from the beginning."""
    weights = []
    for is_late in (False, True):
        torch.manual_seed(0)
        model, inputs = mlp(depth=2, width=6), torch.randn(16, 5, dtype=torch.float64)
        late = model[2].bias.requires_grad_(not is_late)
        others = [parameter for parameter in model.parameters() if parameter is not late]
        optimizer = optim.SGD(others, lr=0.05)
        if not is_late:
            optimizer.add_param_group({"params": [late]})
        ENorm(optimizer, model, (inputs,), c=1.3, frozen="move")
        if is_late:
            optimizer.add_param_group({"params": [late.requires_grad_()]})
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        weights.append([*model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
