"""The state of every optimizer moves so that its next update is the one of that optimizer carried in the new coordinates."""

import copy
import io
import math
import sys

import pytest
import torch
from algorithm_1 import mlp
from carried_optimizers import TINY, check_carried, gradients_, unbalanced
from torch import nn, optim

import equinorm
from equinorm import ENorm, EquinormError, RescaleError

CASES = {
    "SGD": (optim.SGD, {}),
    "SGD momentum": (optim.SGD, {"momentum": 0.9}),
    "SGD dampening": (optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "SGD Nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD decay": (optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "SGD decay without momentum": (optim.SGD, {"weight_decay": 0.1}),
    "SGD decay dampening": (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD decay Nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD decay maximize": (optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    "SGD decay foreach": (optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "foreach": True}),
    "SGD decay fused": (optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    "Adam": (optim.Adam, {"eps": TINY}),
    "Adam foreach": (optim.Adam, {"eps": TINY, "foreach": True}),
    "Adam fused": (optim.Adam, {"eps": TINY, "fused": True}),
    "Adam amsgrad": (optim.Adam, {"eps": TINY, "amsgrad": True}),
    "Adam decay": (optim.Adam, {"eps": TINY, "weight_decay": 0.1}),
    "Adam decay maximize": (optim.Adam, {"eps": TINY, "weight_decay": 0.1, "maximize": True}),
    "Adam decay fused": (optim.Adam, {"eps": TINY, "weight_decay": 0.1, "fused": True}),
    "AdamW": (optim.AdamW, {"eps": TINY, "weight_decay": 0.1}),
    "AdamW amsgrad": (optim.AdamW, {"eps": TINY, "weight_decay": 0.1, "amsgrad": True}),
    "Adamax": (optim.Adamax, {"eps": TINY}),
    "NAdam": (optim.NAdam, {"eps": TINY}),
    "NAdam decay": (optim.NAdam, {"eps": TINY, "weight_decay": 0.1}),
    "NAdam decoupled": (optim.NAdam, {"eps": TINY, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (optim.RAdam, {"eps": TINY}),
    "RAdam decay": (optim.RAdam, {"eps": TINY, "weight_decay": 0.1}),
    "Adagrad": (optim.Adagrad, {"eps": TINY}),
    "Adagrad decay": (optim.Adagrad, {"eps": TINY, "weight_decay": 0.1}),
    "RMSprop": (optim.RMSprop, {"eps": TINY}),
    "RMSprop decay": (optim.RMSprop, {"eps": TINY, "weight_decay": 0.1}),
    "RMSprop centered momentum": (optim.RMSprop, {"eps": TINY, "centered": True, "momentum": 0.9}),
    "RMSprop centered decay": (optim.RMSprop, {"eps": TINY, "centered": True, "weight_decay": 0.1}),
    "Adadelta": (optim.Adadelta, {"eps": TINY}),
    "Rprop": (optim.Rprop, {}),
    "ASGD": (optim.ASGD, {"lambd": 0.1, "t0": 1}),
    "ASGD decay foreach": (optim.ASGD, {"lambd": 0.1, "weight_decay": 0.1, "foreach": True}),
}

CAPTURABLE = {
    f"{kind.__name__} capturable{' foreach' if foreach else ''}": (kind, {"eps": 1e-30, "capturable": True, "foreach": foreach})
    for kind in (optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adadelta)
    for foreach in (False, True)
}
"""Their steps count in float32 tensors, so that a CUDA graph can record them; PyTorch allows that on accelerators only."""

CASES |= CAPTURABLE

CANCEL = {f"{name} decay{form}" for name in ("Adam", "NAdam", "RAdam", "Adagrad") for form in ("", " maximize", " fused")}
"""Averages of (g + λw)²: where g is about −λw they lose digits, in whatever coordinates."""


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_new_coordinates(case, monkeypatch):
    kind, options = CASES[case]
    if case in CAPTURABLE:  # the same formulas, on this device
        for base in kind.__mro__[:-1]:
            module = sys.modules[base.__module__]
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"], raising=False)
    check_updates(kind, options, 1e-10 if case in CANCEL else 1e-12)


@pytest.mark.parametrize("decays", [[0, 0.1, 0.1, 0.2], [0.1, 0, 0, 0], [0, 0, 0, 0.1], [0.1, 0.1, 0, 0.1]], ids=str)
@pytest.mark.parametrize("case", ["SGD momentum", "SGD dampening", "SGD Nesterov", "Adam", "RMSprop centered momentum"])
def test_weight_decay_may_change(case, decays):
    """From 0 too: what was followed from its start is known to hold none."""
    kind, options = CASES[case]
    if kind is optim.RMSprop:
        options = options | {"momentum": 0}
    check_updates(kind, options, 1e-10, decays)


def check_updates(kind: type[optim.Optimizer], options: dict, rtol: float, decays: list[float] | None = None) -> None:
    """The update after a cycle, against that of the same optimizer in the new coordinates."""
    model, inputs = unbalanced()
    check_carried(model, inputs, lambda parameters: [kind(parameters, lr=0.05, **options)], rtol, decays)


def test_cases_cover_every_known_optimizer():
    elsewhere = {optim.Muon, optim.Adafactor, optim.LBFGS, optim.SparseAdam}  # test_optimizers_of_today
    own = {kind for kind, law in equinorm.rescaling.optimizer_laws.LAWS.items() if not law.is_registered}
    assert {kind for kind, _ in CASES.values()} | elsewhere == own


def test_groups_have_their_own_decay():
    """The decay part of a buffer is λ Σ μ^i w, with λ and μ of the group."""
    model, inputs = unbalanced()
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.1, "momentum": 0.5},
        {"params": [p for name, p in model.named_parameters() if name != "0.weight"]},
    ]
    optimizer = optim.SGD(groups, lr=0.05, momentum=0.9)
    hook = ENorm(optimizer, model, (inputs,), every=100)
    weights = []
    for _ in range(3):
        weights.append(model[0].weight.detach().clone())
        gradients_(model, inputs)
        optimizer.step()
    decay = hook.state_dict()["decay"]
    assert [name for name, parts in decay.items() if parts] == ["0.weight"]
    expected = 0.1 * (0.25 * weights[0] + 0.5 * weights[1] + weights[2])
    torch.testing.assert_close(decay["0.weight"]["momentum_buffer"][1], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [{"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9}], ids=["decay", "plain"])
def test_resumed_training_is_bitwise_the_same(options):
    def build():
        model, inputs = unbalanced()
        optimizer = optim.SGD(model.parameters(), lr=0.05, **options)
        return model, inputs, optimizer, ENorm(optimizer, model, (inputs,), every=2, c=1.1)

    def train(model, inputs, optimizer, steps):
        for _ in range(steps):
            gradients_(model, inputs)
            optimizer.step()

    model, inputs, optimizer, hook = build()
    train(model, inputs, optimizer, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, hook)], file)
    train(model, inputs, optimizer, 3)
    resumed, _, other, again = build()
    file.seek(0)
    for part, state in zip((resumed, other, again), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert again.steps == 3
    train(resumed, inputs, other, 3)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.Adagrad])
def test_a_distributed_checkpoint_finds_a_place_for_all(tmp_path, kind):
    """It loads into the tensors of a state that is there: a new hook's has those of a trained one, whatever makes a step."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    states = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = {"momentum": 0.9} if kind is optim.SGD else {}

    def build():
        model, inputs = unbalanced()
        optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.1, **options)
        return model, inputs, optimizer, ENorm(optimizer, model, (inputs,), c=1.1)

    def train(model, inputs, optimizer):
        for _ in range(3):
            gradients_(model, inputs)
            optimizer.step()

    def state(model, optimizer, hook):
        weights, averages = states.get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": averages, "enorm": hook.state_dict()}

    model, inputs, optimizer, hook = build()
    train(model, inputs, optimizer)
    dcp.save(state(model, optimizer, hook), checkpoint_id=tmp_path, no_dist=True)
    train(model, inputs, optimizer)
    resumed, _, other, again = build()
    loaded = state(resumed, other, again)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    states.set_state_dict(resumed, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    again.load_state_dict(loaded["enorm"])
    train(resumed, inputs, other)
    assert again.steps == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_decay_that_was_not_followed_is_refused():
    model, inputs = unbalanced()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    gradients_(model, inputs)
    optimizer.step()
    ENorm(optimizer, model, (inputs,))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RescaleError, match=r"momentum_buffer.*0\.weight.*is not known.*begin .* anew: optimizer\.state\.clear"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_averages_that_begin_anew_are_followed():
    model, inputs = unbalanced()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    gradients_(model, inputs)
    optimizer.step()
    optimizer.state.clear()
    fresh = copy.deepcopy(model)
    for one, trained in ((optimizer, model), (optim.SGD(fresh.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1), fresh)):
        ENorm(one, trained, (inputs,))
        for _ in range(3):
            gradients_(trained, inputs)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_attaching_later_works_without_coupled_decay():
    model, inputs = unbalanced()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    gradients_(model, inputs)
    optimizer.step()
    hook = ENorm(optimizer, model, (inputs,))
    gradients_(model, inputs)
    optimizer.step()
    assert hook.steps == 1


REFUSED = [
    (optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, "max_exp_avg_sq"),
    (optim.Adamax, {"weight_decay": 0.1}, "exp_inf"),
    (optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1}, "momentum_buffer"),
    (optim.Adadelta, {"weight_decay": 0.1}, "acc_delta"),
]


@pytest.mark.parametrize(("kind", "options", "key"), REFUSED, ids=[f"{kind.__name__}" for kind, _, _ in REFUSED])
def test_decay_in_no_sum_is_refused(kind, options, key):
    model, inputs = unbalanced()
    optimizer = kind(model.parameters(), lr=0.05, **options)
    refused = pytest.raises(RescaleError, match=rf"{key}.*exactly: its weight decay of 0\.1 is mixed into it")
    with refused:
        ENorm(optimizer, model, (inputs,))
    optimizer.param_groups[0]["weight_decay"] = 0.0
    ENorm(optimizer, model, (inputs,))
    optimizer.param_groups[0]["weight_decay"] = 0.1  # as a schedule may
    gradients_(model, inputs)
    with refused:
        optimizer.step()


def test_initial_accumulators_are_refused():
    model, inputs = unbalanced()
    optimizer = optim.Adagrad(model.parameters(), lr=0.05, initial_accumulator_value=0.1)
    with pytest.raises(RescaleError, match="initial_accumulator_value"):
        ENorm(optimizer, model, (inputs,))


class Mine(optim.SGD):
    """An optimizer that is not known, although it derives from one that is."""


def test_unknown_optimizers_are_refused_until_registered(monkeypatch):
    monkeypatch.setattr(equinorm.rescaling.optimizer_laws, "LAWS", dict(equinorm.rescaling.optimizer_laws.LAWS))
    model, inputs = unbalanced()
    with pytest.raises(RescaleError, match=r"Mine: how it scales is not known.*register_optimizer"):
        ENorm(Mine(model.parameters(), lr=0.05), model, (inputs,))
    equinorm.register_optimizer(Mine, {"other": -1})
    optimizer = Mine(model.parameters(), lr=0.05, momentum=0.9)
    ENorm(optimizer, model, (inputs,))
    gradients_(model, inputs)
    with pytest.raises(RescaleError, match=r"state .momentum_buffer. of Mine for 0\.weight"):
        optimizer.step()
    equinorm.register_optimizer(Mine, {"momentum_buffer": -1})
    optimizer = Mine(model.parameters(), lr=0.05, momentum=0.9)
    ENorm(optimizer, model, (inputs,))
    gradients_(model, inputs)
    optimizer.step()
    decayed = Mine(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    with pytest.raises(RescaleError, match="mixed into it"):
        ENorm(decayed, model, (inputs,))
    with pytest.raises(EquinormError, match=r"must be an integer, not 0\.5"):
        equinorm.register_optimizer(Mine, {"momentum_buffer": 0.5})
    with pytest.raises(EquinormError, match="must be a subclass"):
        equinorm.register_optimizer(nn.Linear, {})


@pytest.mark.parametrize("kind", [optim.Adam, optim.NAdam, optim.RAdam, optim.Adagrad, optim.RMSprop])
def test_second_moments_stay_positive_where_gradients_and_decay_cancel(kind):
    """In float32 the parts of an average of (g + λw)² round to more than the average itself where g is about −λw."""
    torch.manual_seed(0)
    model, decay = mlp(dtype=torch.float32), 0.1
    equinorm.balance_(model, (torch.randn(4, 5),))  # near the minimum scales are near 1, and all that is left cancels
    optimizer = kind(model.parameters(), lr=1e-6, weight_decay=decay)
    ENorm(optimizer, model, (torch.randn(4, 5),), gradients=False)
    least = math.inf
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = (1e-5 * torch.randn_like(parameter) - 1) * decay * parameter.detach()
        optimizer.step()
        for state in optimizer.state.values():
            key = next(key for key in ("exp_avg_sq", "sum", "square_avg") if key in state)
            least = min(least, float(state[key].min()))
    assert least >= 0
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
