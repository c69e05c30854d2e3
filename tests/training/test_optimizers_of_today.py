"""Muon, Lion, schedule-free, Adafactor, L-BFGS and quantized states: followed exactly, or refused with the reason."""

import copy
import itertools

import pytest
import torch
from algorithm_1 import mlp
from carried_optimizers import TINY, check_carried, gradients_, unbalanced
from torch import nn, optim

import equinorm
from equinorm import ENorm, RescaleError


def split(matrices, vectors):
    """One optimizer for what has two axes, another for the rest."""

    def make(parameters):
        return [matrices([p for p in parameters if p.dim() == 2]), vectors([p for p in parameters if p.dim() != 2])]

    return make


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
TOGETHER = {
    "Muon, AdamW": split(lambda p: optim.Muon(p, 0.05), lambda p: optim.AdamW(p, 0.05, eps=TINY)),
    "Muon without Nesterov, SGD with decay": split(
        lambda p: optim.Muon(p, 0.05, nesterov=False), lambda p: optim.SGD(p, **SGD)
    ),
    "SGD with decay twice": split(lambda p: optim.SGD(p, **SGD), lambda p: optim.SGD(p, **{**SGD, "momentum": 0.5})),
    "Adafactor of vectors": split(lambda p: optim.SGD(p, **SGD), lambda p: optim.Adafactor(p, 0.05, eps=(TINY, 1e-3))),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_updates_of_several_are_those_of_the_new_coordinates(case):
    check_carried(*unbalanced(), TOGETHER[case], 1e-12)


class Convolutions(nn.Module):
    """Scales of kernels differ along the first two axes only."""

    def __init__(self):
        super().__init__()
        kinds = {"kernel_size": 3, "padding": 1, "bias": False, "dtype": torch.float64}
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, **kinds), nn.ReLU(), nn.Conv2d(4, 5, **kinds), nn.ReLU(), nn.Conv2d(5, 2, **kinds)
        )

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def test_factored_moments_of_kernels_are_exact():
    """They are averages over the last two axes, along which no scale differs."""
    torch.manual_seed(0)
    model, inputs = Convolutions(), torch.randn(8, 2, 6, 6, dtype=torch.float64)
    found = equinorm.symmetries(model, (inputs,))
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
    check_carried(copy.deepcopy(model), inputs, lambda parameters: [optim.Adafactor(parameters, 0.05, eps=(TINY, 1e-3))], 1e-12)
    optimizer = optim.Adafactor(model.parameters(), 0.05)
    gradients_(model, inputs)
    optimizer.step()
    before = [state["row_var"].clone() for state in optimizer.state.values()]
    found.rescale_(torch.full((found.num_free,), 0.5, dtype=torch.float64), optimizer)
    after = [state["row_var"] for state in optimizer.state.values()]
    for old, new, power in zip(before, after, (-1, 0, 1), strict=True):
        torch.testing.assert_close(new, old * torch.tensor(float(power)).exp().double(), rtol=1e-7, atol=0)


def test_factored_moments_of_matrices_are_refused():
    model, inputs = unbalanced()
    optimizer = optim.Adafactor(model.parameters(), 0.05)
    words = r"'col_var' of 0\.weight exactly: it holds averages of squared gradients over axis 0, along which the scales differ"
    with pytest.raises(RescaleError, match=words):
        ENorm(optimizer, model, (inputs,))
    assert not optimizer._optimizer_step_post_hooks
    gradients_(model, inputs)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    found = equinorm.symmetries(model, (inputs,))
    with pytest.raises(RescaleError, match="averages of squared gradients over axis"):
        found.rescale_(torch.randn(found.num_free), optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


ELSEWHERE = {
    "lion_pytorch.Lion": {"lr": 0.05, "weight_decay": 0.1},
    "timm.optim.lion.Lion": {"lr": 0.05, "weight_decay": 0.1},
    "schedulefree.SGDScheduleFree": {"lr": 0.05, "weight_decay": 0.1, "foreach": False},
    "schedulefree.AdamWScheduleFree": {"lr": 0.05, "weight_decay": 0.1, "eps": TINY},
    "schedulefree.RAdamScheduleFree": {"lr": 0.05, "weight_decay": 0.1, "eps": TINY},
}


def elsewhere(name, parameters):
    package, _, kind = name.rpartition(".")
    optimizer = getattr(pytest.importorskip(package), kind)(parameters, **ELSEWHERE[name])
    if package == "schedulefree":
        optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", ELSEWHERE)
def test_updates_of_other_packages_are_those_of_the_new_coordinates(name):
    check_carried(*unbalanced(), lambda parameters: [elsewhere(name, parameters)], 1e-12)


@pytest.mark.parametrize("name", [name for name in ELSEWHERE if "schedulefree" in name])
def test_both_points_of_schedule_free_stay_the_same_network(name):
    """The one that is trained and the one that is evaluated, which `eval()` computes from it and from z."""
    model, inputs = unbalanced()
    optimizer = elsewhere(name, model.parameters())
    hook = ENorm(optimizer, model, (inputs,), every=100)
    for _ in range(8):  # RAdam stands still for the first few
        gradients_(model, inputs)
        optimizer.step()
    trained = copy.deepcopy(model)
    optimizer.eval()
    evaluated = copy.deepcopy(model)
    assert equinorm.deviation(trained, evaluated, (inputs,)) > 1e-6
    optimizer.train()
    hook.cycle_()
    assert equinorm.deviation(model, trained, (inputs,)) <= 1e-12
    optimizer.eval()
    assert equinorm.deviation(model, evaluated, (inputs,)) <= 1e-12


def test_the_average_of_asgd_stays_the_same_network():
    model, inputs = unbalanced()
    optimizer = optim.ASGD(model.parameters(), 0.05, lambd=0.1, t0=1, weight_decay=0.1)
    hook = ENorm(optimizer, model, (inputs,), every=100)
    for _ in range(4):
        gradients_(model, inputs)
        optimizer.step()

    def average():
        other = copy.deepcopy(model)
        for parameter, own in zip(other.parameters(), model.parameters(), strict=True):
            parameter.data.copy_(optimizer.state[own]["ax"])
        return other

    before = average()
    assert equinorm.deviation(model, before, (inputs,)) > 1e-6
    hook.cycle_()
    assert equinorm.deviation(average(), before, (inputs,)) <= 1e-12
    with pytest.raises(RescaleError, match="ASGD keeps points of its path"):
        hook.c = 1.2


def test_sparse_gradients_and_their_moments():
    """Rows that no gradient reaches move along; the next update is that of the new coordinates."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.ReLU(), nn.Linear(4, 3)).double()
    words, targets = torch.tensor([[1, 2, 2], [5, 1, 0]]), torch.randn(2, 3, 3, dtype=torch.float64)
    optimizers = [optim.SparseAdam([net[0].weight], 0.05, eps=TINY), optim.SGD(net[2].parameters(), 0.05)]

    def gradients():
        net.zero_grad()
        (net(words) - targets).square().mean().backward()

    hook = ENorm(optimizers, net, (words,), every=100, gradients=False)
    for _ in range(2):
        gradients()
        for optimizer in optimizers:
            optimizer.step()
    twin, state = copy.deepcopy(net), optimizers[0].state[net[0].weight]
    other = optim.SparseAdam([twin[0].weight], 0.05, eps=TINY)
    other.state[twin[0].weight] = copy.deepcopy(state)
    hook.cycle_()
    scale = (net[0].weight / twin[0].weight).detach()
    assert float((scale - 1).abs().max()) > 0.1
    torch.testing.assert_close(scale, scale[:1].expand(7, 4), rtol=1e-12, atol=0)
    start = [layer.weight.detach().clone() for layer in (net[0], twin[0])]
    for model, optimizer in ((net, optimizers[0]), (twin, other)):
        model.zero_grad()
        (model(words) - targets).square().mean().backward()
        optimizer.step()
    moved, expected = (layer.weight.detach() - before for layer, before in zip((net[0], twin[0]), start, strict=True))
    # Adam's update has no scale of its own: in the new coordinates it is as long as in the old ones.
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-14)
    assert bool((moved[[3, 4, 6]] == 0).all())
    assert bool((moved[[1, 2, 5]] != 0).any(1).all())
    hook.remove()
    hook = ENorm(optimizers, net, (words,))
    with pytest.raises(RescaleError, match=r"gradient of 0.weight, which is torch.sparse_coo.*gradients=False"):
        hook.cycle_()


def test_steps_that_are_remembered_are_not_shortened():
    model, inputs = unbalanced()
    optimizer = elsewhere("schedulefree.SGDScheduleFree", model.parameters())
    with pytest.raises(RescaleError, match=r"SGDScheduleFree keeps points of its path.*symmetric_biases=False"):
        ENorm(optimizer, model, (inputs,), c=1.2)
    hook = ENorm(optimizer, model, (inputs,))
    with pytest.raises(RescaleError, match="keeps points of its path"):
        hook.c = 1.2
    assert hook.c == 1
    hook.remove()
    ENorm(optimizer, model, (inputs,), c=1.2, symmetric_biases=False)


def closure_of(model, inputs):
    def closure():
        model.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        return loss

    return closure


def two_loops(gradient, steps, differences):
    """The direction of L-BFGS, from the pairs that it remembers."""
    direction, factors = -gradient, []
    for step, difference in zip(reversed(steps), reversed(differences), strict=True):
        factors.append(step.dot(direction) / step.dot(difference))
        direction = direction - factors[-1] * difference
    direction = direction * (steps[-1].dot(differences[-1]) / differences[-1].square().sum())
    for step, difference, factor in zip(steps, differences, reversed(factors), strict=True):
        direction = direction + step * (factor - difference.dot(direction) / step.dot(difference))
    return direction


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("way", ["ENorm", "rescale_"])
def test_lbfgs_goes_on_from_its_pairs_in_the_new_coordinates(way):
    model, inputs = unbalanced()
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=1, history_size=3)
    points, gradients = [], []
    hook = ENorm(optimizer, model, (inputs,), every=100)
    for _ in range(6):
        points.append(flat(model.parameters()))
        optimizer.step(closure_of(model, inputs))
        gradients.append(flat(p.grad for p in model.parameters()))
    points.append(flat(model.parameters()))
    if way == "ENorm":
        hook.cycle_()
    else:
        found = equinorm.symmetries(model, (inputs,))
        found.rescale_(torch.randn(found.num_free, dtype=torch.float64), optimizer)
    scale = flat(model.parameters()) / points[-1]
    assert float((scale - 1).abs().max()) > 0.1
    closure_of(model, inputs)()
    gradients = [gradient / scale for gradient in gradients] + [flat(p.grad for p in model.parameters())]
    points = [point * scale for point in points]
    steps = [b - a for a, b in itertools.pairwise(points)]
    differences = [b - a for a, b in itertools.pairwise(gradients)]
    expected = points[-1] + 0.1 * two_loops(gradients[-1], steps[-3:], differences[-3:])
    hook.remove()
    optimizer.step(closure_of(model, inputs))
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=1e-10, atol=1e-12)


def test_lbfgs_and_permutations():
    model, inputs = unbalanced()
    optimizer = optim.LBFGS(model.parameters(), max_iter=1)
    permutations = equinorm.permutations(model, (inputs,))
    with pytest.raises(equinorm.PermutationError, match="one vector holds that of all parameters"):
        permutations.permute_(permutations.random(), optimizer)


def test_biases_of_lbfgs_take_their_own_steps():
    """Its updates scale like weights, so that no step depends on the coordinates, whatever c is."""
    model, inputs = unbalanced()
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    ENorm(optimizer, model, (inputs,), c=1.3, every=100)
    twin = copy.deepcopy(model)
    other = optim.LBFGS(twin.parameters(), lr=0.1, max_iter=2)
    for _ in range(3):
        optimizer.step(closure_of(model, inputs))
        other.step(closure_of(twin, inputs))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_states_in_blocks_are_refused():
    kind = type("AdamW8bit", (optim.Optimizer,), {"__module__": "torchao.optim.adam"})  # as theirs, which need not be here
    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    for one in (kind, type("Mine", (kind,), {})):
        with pytest.raises(RescaleError, match=rf"{one.__name__} exactly: it keeps its averages in blocks of few bits"):
            ENorm(one(model.parameters(), {}), model, (inputs,))


def test_others_that_average_over_rows_and_columns_are_refused_with_the_reason():
    from transformers.optimization import Adafactor

    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(RescaleError, match=r"Adafactor exactly: it keeps averages .* Use an optimizer that keeps one number"):
        ENorm(Adafactor(model.parameters()), model, (inputs,))


def test_others_of_a_known_name_are_told_apart():
    kind = type("Muon", (optim.Optimizer,), {"__module__": "timm.optim.muon"})
    model, inputs = mlp(), torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(RescaleError, match=r"the state of Muon of timm\.optim\.muon: how it scales is not known"):
        ENorm(kind(model.parameters(), {}), model, (inputs,))


class Child(optim.SGD):
    """An optimizer that keeps what SGD keeps."""


class Stranger(optim.Optimizer):
    """One without its settings."""


def test_subclasses_borrow_a_law(monkeypatch):
    table = equinorm.rescaling.optimizer_laws
    monkeypatch.setattr(table, "LAWS", dict(table.LAWS))
    model, inputs = unbalanced()
    with pytest.raises(RescaleError, match=r"register_optimizer\(Child, like=SGD\)"):
        ENorm(Child(model.parameters(), lr=0.05), model, (inputs,))
    equinorm.register_optimizer(Child, like=optim.SGD)
    check_carried(model, inputs, lambda parameters: [Child(parameters, **SGD)], 1e-12)
    equinorm.register_optimizer(Stranger, like=optim.SGD)
    with pytest.raises(
        RescaleError, match=r"Stranger was registered to keep 'momentum_buffer' as another .* 'momentum' it has not"
    ):
        ENorm(Stranger(model.parameters(), {}), model, (inputs,))
    with pytest.raises(equinorm.EquinormError, match="like must be a class of optimizers that is known"):
        equinorm.register_optimizer(Child, like=nn.Linear)
    with pytest.raises(equinorm.EquinormError, match="give exponents of the states, or an optimizer"):
        equinorm.register_optimizer(Child)
