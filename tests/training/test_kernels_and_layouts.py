"""ENorm's passes over memory: every layout of tensors, strips, and torch.compile give what the plain loop gives."""

import contextlib
import copy
import functools
import itertools
import math

import pytest
import torch
from algorithm_1 import convolutional, layers_of, mlp, needs_compiler, step, unbalance_
from kernel_checks import NETWORKS, channels_last, follows_algorithm_1, spread, transposed
from torch import nn
from torch._dynamo.exc import TorchDynamoException

import equinorm
from equinorm import ENorm, EquinormError, native
from equinorm.balancing import energy_reader
from equinorm.rescaling import memory_matrix


@pytest.mark.parametrize("lay_out", [transposed, channels_last, spread])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("strip", [1 << 18, 20])
def test_layouts_and_strips(monkeypatch, lay_out, network, p, strip):
    monkeypatch.setattr(memory_matrix, "STRIP", strip)
    monkeypatch.setattr(energy_reader, "STRIP", strip)
    monkeypatch.setattr(memory_matrix, "_FEW", 0)
    follows_algorithm_1(lay_out, network, p)


def test_gradients_that_lie_otherwise_than_their_weights():
    torch.manual_seed(0)
    model, inputs = convolutional(), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    model(inputs).square().mean().backward()
    products = [parameter.grad * parameter.detach() for parameter in model.parameters()]
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.grad = parameter.grad.contiguous(memory_format=torch.channels_last)
    hook.cycle_()
    for parameter, product in zip(model.parameters(), products, strict=True):
        torch.testing.assert_close(parameter.grad * parameter.detach(), product, rtol=1e-12, atol=1e-300)


def as_on_an_accelerator(monkeypatch, compile) -> None:
    """Passes by torch.compile, as where the C++ kernels do not run."""
    monkeypatch.setattr(native, "DEVICES", ())
    monkeypatch.setattr(torch, "compile", compile)


def run(model: nn.Module, inputs: torch.Tensor, steps: int = 4, **options) -> list[torch.Tensor]:
    """Weights and momentum after a few steps under a schedule of learning rate and momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    hook = ENorm(optimizer, model, (inputs,), **options)
    for number in range(steps):
        optimizer.param_groups[0]["momentum"] = 0.9 - 0.1 * number
        hook.c = options.get("c", 1.0) + 0.01 * number
        step(model, optimizer, inputs)
    state = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    return [*(parameter.detach() for parameter in model.parameters()), *state]


@needs_compiler
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", [{"c": 1.1}, {"method": "two-level"}], ids=["cyclic", "two-level"])
def test_compiled_steps_are_the_same_steps(network, options):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, inputs = build(), torch.randn(4, *shape, dtype=torch.float64)
    other = copy.deepcopy(model)
    found = run(channels_last(model), inputs, compile=True, **options)
    for moved, expected in zip(found, run(other, inputs, **options), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-11, atol=1e-14)


@needs_compiler
def test_compiled_powers_of_two_are_exact():
    torch.manual_seed(0)
    model, inputs = convolutional(bias=False, dtype=torch.float32), torch.randn(4, 2, 8, 8)
    unbalance_(model, inputs)
    before = model(inputs)
    ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), power_of_two=True, compile=True).cycle_()
    assert torch.equal(model(inputs), before)


@pytest.mark.slow
def test_many_compiled_functions_live_in_one_process(monkeypatch):
    """torch.compile gives up on a function after eight versions of it."""
    as_on_an_accelerator(monkeypatch, functools.partial(torch.compile, backend="eager"))
    for width in range(10, 20):
        model, inputs = mlp(2, width), torch.randn(4, 5, dtype=torch.float64)
        hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), compile=True)
        before, residual = copy.deepcopy(model), hook.residual()
        hook.cycle_()
        assert hook.residual() < residual
        assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


def test_groups_of_parameters_compile_once(monkeypatch):
    """Each with its own weight decay and shapes."""
    as_on_an_accelerator(monkeypatch, functools.partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    sizes = [5, *range(6, 16), 3]
    layers = [nn.Linear(into, out) for into, out in itertools.pairwise(sizes)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU()))).double()[:-1]
    inputs, found = torch.randn(4, 5, dtype=torch.float64), []
    for compile in (True, False):
        twin = copy.deepcopy(model)
        groups = [{"params": layer.parameters(), "weight_decay": 0.1 / n} for n, layer in enumerate(layers_of(twin), 1)]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        ENorm(optimizer, twin, (inputs,), compile=compile)
        for _ in range(3):
            step(twin, optimizer, inputs)
        found.append(list(twin.parameters()))
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-11, atol=1e-14)


@pytest.mark.slow
def test_more_patterns_than_torch_compile_keeps(monkeypatch):
    """Layers that are unfrozen one by one: their momentum appears later."""
    as_on_an_accelerator(monkeypatch, functools.partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    model, inputs, found = mlp(12, 8), torch.randn(4, 5, dtype=torch.float64), []
    for compile in (True, False):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
        ENorm(optimizer, twin, (inputs,), compile=compile, gradients=False, frozen="move")
        layers = layers_of(twin)[::-1]
        for layer in layers:
            layer.requires_grad_(False)
        with pytest.warns(UserWarning, match="more patterns") if compile else contextlib.nullcontext():
            for layer in layers:
                layer.requires_grad_(True)
                step(twin, optimizer, inputs)
        found.append(list(twin.parameters()))
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-11, atol=1e-14)


def broken(function, **options):
    """A torch.compile that finds no compiler."""

    def call(*args):
        raise TorchDynamoException("no kernel")

    return call


def test_compile_errors_are_of_equinorm(monkeypatch):
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    as_on_an_accelerator(monkeypatch, broken)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.1), model, (inputs,), compile=True)
    with pytest.raises(EquinormError, match="no kernel"):
        hook.cycle_()


def test_sums_keep_their_precision_under_autocast():
    torch.manual_seed(0)
    model, inputs = convolutional(dtype=torch.float32), torch.randn(4, 2, 8, 8)
    unbalance_(model, inputs)
    twin = copy.deepcopy(model)
    ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,)).cycle_()
    hook = ENorm(torch.optim.SGD(twin.parameters(), lr=0.0), twin, (inputs,))
    with torch.autocast("cpu", torch.bfloat16):
        hook.cycle_()
    for under, without in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(under, without)


def test_a_weight_that_is_not_finite_shows_in_the_residual():
    model = mlp()
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (torch.randn(4, 5, dtype=torch.float64),))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    assert math.isnan(hook.residual())


def test_a_failed_compilation_leaves_the_step_undone(monkeypatch):
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    as_on_an_accelerator(monkeypatch, broken)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    hook = ENorm(optimizer, model, (inputs,), compile=True)
    before = copy.deepcopy(model)
    for _ in range(2):
        with pytest.raises(EquinormError, match="no kernel"):
            step(model, optimizer, inputs)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)
    hook.remove()
    step(model, optimizer, inputs)
