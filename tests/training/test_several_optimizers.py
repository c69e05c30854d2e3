"""Several optimizers of one model, and averages in lists: one hook, one cycle once all have stepped."""

import copy
import io

import pytest
import torch
from algorithm_1 import mlp
from carried_optimizers import gradients_, unbalanced
from torch import nn, optim

import equinorm
from equinorm import ENorm, RescaleError

DECAY = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}


def halves(model):
    """SGD of the weights and SGD of the biases: together they are one SGD."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return optim.SGD(matrices, **DECAY), optim.SGD(vectors, **DECAY)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def trained_by_one(steps, **options):
    model, inputs = unbalanced()
    optimizer = optim.SGD(model.parameters(), **DECAY)
    ENorm(optimizer, model, (inputs,), **options)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        gradients_(model, inputs)
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.parametrize("options", [{}, {"c": 1.2, "every": 2}, {"compile": True}], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned round"])
def test_two_are_one(options, turned):
    """Bitwise, with schedules of their own, coupled weight decay and corrected biases, in whatever order they step."""
    model, inputs = unbalanced()
    optimizers = halves(model)
    hook = ENorm(optimizers, model, (inputs,), **options)
    schedules = [optim.lr_scheduler.CosineAnnealingLR(optimizer, 5) for optimizer in optimizers]
    for _ in range(5):
        gradients_(model, inputs)
        for optimizer in reversed(optimizers) if turned else optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert hook.steps == 5
    assert hook.optimizers == optimizers
    assert same(model, trained_by_one(5, **options))


def test_resumed_between_their_steps():
    def build():
        model, inputs = unbalanced()
        optimizers = halves(model)
        return model, inputs, optimizers, ENorm(optimizers, model, (inputs,))

    def go_on(model, inputs, optimizers):
        optimizers[1].step()
        for _ in range(2):
            gradients_(model, inputs)
            for optimizer in optimizers:
                optimizer.step()

    model, inputs, optimizers, hook = build()
    gradients_(model, inputs)
    for optimizer in optimizers:
        optimizer.step()
    gradients_(model, inputs)
    optimizers[0].step()
    assert hook.state_dict()["stepped"] == [1, 0]
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, *optimizers, hook)], file)
    gradients = [p.grad.clone() for p in model.parameters()]
    go_on(model, inputs, optimizers)
    resumed, _, others, again = build()
    file.seek(0)
    for part, state in zip((resumed, *others, again), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for parameter, gradient in zip(resumed.parameters(), gradients, strict=True):
        parameter.grad = gradient
    go_on(resumed, inputs, others)
    assert again.steps == hook.steps == 4
    assert "stepped" not in again.state_dict()
    assert same(model, resumed)
    with pytest.raises(RescaleError, match=r"hook on other optimizers: it says \[1\] of 2"):
        again.load_state_dict({**hook.state_dict(), "stepped": [1]})


def test_states_are_loaded_for_all_or_none():
    model, inputs = unbalanced()
    optimizers = halves(model)
    hook = ENorm(optimizers, model, (inputs,))
    gradients_(model, inputs)
    for optimizer in optimizers:
        optimizer.step()
    saved, before = copy.deepcopy(hook.state_dict()), hook.state_dict()["decay"]["0.weight"]["momentum_buffer"][1]
    saved["decay"]["0.bias"] = {"foo": {}}
    with pytest.raises(RescaleError, match=r"of 0\.bias in 'foo', which is not one of SGD"):
        hook.load_state_dict(saved)
    assert hook.state_dict()["decay"]["0.weight"]["momentum_buffer"][1] is before
    with pytest.raises(RescaleError, match="weight decay of other, which these optimizers do not train"):
        hook.load_state_dict({"steps": 1, "c": 1.0, "decay": {"other": {}}})


def test_an_optimizer_for_each_parameter_within_the_backward_pass():
    """Each steps as soon as its gradient is there, and frees it: the cycle runs when the last has stepped."""
    model, inputs = unbalanced()
    optimizers = {parameter: optim.SGD([parameter], **DECAY) for parameter in model.parameters()}
    hook = ENorm([*optimizers.values()], model, (inputs,))

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(4):
        (model(inputs) - 1).square().mean().backward()
    assert hook.steps == 4
    one, inputs = unbalanced()
    optimizer = optim.SGD(one.parameters(), **DECAY)
    ENorm(optimizer, one, (inputs,))
    for _ in range(4):
        gradients_(one, inputs)
        optimizer.step()
    assert same(model, one)


def test_what_is_given_twice_or_not_at_all():
    model, inputs = unbalanced()
    matrices, vectors = halves(model)
    with pytest.raises(RescaleError, match=r"0\.bias moves and requires gradients.*give all optimizers that train the model"):
        ENorm(matrices, model, (inputs,))
    with pytest.raises(RescaleError, match=r"SGD and Adam both step one parameter, of shape \(6, 5\)"):
        ENorm([matrices, vectors, optim.Adam(model.parameters())], model, (inputs,))
    with pytest.raises(RescaleError, match="one optimizer was given twice"):
        ENorm([matrices, vectors, matrices], model, (inputs,))
    with pytest.raises(RescaleError, match="no optimizer was given"):
        ENorm([], model, (inputs,))
    hook = ENorm([matrices, vectors], model, (inputs,))
    with pytest.raises(RescaleError, match="hooked already"):
        ENorm([vectors, matrices], model, (inputs,))
    hook.remove()
    assert not matrices._optimizer_step_post_hooks
    assert not vectors._optimizer_step_post_hooks


def test_one_that_never_steps_is_told(monkeypatch):
    monkeypatch.setattr(equinorm.training.turns, "PATIENCE", 3)
    model, inputs = unbalanced()
    matrices, vectors = halves(model)
    hook = ENorm([matrices, vectors], model, (inputs,))
    gradients_(model, inputs)
    matrices.step()
    matrices.step()
    with pytest.warns(UserWarning, match="ENorm waits for SGD 1, counted from 0, which made no step in 3 steps"):
        matrices.step()
    matrices.step()
    assert hook.steps == 0
    vectors.step()
    assert hook.steps == 1


def test_a_balance_moves_the_states_of_all():
    model, inputs = unbalanced()
    optimizers = [optim.SGD(part, lr=0.1, momentum=0.9) for part in ([*model.parameters()][:3], [*model.parameters()][3:])]
    gradients_(model, inputs)
    for optimizer in optimizers:
        optimizer.step()
    products = [optimizers[k >= 3].state[p]["momentum_buffer"] * p.detach() for k, p in enumerate(model.parameters())]
    equinorm.balance_(model, (inputs,), optimizer=optimizers)
    for k, (parameter, product) in enumerate(zip(model.parameters(), products, strict=True)):
        now = optimizers[k >= 3].state[parameter]["momentum_buffer"] * parameter.detach()
        torch.testing.assert_close(now, product, rtol=1e-12, atol=1e-300)
    foreign = optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(RescaleError, match="holds no parameter of Sequential"):
        equinorm.balance_(model, (inputs,), optimizer=[*optimizers, foreign])


def test_gradients_that_are_still_to_be_used_move():
    """Gradient scaling skips one optimizer: from then on cycles run before the other has stepped, whatever `gradients` says."""
    models = []
    for gradients in (True, False):
        model, inputs = unbalanced()
        optimizers = halves(model)
        ENorm(optimizers, model, (inputs,), gradients=gradients)
        for step in range(4):
            gradients_(model, inputs)
            for place, optimizer in enumerate(optimizers):
                if (step, place) != (1, 0):
                    optimizer.step()
        models.append(model)
    assert same(*models)


def test_gradients_that_are_used_up_stay():
    model, inputs = unbalanced()
    first, last = halves(model)
    ENorm([first, last], model, (inputs,), gradients=False)
    gradients_(model, inputs)
    before = {id(p): p.grad.clone() for optimizer in (first, last) for group in optimizer.param_groups for p in group["params"]}
    first.step()
    last.step()

    def stays(optimizer: torch.optim.Optimizer) -> list[bool]:
        return [torch.equal(p.grad, before[id(p)]) for group in optimizer.param_groups for p in group["params"]]

    assert all(stays(last))
    assert not all(stays(first))


# ------------------------------------------------------------------------------------------------------------- averages


class Shadows:
    """As torch_ema and diffusers keep them: a list in the order of the parameters, replaced now and then."""

    def __init__(self, parameters):
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]

    def update(self, parameters):
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            shadow.lerp_(parameter.detach(), 0.3)


def from_torch_ema(model):
    found = pytest.importorskip("torch_ema").ExponentialMovingAverage(reversed([*model.parameters()]), decay=0.7)
    return found, lambda: [*reversed(found.shadow_params)], lambda: found.update()


def from_a_list(model):
    found = Shadows(model.parameters())
    return found.shadow_params, lambda: found.shadow_params, lambda: found.update(model.parameters())


def from_an_object(model):
    found = Shadows(model.parameters())
    return found, lambda: found.shadow_params, lambda: found.update(model.parameters())


def from_a_dict(model):
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def update():
        for name, parameter in model.named_parameters():
            found[name] = found[name].lerp(parameter.detach(), 0.3)  # a new tensor each time

    return found, lambda: [*found.values()], update


def from_timm(model):
    found = pytest.importorskip("timm.utils.model_ema").ModelEmaV3(model, decay=0.7)
    return found, lambda: [*found.module.parameters()], lambda: found.update(model)


SOURCES = {f.__name__: f for f in (from_torch_ema, from_a_list, from_an_object, from_a_dict, from_timm)}


@pytest.mark.parametrize("source", SOURCES)
def test_averages_move_along(source):
    model, inputs = unbalanced()
    average, tensors, update = SOURCES[source](model)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    hook = ENorm(optimizer, model, (inputs,), averages=average, every=100)
    network = copy.deepcopy(model)

    def averaged():
        with torch.no_grad():
            for own, tensor in zip(network.parameters(), tensors(), strict=True):
                own.copy_(tensor)
        return copy.deepcopy(network)

    for _ in range(3):
        gradients_(model, inputs)
        optimizer.step()
        update()
    before, start = averaged(), copy.deepcopy(model)
    assert equinorm.deviation(before, model, (inputs,)) > 1e-3
    hook.cycle_()
    after = averaged()
    assert not torch.equal(after[0].weight, before[0].weight)
    assert equinorm.deviation(after, before, (inputs,)) <= 1e-12
    scales = [now.detach() / then.detach() for now, then in zip(model.parameters(), start.parameters(), strict=True)]
    for one, other, scale in zip(after.parameters(), before.parameters(), scales, strict=True):
        torch.testing.assert_close(one.detach(), other.detach() * scale, rtol=1e-12, atol=0)


def test_lists_that_are_replaced_are_found_again():
    model, inputs = unbalanced()
    shadows = Shadows(model.parameters())
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    hook = ENorm(optimizer, model, (inputs,), averages=[shadows, optim.swa_utils.AveragedModel(model)])
    hook.cycle_()
    old, shadows.shadow_params = shadows.shadow_params, [tensor.clone() for tensor in shadows.shadow_params]
    equinorm.symmetries(model, (inputs,)).rescale_(torch.ones(12))
    kept = [tensor.clone() for tensor in old]
    hook.cycle_()
    assert all(torch.equal(a, b) for a, b in zip(old, kept, strict=True))
    assert not torch.equal(shadows.shadow_params[0], kept[0])


def test_averages_of_trained_parameters_only():
    model, inputs = unbalanced()
    model[4].bias.requires_grad_(False)
    average = Shadows(p for p in model.parameters() if p.requires_grad)
    hook = ENorm(optim.SGD(model.parameters(), lr=0.05), model, (inputs,), averages=average)
    hook.cycle_()
    assert all(torch.equal(a, b) for a, b in zip(average.shadow_params, model.parameters(), strict=False))


def test_averages_of_something_else():
    model, inputs = unbalanced()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    shadows = Shadows(model.parameters())
    shadows.shadow_params.pop()
    with pytest.raises(RescaleError, match=r"the averages are 5 tensors, and Sequential has 6 parameters, 6 of them trained"):
        ENorm(optimizer, model, (inputs,), averages=shadows)
    with pytest.raises(RescaleError, match=r"the averages hold 'weight', and Sequential has no parameter of that name"):
        ENorm(optimizer, model, (inputs,), averages={"weight": torch.ones(6, 5)})
    with pytest.raises(RescaleError, match=r"no 0\.weight of shape \(6, 5\), but one of shape \(5,\)"):
        ENorm(optimizer, model, (inputs,), averages={"0.weight": torch.ones(5)})
    with pytest.raises(RescaleError, match=r"the averaged model has no 0\.weight"):
        ENorm(optimizer, model, (inputs,), averages=nn.Linear(5, 6))
    with pytest.raises(RescaleError, match=r"averages must be a module or several, such as .* not int"):
        ENorm(optimizer, model, (inputs,), averages=[3])
    with pytest.raises(RescaleError, match="none of the averages is of a parameter that moves"):
        ENorm(optimizer, model, (inputs,), averages={"4.bias": torch.ones(3, dtype=torch.float64)})
    assert not optimizer._optimizer_step_post_hooks
