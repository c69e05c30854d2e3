"""ENorm beside what people train with: gradient scaling, autocast, torch.compile, several processes."""

import copy
import datetime
import math
from typing import Any

import pytest
import torch
from algorithm_1 import algorithm_1_, layers_of, mlp
from torch import distributed, multiprocessing, nn, optim

import equinorm
from equinorm import ENorm


def unbalanced(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model, inputs = mlp(dtype=dtype), torch.randn(16, 5, dtype=dtype)
    found = equinorm.symmetries(model, (inputs,))
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
    return model, inputs


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_skipped(fused):
    model, inputs = unbalanced()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, fused=fused)
    hook = ENorm(optimizer, model, (inputs,))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(poison: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(model(inputs).square().mean()).backward()
        if poison:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()

    step(False)
    weights, decay = copy.deepcopy(model.state_dict()), copy.deepcopy(hook.state_dict()["decay"])
    step(True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for name, states in hook.state_dict()["decay"].items():
        assert torch.equal(states["momentum_buffer"][1], decay[name]["momentum_buffer"][1])
    residual = hook.residual()
    step(False)
    assert hook.residual() != residual


def test_fused_scaling_gives_the_same_squares_of_gradients():
    """A fused optimizer sees scaled gradients: its averages must be told apart as if they were not."""
    found = []
    for scale in (None, 64.0):
        model, inputs = unbalanced(torch.float64)
        optimizer = optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1, fused=True)
        hook = ENorm(optimizer, model, (inputs,))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(inputs).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append((hook.state_dict()["decay"], copy.deepcopy(model.state_dict())))
    for name, states in found[0][0].items():
        for key, parts in states.items():
            for exponent, part in parts.items():
                torch.testing.assert_close(part, found[1][0][name][key][exponent], rtol=1e-12, atol=1e-15)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-12, atol=1e-15)


def test_autocast_computes_with_the_new_weights():
    model, inputs = unbalanced()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ENorm(optimizer, model, (inputs,))
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs).float().square().mean()
    loss.backward()
    optimizer.step()
    algorithm_1_(layers_of(plain), 2.0)
    for moved, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert moved.dtype == torch.float32
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0)


COMPILED = ["step of training", "step of the optimizer", "step with a closure", "cycle by hand", "residual"]


@pytest.mark.parametrize("what", COMPILED)
def test_a_compiled_step_leaves_the_hook_alone(what):
    """torch.compile calls the hook, and traces nothing of it: that took minutes and warned of recompilations."""
    traced = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        traced.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return graph.forward

    weights = []
    for is_compiled in (False, True):
        model, inputs = unbalanced(torch.float64)
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        hook = ENorm(optimizer, model, (inputs,), c=1.1)

        def closure(model=model, inputs=inputs):
            model.zero_grad()
            model(inputs).square().mean().backward()

        def step(optimizer=optimizer, closure=closure, hook=hook):
            if what == "step with a closure":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            if what == "cycle by hand":
                hook.cycle_()
            elif what == "residual":
                hook.residual()

        if is_compiled and what == "step of the optimizer":
            optimizer.step = torch.compile(optimizer.step, backend=backend)
        run = torch.compile(step, backend=backend) if is_compiled and what != "step of the optimizer" else step
        for _ in range(3):
            run()
        assert hook.steps == 3
        weights.append([parameter.detach() for parameter in model.parameters()])
    assert traced
    assert not [trace for trace in traced if "equinorm/training" in trace.replace("\\", "/")]
    torch.testing.assert_close(*weights, rtol=1e-12, atol=0)


def test_one_graph_of_a_step_is_refused_with_the_reason():
    model, inputs = unbalanced(torch.float64)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    ENorm(optimizer, model, (inputs,))
    model(inputs).square().mean().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(Exception, match="ENorm runs between graphs: compile the step without fullgraph=True"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_compiled_modules():
    model, inputs = unbalanced(torch.float64)
    expected = model(inputs).detach()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    hook = ENorm(optimizer, compiled, (inputs,))
    residuals = [hook.residual()]
    for _ in range(3):
        optimizer.zero_grad()
        outputs = compiled(inputs)
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-14)
        outputs.square().mean().backward()
        optimizer.step()
        residuals.append(hook.residual())
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < residuals[0]
    torch.compiler.reset()


def train_in_one_process(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timeout)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(mlp(dtype=torch.float32))
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(rank + 1)  # every rank has data of its own
    hook = ENorm(optimizer, model, (torch.randn(16, 5),), c=1.1)
    for _ in range(5):
        inputs = torch.randn(16, 5)
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :3]).square().mean().backward()
        optimizer.step()
    torch.save({"model": model.module.state_dict(), "residual": hook.residual()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_stay_bitwise_the_same(tmp_path):
    arguments = (f"file://{tmp_path}/rendezvous", str(tmp_path))
    multiprocessing.spawn(train_in_one_process, args=arguments, nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    start = mlp(dtype=torch.float32)
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert one["residual"] == two["residual"]
    assert not torch.equal(one["model"]["0.weight"], start[0].weight)


def test_data_parallel_is_looked_through():
    model, inputs = unbalanced(torch.float64)
    hook = ENorm(optim.SGD(model.parameters(), lr=0.0), nn.DataParallel(model), (inputs,))
    assert hook.model is model


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("stale", [False, True])
def test_gradients_that_a_closure_computes(name, keyword, stale):
    """What the optimizer's averages hold of the weight decay must be that of the closure's gradients."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    found = []
    for closed in (False, True):
        model, inputs = unbalanced(torch.float64)
        optimizer = getattr(optim, name)(model.parameters(), lr=0.05, weight_decay=0.1, **options)
        ENorm(optimizer, model, (inputs,))
        if stale:
            model(2 * inputs).square().mean().backward()

        def loss(model=model, inputs=inputs, optimizer=optimizer):
            optimizer.zero_grad()
            value = model(inputs).square().mean()
            value.backward()
            return value

        for _ in range(4):
            if not closed:
                loss()
                optimizer.step()
            else:
                assert (optimizer.step(closure=loss) if keyword else optimizer.step(loss)).detach() > 0
        found.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


class Asks(nn.Module):
    """Looks at the default device, as a network that makes tensors does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = mlp(), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.get_default_device().type)
        return self.inner(x)


def test_the_default_device_is_the_networks_alone():
    """`torch.set_default_device` decides where the network makes tensors, not where we do."""
    parameters = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model, inputs = Asks(), torch.randn(4, 5, dtype=torch.float64)
        optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        model(inputs).sum().backward()
        twin = copy.deepcopy(model)
        with torch.device(device):
            hook = ENorm(optimizer, model, (inputs,), c=1.1)
            optimizer.step()
            assert hook.residual() > 0
            for p in (2.0, 3.0, math.inf):
                hook.symmetries.balance(p=p)
            hook.symmetries.balance().apply_()
            equinorm.balance_(twin, (inputs,))
            assert equinorm.equivalence(twin, twin, (inputs,))
            equinorm.deviation(model, twin, (inputs,))
        assert {*model.seen[1:]} == {device}
        parameters.append([p.detach() for p in model.parameters()])
    for one, two in zip(*parameters, strict=True):
        assert torch.equal(one, two)


OPTIMIZERS = {"without a state": {}, "momentum": {"momentum": 0.9, "weight_decay": 0.1}}


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("order", ["model, optimizer, hook", "hook, model, optimizer"])
def test_steps_that_only_make_a_state_are_none(options, order):
    """torch.distributed.checkpoint steps an optimizer without a state; saving and loading still change nothing."""
    states = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    inputs = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def build():
        torch.manual_seed(0)
        model = mlp(depth=2, width=6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, **options)
        return model, optimizer, ENorm(optimizer, model, (inputs,))

    def train(model, optimizer):
        for _ in range(3):
            (model(inputs) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, hook = build()
    train(model, optimizer)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    saved = copy.deepcopy([*states.get_state_dict(model, optimizer), hook.state_dict()])
    assert hook.steps == 3
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())
    train(model, optimizer)
    resumed, other, again = build()
    load = {
        "model": lambda: states.set_model_state_dict(resumed, saved[0]),
        "optimizer": lambda: states.set_optimizer_state_dict(resumed, other, saved[1]),
        "hook": lambda: again.load_state_dict(saved[2]),
    }
    for name in order.split(", "):
        load[name]()
    assert all(torch.equal(parameter, start[name]) for name, parameter in resumed.named_parameters())
    train(resumed, other)
    assert again.steps == hook.steps == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("rate", [0.0, torch.zeros(()), None, torch.zeros(2)], ids=str)
def test_rates_of_zero_alone_are_steps(rate, monkeypatch):
    """A schedule may begin with a rate of 0; and optimizers of other packages may know no rate, or several."""

    class Own(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.0)
            self.param_groups[0]["lr"] = rate

        @torch.no_grad()
        def step(self, closure=None):
            pass

    model, inputs = mlp(depth=2, width=6), torch.randn(16, 5, dtype=torch.float64)
    laws = equinorm.rescaling.optimizer_laws
    monkeypatch.setattr(laws, "LAWS", dict(laws.LAWS))
    equinorm.register_optimizer(Own, like=torch.optim.SGD)
    optimizer = Own(model.parameters())
    hook = ENorm(optimizer, model, (inputs,))
    before = hook.residual()
    model(inputs).square().mean().backward()
    optimizer.step()
    assert hook.steps == 1
    assert hook.residual() < before
