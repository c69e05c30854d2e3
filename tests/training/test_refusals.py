"""What ENorm refuses, and that nothing has moved then."""

import _thread
import copy
import math
import pickle

import pytest
import torch
from algorithm_1 import mlp
from torch import nn, optim

import equinorm
from equinorm import BalanceError, ENorm, EquinormError, RescaleError


def made(**options):
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(8, 5, dtype=torch.float64)
    return model, inputs, optim.SGD(model.parameters(), lr=0.05, **options)


def step(model, optimizer, inputs):
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


DECAY = {"momentum": 0.9, "weight_decay": 0.1}


def test_a_second_hook_on_the_same_tensors():
    model, inputs, optimizer = made()
    first = ENorm(optimizer, model, (inputs,), modules=["0", "2"])
    with pytest.raises(RescaleError, match=r"hooked already, by ENorm\(Sequential: .*call its remove\(\) first"):
        ENorm(optimizer, model, (inputs,), p=1.0)
    ENorm(optimizer, model, (inputs,), modules=["6", "8"])  # other tensors
    first.remove()
    ENorm(optimizer, model, (inputs,), modules=["0", "2"])


def test_cycles_after_removal_do_not_guess_the_decay():
    model, inputs, optimizer = made(**DECAY)
    hook = ENorm(optimizer, model, (inputs,))
    step(model, optimizer, inputs)
    hook.remove()
    step(model, optimizer, inputs)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RescaleError, match="How much of it is weight decay is not known"):
        hook.cycle_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("order", ["optimizer", "optimizer, hook", "hook, optimizer"])
def test_going_back_to_an_older_state(order):
    """The decay inside of averages belongs to one state of the optimizer: both go back, or the step is refused."""
    model, inputs, optimizer = made(**DECAY)
    hook = ENorm(optimizer, model, (inputs,))
    step(model, optimizer, inputs)
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, hook)])
    for _ in range(2):
        step(model, optimizer, inputs)
    then = copy.deepcopy(model.state_dict())
    for _ in range(2):
        step(model, optimizer, inputs)
    model.load_state_dict(saved[0])
    for name in order.split(", "):
        part, state = {"optimizer": (optimizer, saved[1]), "hook": (hook, saved[2])}[name]
        part.load_state_dict(copy.deepcopy(state))
    if order == "optimizer":
        with pytest.raises(RescaleError, match=r"How much of it is weight decay is not known.*load its state_dict"):
            step(model, optimizer, inputs)
        hook.load_state_dict(saved[2])
    for _ in range(2):
        step(model, optimizer, inputs)
    assert all(torch.equal(value, then[name]) for name, value in model.state_dict().items())


def test_a_step_that_did_not_end():
    model, inputs, optimizer = made(**DECAY)
    ENorm(optimizer, model, (inputs,))
    step(model, optimizer, inputs)

    def fail(*_):
        raise MemoryError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        step(model, optimizer, inputs)
    handle.remove()
    with pytest.raises(RescaleError, match="last step did not end"):
        step(model, optimizer, inputs)


def test_averaged_models_are_watched():
    model, inputs, optimizer = made()
    averaged = optim.swa_utils.AveragedModel(model)
    hook = ENorm(optimizer, model, (inputs,), averages=averaged)
    averaged.module.load_state_dict(copy.deepcopy(averaged.module.state_dict()), assign=True)
    with pytest.raises(RescaleError, match="of the averaged model were added, removed or replaced since ENorm"):
        hook.cycle_()


def test_parameters_that_another_optimizer_trains():
    model, inputs, _ = made()
    model[2].weight.requires_grad_(False)
    optimizer = optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    hook = ENorm(optimizer, model, (inputs,), frozen="move")
    hook.cycle_()
    model[2].weight.requires_grad_(True)
    with pytest.raises(RescaleError, match=r"2\.weight moves and requires gradients, but is not among"):
        hook.cycle_()


def test_interrupts_wait_until_all_has_moved(monkeypatch, interruptible):
    model, inputs, optimizer = made(momentum=0.9)
    found = equinorm.symmetries(model, (inputs,))
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
    hook = ENorm(optimizer, model, (inputs,))
    model(inputs).square().mean().backward()
    optimizer.step()
    before = copy.deepcopy(model)
    products = [(optimizer.state[p]["momentum_buffer"] * p.detach()).clone() for p in model.parameters()]
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64), optimizer)
    multiply = torch.Tensor.mul_

    def interrupted(*arguments):
        _thread.interrupt_main()
        return multiply(*arguments)

    monkeypatch.setattr(torch.Tensor, "mul_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hook.cycle_()
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12
    for parameter, product in zip(model.parameters(), products, strict=True):
        now = optimizer.state[parameter]["momentum_buffer"] * parameter.detach()
        torch.testing.assert_close(now, product, rtol=1e-12, atol=1e-300)


def test_c_is_part_of_the_state():
    model, inputs, optimizer = made()
    hook = ENorm(optimizer, model, (inputs,))
    hook.c = 1.3
    saved = hook.state_dict()
    hook.remove()
    again = ENorm(optimizer, model, (inputs,))
    again.load_state_dict(saved)
    assert again.c == 1.3


BAD_STATES = [
    (None, "not a state of ENorm, which holds steps, c and decay: NoneType"),
    ({"steps": 1}, "holds steps, c and decay: steps"),
    ({"steps": -1, "c": 1.0, "decay": {}}, "steps must be an integer of at least 0, not -1"),
    ({"steps": True, "c": 1.0, "decay": {}}, "steps must be an integer of at least 0, not True"),
    ({"steps": 1, "c": 0.0, "decay": {}}, "c must be a positive finite number"),
    ({"steps": 1, "c": 1.0, "decay": 3}, "int where a dict should be"),
    ({"steps": 1, "c": 1.0, "decay": {"other": {}}}, "weight decay of other, which this optimizer does not train"),
    ({"steps": 1, "c": 1.0, "decay": {"0.weight": {"foo": {}}}}, "in 'foo', which is not one of SGD"),
    ({"steps": 1, "c": 1.0, "decay": {"0.weight": {"momentum_buffer": {5: torch.ones(12, 5)}}}}, "which is not one of SGD"),
    ({"steps": 1, "c": 1.0, "decay": {"0.weight": {"momentum_buffer": {1: torch.ones(2)}}}}, r"in shape \(2,\) where"),
]


@pytest.mark.parametrize(("state", "message"), BAD_STATES, ids=[message for _, message in BAD_STATES])
def test_states_of_something_else(state, message):
    model, inputs, optimizer = made(**DECAY)
    with pytest.raises(EquinormError, match=message):
        ENorm(optimizer, model, (inputs,)).load_state_dict(state)


def test_arguments_of_the_wrong_kind():
    model, inputs, optimizer = made()
    with pytest.raises(RescaleError, match="averages must be a module or several"):
        ENorm(optimizer, model, (inputs,), averages="ema")
    with pytest.raises(BalanceError, match="modules must be names or modules, not int"):
        ENorm(optimizer, model, (inputs,), modules=3)
    with pytest.raises(BalanceError, match="none moves within the chosen modules alone"):
        ENorm(optimizer, model, (inputs,), modules=[])
    with pytest.raises(RescaleError, match=r"optimizer must be a torch\.optim\.Optimizer, not Sequential"):
        ENorm(model, optimizer, (inputs,))
    with pytest.raises(EquinormError, match="exponents must be a dict from state keys to integers, not list"):
        equinorm.register_optimizer(type("Mine", (optim.SGD,), {}), ["momentum_buffer"])
    with pytest.raises(equinorm.EquinormError, match="the state of SGD is known already"):
        equinorm.register_optimizer(optim.SGD, {"momentum_buffer": -1})
    with pytest.raises(BalanceError, match="no hidden channel"):
        ENorm(optimizer, nn.Sequential(nn.Linear(5, 3)), (inputs.float(),))
    assert not optimizer._optimizer_step_post_hooks
    assert math.isfinite(ENorm(optimizer, model, inputs).residual())


def test_gradients_and_states_that_cannot_move(monkeypatch):
    model, inputs, optimizer = made(momentum=0.9)
    hook = ENorm(optimizer, model, (inputs,))
    step(model, optimizer, inputs)
    before = copy.deepcopy(model.state_dict())
    model[4].weight.grad = torch.ones(1, 1, dtype=torch.float64).expand(12, 12)
    with pytest.raises(RescaleError, match=r"the gradient of 4\.weight in place: it is an inference or an expanded tensor"):
        hook.cycle_()
    model.zero_grad()
    optimizer.state[model[4].weight]["momentum_buffer"] = torch.ones(12, 12, dtype=torch.long)
    with pytest.raises(RescaleError, match=r"state 'momentum_buffer' of 4\.weight: its dtype is torch\.int64"):
        hook.cycle_()
    optimizer.state[model[4].weight]["momentum_buffer"] = torch.ones(12, dtype=torch.float64)
    with pytest.raises(RescaleError, match=r"its shape \(12,\) is not the parameter's \(12, 12\)"):
        hook.cycle_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_asymmetry_beyond_floating_point():
    model, inputs = mlp(depth=60, width=2), torch.randn(8, 5, dtype=torch.float64)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(BalanceError, match="choose it closer to 1"):
        ENorm(optimizer, model, (inputs,), c=1e6)
    assert not optimizer._optimizer_step_post_hooks


def test_sparse_gradients_can_be_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6, sparse=True), nn.Linear(6, 3))
    inputs = torch.arange(5)
    for gradients in (True, False):
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        with ENorm(optimizer, model, (inputs,), gradients=gradients) as hook:
            model(inputs).square().mean().backward()
            before, residual = copy.deepcopy(model), hook.residual()
            if gradients:
                with pytest.raises(RescaleError, match=r"gradient of 0\.weight, which is torch\.sparse_coo.*gradients=False"):
                    hook.cycle_()
                assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
            else:
                hook.cycle_()
                assert hook.residual() < residual
        optimizer.zero_grad()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_hooks_are_not_copied(copied):
    model, inputs, optimizer = made()
    hook = ENorm(optimizer, model, (inputs,))
    with pytest.raises(EquinormError, match="belongs to one optimizer and one model"):
        copied(hook)
    copied((model, optimizer))


def test_decay_that_was_not_followed_is_noticed_among_known_tensors():
    model, inputs, optimizer = made(**DECAY)
    hook = ENorm(optimizer, model, (inputs,), gradients=False)
    for _ in range(2):
        step(model, optimizer, inputs)
    hook.remove()
    step(model, optimizer, inputs)
    with pytest.raises(RescaleError, match="How much of it is weight decay is not known"):
        hook.cycle_()
