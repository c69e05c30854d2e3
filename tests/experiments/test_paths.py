"""Path-SGD and PathCond against brute force, in float64."""

import itertools
import math

import pytest
import torch
from torch import nn

import equinorm
from equinorm.experiments.path_norms import PathSGD, condition_, kappa


def chain(widths=(4, 6, 5, 3), bias=False, seed=0):
    torch.manual_seed(seed)
    layers = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


class Residual(nn.Module):
    """Convolutions with a learned skip, an identity skip and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.skip = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x) + self.skip(x))
        return self.head(torch.relu(x + self.branch(x)).mean((2, 3)))


def residual(seed=0):
    torch.manual_seed(seed)
    return Residual().double()


NETWORKS = {
    "chain": (chain, (4,)),
    "biases": (lambda seed=0: chain(bias=True, seed=seed), (4,)),
    "residual": (residual, (2, 6, 6)),
}


def brute_force(weights, edge, entry):
    """Σ over paths through one weight of the product of the squares of the others; weights are (out, in) matrices."""
    sizes = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    total = 0.0
    for path in itertools.product(*map(range, sizes)):
        if (path[edge + 1], path[edge]) == entry:
            others = (weights[k][path[k + 1], path[k]] ** 2 for k in range(len(weights)) if k != edge)
            total += float(math.prod(others))
    return total


def test_kappa_is_the_sum_over_paths():
    model = chain((3, 4, 2, 3))
    weights = [layer.weight.detach() for layer in model[::2]]
    found = list(kappa(model, (3,)).values())
    for edge, weight in enumerate(weights):
        for out, into in itertools.product(*map(range, weight.shape)):
            assert float(found[edge][out, into]) == pytest.approx(brute_force(weights, edge, (out, into)), rel=1e-13)


def test_kappa_counts_paths_from_biases():
    model = chain((2, 3, 2), bias=True)
    found = kappa(model, (2,))
    last = model[2].weight.detach().square()
    assert torch.allclose(found["0.bias"], last.sum(0), rtol=1e-14)
    assert torch.equal(found["2.bias"], torch.ones(2, dtype=torch.float64))
    hidden = model[0].weight.detach().square().sum(1) + model[0].bias.detach().square()
    assert torch.allclose(found["2.weight"], hidden.expand(2, 3), rtol=1e-14)


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_commute_with_rescaling(name):
    """Ten steps and then a rescaling, or a rescaling and then ten steps: the same weights, decay included."""
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    batches = [(torch.randn(8, *shape, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(10)]
    final = []
    for first in (True, False):
        model, unit = make(), make()
        symmetries = equinorm.symmetries(model, (batches[0][0],))
        scales = torch.linspace(-1, 1, symmetries.num_free, dtype=torch.float64)
        paths = PathSGD(unit, shape)  # the mean of κ is a constant of the start, not an invariant
        paths._parameters = dict(model.named_parameters())
        paths._compute = lambda model=model: kappa(model, shape)
        optimizer = torch.optim.SGD(model.parameters(), 0.003, weight_decay=0.01)
        if first:
            symmetries.rescale_(scales)
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            paths.divide_()
            optimizer.step()
        if not first:
            symmetries.rescale_(scales)
        final.append([p.detach().clone() for p in model.parameters()])
    for one, other, start in zip(*final, make().parameters(), strict=True):
        assert float((one - other).abs().max()) <= 1e-12 * float(other.abs().max())
        assert float((one - start.detach()).abs().max()) > 1e-4  # it did move


def test_first_divisors_have_mean_one():
    model = chain()
    paths = PathSGD(model, (4,))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    paths.divide_()
    divisors = torch.cat([1 / parameter.grad.flatten() for parameter in model.parameters()])
    assert float(divisors.mean()) == pytest.approx(1, rel=1e-13)


def test_kappa_is_kept_for_some_steps():
    model = chain()
    paths = PathSGD(model, (4,), every=2)

    def divisors():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        paths.divide_()
        return model[0].weight.grad.clone()

    first = divisors()
    with torch.no_grad():
        model[2].weight.mul_(2)
    assert torch.equal(divisors(), first)
    assert torch.allclose(divisors(), first / 4, rtol=1e-14)


def test_dead_neurons_keep_their_weights():
    model = chain()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    paths = PathSGD(model, (4,))
    model(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    paths.divide_()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    assert not model[0].weight.grad[1].any()


# --------------------------------------------------------------------------------------------------------------- PathCond


def objective(model, before, shape):
    """P·log Σ κ + 2 Σ log |w / w_before|, from the weights themselves."""
    after = dict(model.named_parameters())
    kappas = torch.cat([part.flatten() for part in kappa(model, shape).values()])
    ratios = torch.cat([(after[name].detach() / before[name]).abs().log().flatten() for name in before])
    return float(len(kappas) * kappas.sum().log() + 2 * ratios.sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_pathcond_minimises_its_objective(name):
    make, shape = NETWORKS[name]
    model = make()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    symmetries = equinorm.symmetries(model, (torch.randn(2, *shape, dtype=torch.float64),))
    started = objective(model, before, shape)
    first, last, slope = condition_(symmetries, shape)
    assert first == pytest.approx(started, rel=1e-12)
    assert last == pytest.approx(objective(model, before, shape), rel=1e-12)
    assert last < first - 1
    assert slope <= 1e-8
    state = {key: value.clone() for key, value in model.state_dict().items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    for direction in torch.eye(symmetries.num_free, dtype=torch.float64):
        values = []
        for sign in (1, -1):
            symmetries.rescale_(sign * 1e-3 * direction)
            values.append(objective(model, before, shape))
            model.load_state_dict(state)
        assert min(values) > last
        assert abs(values[0] - values[1]) / 2e-3 <= 1e-4 * count  # central difference, O(10⁻⁶) off
    images = torch.randn(5, *shape, dtype=torch.float64)
    assert float((model(images) - make()(images)).detach().abs().max()) <= 1e-12


def test_pathcond_has_one_minimum():
    """From rescaled weights it finds the same point."""
    one, other = chain(), chain()
    inputs = (torch.randn(2, 4, dtype=torch.float64),)
    moved = equinorm.symmetries(other, inputs)
    moved.rescale_(torch.linspace(-2, 2, moved.num_free, dtype=torch.float64))
    condition_(equinorm.symmetries(one, inputs), (4,))
    condition_(moved, (4,))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)
