"""Optimizers inside of others: known wrappers are looked through, copies of weights move along, other wrappers are refused."""

import copy
import importlib
import importlib.util

import pytest
import torch
from algorithm_1 import mlp
from torch import nn, optim

import equinorm
from equinorm import ENorm, RescaleError, symmetries

if importlib.util.find_spec("torchvision") is not None:  # timm and lightning import it, and it may come without its operators
    from zoo import from_torchvision as zoo_torchvision

    zoo_torchvision.import_models()


def made(package, **options):
    """A network, inputs, the wrapped optimizer, and the wrapper."""
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(16, 5, dtype=torch.float64)
    inner = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)
    module = pytest.importorskip(package)
    if package == "accelerate":
        return model, inputs, inner, module.Accelerator(cpu=True).prepare(inner)
    if package == "lightning.pytorch.core.optimizer":
        return model, inputs, inner, module.LightningOptimizer(inner)
    lookahead = importlib.import_module("timm.optim.lookahead" if package == "timm" else package).Lookahead
    return model, inputs, inner, lookahead(inner, k=2)


def slow_weights(inner, wrapper):
    """Of Lookahead, by parameter."""
    for parameter in inner.param_groups[0]["params"]:
        for state in (inner.state.get(parameter, {}), wrapper.state.get(parameter, {})):
            yield from ((parameter, value) for key, value in state.items() if key in ("lookahead_slow_buff", "slow_params"))


def step(model, optimizer, inputs):
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


LOOKAHEADS = ["timm", "pytorch_optimizer"]


@pytest.mark.parametrize("package", ["accelerate", "lightning.pytorch.core.optimizer"])
def test_wrappers_that_only_pass_steps_on(package):
    """The same steps, bitwise, as with the optimizer itself, weight decay in its momentum included."""
    found = []
    for wraps in (True, False):
        model, inputs, inner, wrapper = made(package, weight_decay=0.1)
        if package.startswith("lightning"):
            wrapper.step = inner.step  # as its trainer does in the end
        hook = ENorm(wrapper if wraps else inner, model, (inputs,))
        for _ in range(3):
            step(model, wrapper if wraps else inner, inputs)
        assert hook.steps == 3
        found.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("package", LOOKAHEADS)
def test_slow_weights_move_along(package):
    """They stay a network of their own in the same coordinates, whose function no cycle changes."""
    model, inputs, inner, wrapper = made(package, weight_decay=0.1)
    hook = ENorm(wrapper, model, (inputs,), every=100)
    for _ in range(5):
        step(model, wrapper, inputs)
    before = slow_network(model, inner, wrapper)
    fast = copy.deepcopy(model)
    hook.cycle_()
    after = slow_network(model, inner, wrapper)
    assert hook.optimizers == (inner,)
    assert not torch.equal(after[0].weight, before[0].weight)
    assert equinorm.deviation(after, before, (inputs,)) <= 1e-12
    assert equinorm.deviation(model, fast, (inputs,)) <= 1e-12
    found = symmetries(model, (inputs,))
    with pytest.raises(RescaleError, match=r"momentum_buffer.* weight decay"):
        found.rescale_(torch.ones(found.num_free), wrapper)


@pytest.mark.parametrize("package", LOOKAHEADS)
def test_rescaling_at_once_moves_slow_weights(package):
    model, inputs, inner, wrapper = made(package)
    for _ in range(3):
        step(model, wrapper, inputs)
    before = slow_network(model, inner, wrapper)
    found = symmetries(model, (inputs,))
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64), wrapper)
    after = slow_network(model, inner, wrapper)
    assert not torch.equal(after[0].weight, before[0].weight)
    assert equinorm.deviation(after, before, (inputs,)) <= 1e-12


def slow_network(model, inner, wrapper):
    """The network of the slow weights."""
    slow = {id(parameter): value for parameter, value in slow_weights(inner, wrapper)}
    assert len(slow) == len(list(model.parameters()))
    network = copy.deepcopy(model)
    with torch.no_grad():
        for own, parameter in zip(network.parameters(), model.parameters(), strict=True):
            own.copy_(slow[id(parameter)])
    return network


@pytest.mark.parametrize("package", LOOKAHEADS)
def test_training_with_lookahead_stays_balanced(package):
    model, inputs, _, wrapper = made(package, weight_decay=0.1)
    hook = ENorm(wrapper, model, (inputs,), method="two-level")
    for _ in range(9):  # ends behind an inner step
        step(model, wrapper, inputs)
    assert hook.steps == 9
    assert hook.residual() < 1e-3


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.last = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(nn.functional.layer_norm(x, (4,)) * (1 + self.gain))


def test_slow_weights_of_gains_with_an_offset():
    lookahead = pytest.importorskip("timm.optim.lookahead").Lookahead
    torch.manual_seed(0)
    model, inputs = Gain().double(), torch.randn(8, 4, dtype=torch.float64)
    inner = optim.SGD(model.parameters(), lr=0.05)
    wrapper = lookahead(inner, k=1)
    hook = ENorm(wrapper, model, (inputs,), every=2)
    step(model, wrapper, inputs)
    before = slow_network(model, inner, wrapper)
    hook.cycle_()
    after = slow_network(model, inner, wrapper)
    assert not torch.equal(after.gain, before.gain)
    assert equinorm.deviation(after, before, (inputs,)) <= 1e-12
    found = symmetries(model, (inputs,))
    found.rescale_(torch.randn(found.num_free), wrapper)
    assert equinorm.deviation(slow_network(model, inner, wrapper), before, (inputs,)) <= 1e-12


class Averaging(optim.SGD):
    """Keeps an average of weights under a key of its own."""


def test_registered_averages_of_gains_with_an_offset_are_refused():
    equinorm.register_optimizer(Averaging, {"average": 1})
    model, inputs = Gain().double(), torch.randn(8, 4, dtype=torch.float64)
    optimizer = Averaging(model.parameters(), lr=0.1)
    hook = ENorm(optimizer, model, (inputs,))
    optimizer.state[model.gain]["average"] = model.gain.detach().clone()
    before = copy.deepcopy(model)
    with pytest.raises(RescaleError, match=r"'average' of Averaging for gain: the network uses 1 \+ gain"):
        hook.cycle_()
    found = symmetries(model, (inputs,))
    with pytest.raises(RescaleError, match=r"'average' of Averaging for gain: the network uses 1 \+ gain"):
        found.rescale_(torch.ones(found.num_free), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


class Unknown(optim.Optimizer):
    """A wrapper of somebody's own, made as wrappers are."""

    def __init__(self, inner):
        self.optimizer, self.param_groups, self.state = inner, inner.param_groups, inner.state


class Plain:
    """Another, which is no optimizer itself."""

    def __init__(self, inner):
        self.base_optimizer = inner


class Uninitialised(optim.SGD):
    """Registered, but made without Optimizer.__init__."""

    def __init__(self, inner):
        self.param_groups, self.state = inner.param_groups, inner.state


@pytest.mark.parametrize("wrapper", [Unknown, Plain])
@pytest.mark.parametrize("way", ["ENorm", "rescale_"])
def test_unknown_wrappers_are_refused(wrapper, way):
    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    optimizer = wrapper(optim.SGD(model.parameters(), lr=0.1))
    words = rf"{wrapper.__name__} wraps SGD, and what it does .* give the optimizer inside of it"
    found = symmetries(model, (inputs,))
    with pytest.raises(RescaleError, match=words):  # noqa: PT012
        if way == "ENorm":
            ENorm(optimizer, model, (inputs,))
        else:
            found.rescale_(torch.ones(found.num_free), optimizer)


def test_optimizers_that_take_no_hooks():
    equinorm.register_optimizer(Uninitialised, {"momentum_buffer": -1})
    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(RescaleError, match=r"Uninitialised was made without Optimizer.__init__"):
        ENorm(Uninitialised(optim.SGD(model.parameters(), lr=0.1)), model, (inputs,))


@pytest.mark.parametrize("wrapper", ["OrthoGrad", "TRAC", "ScheduleFreeWrapper", "PCGrad"])
def test_other_wrappers_of_pytorch_optimizer_are_refused(wrapper):
    package = pytest.importorskip("pytorch_optimizer")
    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    optimizer = getattr(package, wrapper)(optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RescaleError, match=f"{wrapper} wraps SGD"):
        ENorm(optimizer, model, (inputs,))


@pytest.mark.parametrize("how", ["reset", "pullback"])
def test_lookahead_that_writes_into_momentum_is_refused(how):
    package = pytest.importorskip("pytorch_optimizer")
    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    inner = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(RescaleError, match=f"pullback_momentum='{how}'"):
        ENorm(package.Lookahead(inner, pullback_momentum=how), model, (inputs,))


@pytest.mark.parametrize("optimizer", [3, "SGD", None])
def test_what_is_no_optimizer(optimizer):
    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(RescaleError, match=r"optimizer must be a torch.optim.Optimizer, not"):
        ENorm(optimizer, model, (inputs,))
    found = symmetries(model, (inputs,))
    if optimizer is not None:
        with pytest.raises(RescaleError, match=r"optimizer must be a torch.optim.Optimizer, not"):
            found.rescale_(torch.ones(found.num_free), optimizer)
