"""ENorm: one cycle is Algorithm 1; what moves with the weights; when it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

import equinorm
from equinorm import BalanceError, ENorm, RescaleError
from reference import algorithm_1_, convolutional, layers_of, mlp

NETWORKS = {"fully connected": (mlp, (5,)), "convolutional": (convolutional, (2, 8, 8))}


def unbalance_(model: nn.Module, inputs: torch.Tensor, decades: float = 1.0) -> None:
    found = equinorm.symmetries(model, (inputs,))
    found.rescale_((2 * torch.rand(found.num_free, dtype=torch.float64) - 1) * decades * math.log(10))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


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
    ENorm(optimizer, model, (inputs,))
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


def test_dead_channels_stay_and_nothing_breaks():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        model[2].weight[3] = 0  # nothing enters
        model[4].weight[:, 5] = 0  # nothing leaves
    before = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    hook.cycle_()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert model[2].bias[3] == before[2].bias[3]
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


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


def test_analysed_in_training_mode_and_put_back():
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 5)
    model.eval()
    ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    assert not any(module.training for module in model.modules())


OPTIONS = [
    ({"p": 0}, "p must be a positive number"),
    ({"c": -1.0}, "c must be a positive finite number"),
    ({"cycles": 0}, "cycles must be an integer of at least 1, not 0"),
    ({"every": 1.5}, "every must be an integer of at least 1, not 1.5"),
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


def test_changed_models_are_refused():
    def fresh():
        model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ENorm(optimizer, model, (inputs,))
        return model, optimizer, inputs

    model, optimizer, inputs = fresh()
    model.append(nn.Linear(3, 3).double())
    optimizer.add_param_group({"params": model[-1].parameters()})
    with pytest.raises(RescaleError, match="9 in the model itself was added"):
        step(model, optimizer, inputs)
    model, optimizer, inputs = fresh()
    model[2] = nn.Linear(12, 12).double()
    with pytest.raises(RescaleError, match="replaced"):
        step(model, optimizer, inputs)
    model, optimizer, inputs = fresh()
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(RescaleError, match=r"weight in module .2. of the model was added, removed or replaced"):
        step(model, optimizer, inputs)


class Parts(nn.Module):
    """Layers of which the first keeps its outputs pinned; what is tied to it later must not move."""

    def __init__(self):
        super().__init__()
        self.pinned, self.free, self.last = (nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(3))
        self.act = nn.ReLU()
        self.register_buffer("shift", None)

    def forward(self, x):
        hidden = self.act(self.free(self.pinned(x).tanh()))
        return self.last(hidden if self.shift is None else hidden + self.shift)


def tie_parameter(model):
    model.pinned.weight = model.free.weight


def tie_data(model):
    model.pinned.weight.data = model.free.weight.data


def tie_moving(model):
    model.last.weight.data = model.free.weight.data


def add_bias(model):
    model.free.bias = nn.Parameter(torch.ones(6, dtype=torch.float64))


def add_buffer(model):
    model.shift = torch.ones(6, dtype=torch.float64)


def other_activation(model):
    model.act = nn.Tanh()


def other_class(model):
    model.act.__class__ = nn.Tanh


def other_shape(model):
    model.free.weight.data = torch.randn(4, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "change", [tie_parameter, tie_data, tie_moving, add_bias, add_buffer, other_activation, other_class, other_shape]
)
def test_changes_that_would_change_the_function_are_refused(change):
    torch.manual_seed(0)
    model, inputs = Parts(), torch.randn(4, 6, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    hook.cycle_()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RescaleError, match="since ENorm analysed the model"):
        hook.cycle_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_parameter_registered_again_is_no_change():
    model, inputs = Parts(), torch.randn(4, 6, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    setattr(model.free, "".join(["wei", "ght"]), model.free.weight)
    hook.cycle_()


def test_expanded_tensors_are_refused():
    model, inputs = Parts(), torch.randn(4, 6, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    model.free.weight.data = torch.randn(6, 1, dtype=torch.float64).expand(6, 6)
    before = model.last.weight.detach().clone()
    with pytest.raises(RescaleError, match=r"free\.weight in place: it is an inference or an expanded tensor"):
        hook.cycle_()
    assert torch.equal(model.last.weight, before)
    with pytest.raises(RescaleError, match="expanded"):
        ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))


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


def test_a_model_that_changes_its_dtype_is_recorded_again():
    torch.manual_seed(0)
    model, inputs = mlp(dtype=torch.float32), torch.randn(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ENorm(optimizer, model, (inputs,))
    step(model, optimizer, inputs)
    model.double()
    plain = copy.deepcopy(model)
    step(model, optimizer, inputs.double())
    algorithm_1_(layers_of(plain), 2.0)
    torch.testing.assert_close(model[4].weight, plain[4].weight, rtol=1e-12, atol=0)


def test_repr():
    model = mlp()
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (torch.randn(4, 5, dtype=torch.float64),), p=math.inf)
    shown = "ENorm(Sequential: 48 free scale classes, p=inf, c=1.0, cycles=1, every=1, method='cyclic', 0 steps)"
    assert repr(hook) == shown


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
    """15 layers, c = 1.2: plain steps of biases diverge (seen as NaN where the paper was replicated), symmetric ones do not."""
    torch.manual_seed(0)
    model = deep(15)
    inputs, targets = torch.randn(256, 20), torch.randint(4, (256,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ENorm(optimizer, model, (inputs,), c=1.2, biases=biases, symmetric_biases=symmetric)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        if not bool(loss.isfinite()):
            break
        loss.backward()
        optimizer.step()
    assert bool(loss.isfinite()) == symmetric


def test_weights_may_move_to_other_memory():
    """`parameters_to_vector` and its like give a parameter new memory; energies must come from there."""
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * torch.rand_like(vector), model.parameters())
    plain = copy.deepcopy(model)
    hook.cycle_()
    algorithm_1_(layers_of(plain), 2.0)
    for moved, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


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
