"""ENorm: one cycle is Algorithm 1; what moves with the weights; when it refuses."""

import copy
import math

import pytest
import torch
from algorithm_1 import algorithm_1_, convolutional, layers_of, mlp, step, unbalance_
from torch import nn

import equinorm
from equinorm import BalanceError, ENorm, RescaleError

NETWORKS = {"fully connected": (mlp, (5,)), "convolutional": (convolutional, (2, 8, 8))}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("c", [1.0, 1.2])
@pytest.mark.parametrize("biases", [False, True])
def test_one_cycle_is_algorithm_1(network, p, c, biases):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, inputs = build(), torch.randn(4, *shape, dtype=torch.float64)
    unbalance_(model, inputs)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = ENorm(optimizer, model, (inputs,), p=p, c=c, biases=biases)
    for _ in range(3):
        step(model, optimizer, inputs)
        algorithm_1_(layers_of(plain), p, c, biases)
        for moved, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)
    assert hook.steps == 3


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(("method", "cycles"), [("cyclic", 2), ("two-level", 1)])
def test_the_function_stays(network, p, method, cycles):
    if math.isinf(p) and method == "two-level":
        pytest.skip("refused, see test_options_are_checked")
    torch.manual_seed(1)
    build, shape = NETWORKS[network]
    model, inputs = build(), torch.randn(4, *shape, dtype=torch.float64)
    unbalance_(model, inputs)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = ENorm(optimizer, model, (inputs,), p=p, method=method, cycles=cycles)
    start = hook.residual()
    step(model, optimizer, inputs)
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12
    assert hook.residual() < start


def test_cycles_count_cycles_of_algorithm_1():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), cycles=3).cycle_()
    for _ in range(3):
        algorithm_1_(layers_of(plain), 2.0)
    for moved, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_two_level_follows_the_minimiser(network):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, inputs = build(), torch.randn(4, *shape, dtype=torch.float64)
    unbalance_(model, inputs)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), method="two-level", c=1.1)
    exact = copy.deepcopy(model)
    equinorm.balance_(exact, (inputs,), c=1.1, tol=1e-12)
    for _ in range(40):
        hook.cycle_()
    assert hook.residual() <= 1e-12
    for moved, expected in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-14)


def test_residual_is_that_of_balance():
    torch.manual_seed(0)
    model, inputs = convolutional(), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    unbalance_(model, inputs)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), p=3.0, c=1.2, biases=True)
    expected = hook.symmetries.balance(p=3.0, c=1.2, biases=True, cycles=0).residual
    assert hook.residual() == pytest.approx(expected, rel=1e-12)


def test_residual_networks_with_tied_classes():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b, self.last = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.b(self.a(x).relu()))

    torch.manual_seed(0)
    model, inputs = Block().double(), torch.randn(4, 5, dtype=torch.float64)
    unbalance_(model, inputs)
    before = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), cycles=200)
    hook.cycle_()
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12
    assert hook.symmetries.balance(tol=1e-9, cycles=0).converged


def test_every():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    unbalance_(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = ENorm(optimizer, model, (inputs,), every=3)
    residuals = [hook.residual()]
    for _ in range(6):
        step(model, optimizer, inputs)
        residuals.append(hook.residual())
    assert residuals[0] == residuals[1] == residuals[2] > residuals[3] == residuals[4] == residuals[5] > residuals[6]


def test_context_manager_and_remove():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    unbalance_(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ENorm(optimizer, model, (inputs,)) as hook:
        step(model, optimizer, inputs)
    after = hook.residual()
    step(model, optimizer, inputs)
    assert hook.steps == 1
    assert hook.residual() == after


def test_c_may_change():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = ENorm(optimizer, model, (inputs,), method="two-level", cycles=20)
    hook.c = 1.5
    hook.cycle_()
    assert hook.symmetries.balance(c=1.5, cycles=0, tol=1e-9).converged
    with pytest.raises(BalanceError, match="c must be"):
        hook.c = -1


def test_gradients_move():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    unbalance_(model, inputs)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    model(inputs).square().mean().backward()
    hook.cycle_()
    moved = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(inputs).square().mean().backward()
    for kept, parameter in zip(moved, model.parameters(), strict=True):
        torch.testing.assert_close(kept, parameter.grad, rtol=1e-11, atol=1e-14)


def test_gradients_stay_if_not_wanted():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), gradients=False)
    model(inputs).square().mean().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    hook.cycle_()
    assert all(torch.equal(parameter.grad, kept) for parameter, kept in zip(model.parameters(), before, strict=True))


def test_frozen_parameters_move_and_unmatched_biases_stay():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    unbalance_(model, inputs)
    before = copy.deepcopy(model)
    model[2].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    ENorm(optimizer, model, (inputs,), frozen="move")
    step(model, optimizer, inputs)
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12
    assert not torch.equal(model[2].weight, before[2].weight)
    other = copy.deepcopy(before)
    ENorm(torch.optim.SGD(other.parameters(), lr=0.0), other, (inputs,), match_biases=False).cycle_()
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(layers_of(other), layers_of(before), strict=True))
    assert equinorm.deviation(other, before, (inputs,)) > 1e-3


def test_averaged_weights_move():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    unbalance_(model, inputs)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ENorm(optimizer, model, (inputs,), averages=averaged)
    before = copy.deepcopy(averaged)
    step(model, optimizer, inputs)
    assert equinorm.deviation(averaged, before, (inputs,)) <= 1e-12
    for mean, parameter in zip(averaged.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter, rtol=1e-12, atol=0)
    with pytest.raises(RescaleError, match=r"averaged model has no 0\.weight of shape \(12, 5\)"):
        ENorm(optimizer, model, (inputs,), averages=mlp(width=3))


def test_tied_weights_move_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b, self.last = (nn.Linear(n, 6, bias=False).double() for n in (5, 6, 6, 6))
            self.b.weight = nn.Parameter(self.a.weight.data)

        def forward(self, x):
            return self.last(self.b(self.a(self.first(x).relu()).relu()).relu())

    torch.manual_seed(0)
    model, inputs = Tied(), torch.randn(4, 5, dtype=torch.float64)
    unbalance_(model, inputs)
    before = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), cycles=3)
    hook.cycle_()
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.gain, self.last = nn.Linear(5, 6), nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.last((nn.functional.rms_norm(self.first(x), (6,)) * (1 + self.gain)).relu())


def test_gains_written_1_plus_w():
    torch.manual_seed(0)
    model, inputs = Gain().double(), torch.randn(4, 5, dtype=torch.float64)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    hook = ENorm(optimizer, model, (inputs,), cycles=3)
    step(model, optimizer, inputs)
    assert not torch.equal(model.gain, before.gain)
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12
    assert hook.residual() < 1e-12


def test_powers_of_two_are_bitwise():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = mlp(dtype=dtype), torch.randn(16, 5, dtype=dtype)
        found = equinorm.symmetries(model, (inputs,))
        found.rescale_(torch.randint(-3, 4, (found.num_free,)).double() * math.log(2.0))
        expected = model(inputs)
        before = copy.deepcopy(model)
        hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), power_of_two=True)
        start = hook.residual()
        hook.cycle_()
        assert torch.equal(model(inputs), expected)
        assert hook.residual() < start
        assert not torch.equal(before[0].weight, model[0].weight)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("method", ["cyclic", "two-level"])
def test_dead_channels_stay_and_nothing_breaks(method, compile):
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        model[2].weight[3] = 0  # nothing enters
        model[4].weight[:, 5] = 0  # nothing leaves
    before = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), method=method, compile=compile)
    for _ in range(40):
        hook.cycle_()
    assert hook.residual() < 1e-4
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert torch.equal(model[2].bias[[3, 5]], before[2].bias[[3, 5]])
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("method", ["cyclic", "two-level"])
def test_a_layer_of_zeros_leaves_its_neighbours_as_they_are(method, compile):
    """No norm has a minimum there: families that move as a whole would shrink for ever."""
    torch.manual_seed(0)
    model, inputs = mlp(depth=2), torch.randn(4, 5, dtype=torch.float64)
    model[2].weight.data.zero_()
    before = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), method=method, compile=compile)
    for _ in range(3):
        hook.cycle_()
    for parameter, start in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, start)


def test_diverged_weights_are_left_alone():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    hook.cycle_()
    assert model[0].weight.isnan().all()


def test_modules_outside_stay():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    unbalance_(model, inputs)
    before = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), modules=["2", "4"])
    hook.cycle_()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before.get_parameter(name))]
    assert moved == ["2.weight", "2.bias", "4.weight"]
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


@pytest.mark.parametrize("batch_norm", ["affine", "statistics"])
def test_batch_norm_readings(batch_norm):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, eps=1e-20), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)
    ).double()
    inputs = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model(inputs)
        model[1].weight.uniform_(0.5, 2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = ENorm(optimizer, model, (inputs,), batch_norm=batch_norm)
    hook.cycle_()
    moves = not torch.equal(model[0].weight, before[0].weight)
    assert moves == (batch_norm == "statistics")
    assert torch.equal(model[1].running_var, before[1].running_var) != moves
    for mode in (True, False):
        model.train(mode), before.train(mode)
        torch.testing.assert_close(model(inputs), before(inputs), rtol=1e-10, atol=1e-13)


def test_the_mode_is_put_back():
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 5)
    model.eval()
    ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    assert not any(module.training for module in model.modules())


OPTIONS = [
    ({"p": 0}, "p must be a number from"),
    ({"c": -1.0}, "c must be a positive finite number"),
    ({"cycles": 0}, "cycles must be a whole number of at least 1, not 0"),
    ({"every": 1.5}, "every must be a whole number of at least 1, not 1.5"),
    ({"method": "exact"}, "method must be one of 'two-level', 'cyclic', not 'exact'"),
    ({"p": math.inf, "method": "two-level"}, "use method='cyclic' for p = inf"),
    ({"biases": True, "match_biases": False}, "choose one of them"),
    ({"modules": "missing"}, "the model has no module 'missing'"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_options_are_checked(options, message):
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(BalanceError, match=message):
        ENorm(optimizer, model, (inputs,), **options)
    assert not optimizer._optimizer_step_post_hooks


def test_nothing_to_rescale_is_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 3))
    with pytest.raises(BalanceError, match=r"no hidden channel of Sequential can be rescaled: .*sigmoid"):
        ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (torch.randn(4, 5),))


def test_scalar_parameters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.first, self.last = nn.Parameter(torch.tensor(2.0)), nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last((self.gain * self.first(x)).relu())

    torch.manual_seed(0)
    model, inputs = Scaled().double(), torch.randn(4, 6, dtype=torch.float64)
    for kind in (torch.optim.NAdam, torch.optim.Adam, torch.optim.SGD):
        optimizer = kind(model.parameters(), lr=0.0)
        with ENorm(optimizer, model, (inputs,), cycles=3):
            before = copy.deepcopy(model)
            step(model, optimizer, inputs)
            step(model, optimizer, inputs)
            assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


def test_untrained_and_half_precision_tensors_are_refused():
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(RescaleError, match=r"2\.weight moves and requires gradients, but is not among"):
        ENorm(torch.optim.SGD(model[0].parameters(), lr=0.0), model, (inputs,))
    half = mlp(dtype=torch.bfloat16)
    with pytest.raises(RescaleError, match="power_of_two=True"):
        ENorm(torch.optim.SGD(half.parameters(), lr=0.0), half, (inputs.bfloat16(),))


def test_repr():
    model = mlp()
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (torch.randn(4, 5, dtype=torch.float64),), p=math.inf)
    shown = "ENorm(Sequential: 48 free scale classes, p=inf, c=1.0, cycles=1, every=1, method='cyclic', 0 steps)"
    assert repr(hook) == shown


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_grouped_convolutions(groups):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=groups), nn.ReLU(), nn.ChannelShuffle(3), nn.Conv2d(12, 3, 1)
    ).double()
    inputs = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    unbalance_(model, inputs)
    before = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), cycles=200)
    hook.cycle_()
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12
    assert hook.symmetries.num_free == 18
    assert hook.symmetries.balance(tol=1e-9, cycles=0).converged


def test_what_moves_holds_in_both_modes():
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

        def forward(self, x):
            hidden = self.a(x).relu()
            hidden = self.b(hidden).relu() if self.training else nn.functional.gelu(self.b(hidden))
            return self.c(hidden)

    torch.manual_seed(0)
    model, inputs = Modes(), torch.randn(4, 6, dtype=torch.float64)
    before = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    hook.cycle_()
    assert hook.symmetries.num_free == 6
    assert equinorm.symmetries(model, (inputs,)).num_free == 12  # training mode alone
    for mode in (True, False):
        model.train(mode), before.train(mode)
        assert equinorm.deviation(model, before, (inputs,)) <= 1e-12
