"""The noise: what rounding does cost, as a convex function of log-scales, and its minimum."""

import math

import numpy as np
import pytest
import torch
from quantized_networks import mixed, noise_of, perceptron
from scipy import optimize
from torch import nn

from equinorm.quantization.fake_quantization import Reference, Rounding, Simulation, decibels
from equinorm.quantization.minimize import descend, minimize
from equinorm.quantization.noise import Noise, logs
from equinorm.quantization.outputs import find_outputs
from equinorm.quantization.points import find_points
from equinorm.quantization.scheme import Scheme
from equinorm.quantization.statistics import gather
from equinorm.quantization.terms import by_name, rounded_tensors

SCHEMES = ["w8a8-tensor", "w8a8", "w4g2a8", Scheme(8, "tensor", False, 8, True), Scheme(8, "channel", sums=True)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_noise_at_log_scales_is_that_of_the_rescaled_network(scheme):
    """To 2e-3: floors of 1e-6 on sensitivities, in parts of a mean that moves, are all that differs."""
    net, x = mixed()
    noise, symmetries, _ = noise_of(net, x, scheme)
    assert symmetries.num_free > 10
    z = 0.5 * torch.randn(symmetries.num_free, dtype=torch.float64)
    wanted = noise.exact(z.numpy())
    symmetries.rescale_(z)
    found = noise_of(net, x, scheme)[0].exact(np.zeros(len(z)))
    assert len(found) == len(noise.terms) >= 6
    np.testing.assert_allclose(found, wanted, rtol=2e-3)
    assert np.abs(wanted / noise.exact(np.zeros(len(z))) - 1).max() > 0.1  # something has moved


class Padded(nn.Module):
    """What the second layer reads scales by channel, but for the zeros around."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x):
        return self.second(nn.functional.pad(torch.relu(self.first(x)), (1, 1, 1, 1))).mean((2, 3))


def test_channels_behind_a_padding_scale():
    torch.manual_seed(0)
    net, x = Padded().double().eval(), torch.randn(8, 2, 5, 5, dtype=torch.float64)
    _, points = find_points(net, (x,), None, Scheme(8, "tensor"))
    z = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert points[1].scaling.log_scales(z).flatten().tolist() == pytest.approx(z.tolist())


class Rows(nn.Module):
    """Rows that one weight makes are read by others, of which the second reads channels that scale by themselves, too."""

    def __init__(self):
        super().__init__()
        self.mix, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = torch.relu(self.mix(x.transpose(1, 2))).transpose(1, 2)
        x = self.second(torch.relu(self.first(x)))
        return self.last(x.transpose(1, 2))


@pytest.mark.parametrize("scheme", ["w8a8-tensor", "w8a8", "onnxruntime"])
def test_what_scales_along_several_axes_is_measured_as_the_rescaled_network_is(scheme):
    torch.manual_seed(0)
    net, x = Rows().double().eval(), torch.randn(32, 5, 6, dtype=torch.float64)
    noise, symmetries, _ = noise_of(net, x, scheme := Scheme.parse(scheme))
    assert symmetries.num_free == 7 + 8 + 1
    z = torch.randn(symmetries.num_free, dtype=torch.float64)

    def measured(at):
        _, points = find_points(net, (x,), None, scheme)
        points = (*points, *find_outputs(points, symmetries))
        seen = gather(net, points, [((x,), {})])
        rounding = Rounding(net, points, seen.activations, by_name(symmetries.scalings))
        return Reference(net, [((x,), {})]).signal_to_noise(Simulation(rounding, at))

    wanted, there = noise.exact(z.numpy()), measured(z)
    assert abs(there - measured(0 * z)) > 1
    symmetries.rescale_(z)
    np.testing.assert_allclose(noise_of(net, x, scheme)[0].exact(0 * z.numpy()), wanted, rtol=2e-3)
    assert measured(0 * z) == pytest.approx(there, abs=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_its_logarithm_is_convex_and_power_means_are_below_it_with_the_right_gradient(scheme):
    noise, symmetries, _ = noise_of(*mixed(1), scheme)
    generator = np.random.default_rng(0)
    for _ in range(10):
        one, other = generator.normal(size=(2, symmetries.num_free))
        middle = math.log(noise.exact((one + other) / 2).sum())
        assert middle <= (math.log(noise.exact(one).sum()) + math.log(noise.exact(other).sum())) / 2 + 1e-9
    noise.sharpen(one, 8.0, None)
    noise.sharpen(one, 16.0, 1e-3)
    for z in (one, one + 0.1, other / 4):
        value, gradient = noise.smooth(z)
        assert value <= math.log(noise.exact(z).sum()) + 1e-9
        step = 1e-5 * generator.normal(size=len(z))
        along = noise.smooth(z + step)[0] - noise.smooth(z - step)[0]
        assert along / 2 == pytest.approx(float(gradient @ step), rel=1e-4, abs=1e-11)


@pytest.mark.parametrize("scheme", ["w8a8-tensor", "w8a8", "w6-tensor"])
def test_prediction_is_what_rounding_costs(scheme):
    """On the mean over networks, to 1.5 dB: draws differ by some dB, and the largest weights are rounded to themselves."""
    net, x = perceptron(0, (8, 24, 24, 6), 0.2)
    symmetries, points = find_points(net, (x,), None, Scheme.parse(scheme))
    scalings, z = by_name(symmetries.scalings), torch.zeros(symmetries.num_free, dtype=torch.float64)
    apart = []
    for _ in range(8):
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        seen = gather(net, points, [((x,), {})])
        found = [one.observed for one in rounded_tensors(points, symmetries.tensors, scalings, seen)]
        predicted = decibels(seen.signal, Noise(found, len(z)).exact(z.numpy()).sum())
        measured = Reference(net, [((x,), {})]).signal_to_noise(
            Simulation(Rounding(net, points, seen.activations, scalings), z)
        )
        apart.append(measured - predicted)
    assert abs(sum(apart) / len(apart)) < 1.5
    assert max(map(abs, apart)) < 4.0


def least(noise, num_free):
    """ln N at its minimum by scipy: the largest of each group as a variable that bounds what is in it."""
    entries = []  # group, exponents of z, logarithm
    groups = []
    for term in noise.terms:
        batch, many, each = term.sensitivity.shape
        whole = {}
        for b, i, j in np.ndindex(batch, many, each):
            key = (id(term),) if term.is_whole else (id(term), b, i)
            if key not in whole:
                whole[key] = len(groups)
                groups.append((term.coefficient, []))
            exponents = np.zeros(num_free + 1)
            for maps, place in ((term.rows if term.is_whole else (), (b, i)), (term.columns, (b, j))):
                for exponent, ids, _ in maps:
                    exponents[ids[place]] += exponent
            groups[whole[key]][1].append((term.sensitivity[b, i, j], exponents[1:]))
            for side in term.sides:
                if np.isfinite(side[b, i, j]):
                    entries.append((whole[key], exponents[1:], side[b, i, j]))
    coefficients = np.array([c for c, _ in groups])
    F = [(np.array([f for f, _ in members]), np.array([e for _, e in members])) for _, members in groups]

    def value(v):
        z, r = v[:num_free], v[num_free:]
        sums = np.array([f @ np.exp(-2 * e @ z) for f, e in F])
        by_z = np.array([-2 * (f * np.exp(-2 * e @ z)) @ e for f, e in F])
        parts = coefficients * np.exp(2 * r) * sums
        return math.log(parts.sum()), np.concatenate([(coefficients * np.exp(2 * r)) @ by_z, 2 * parts]) / parts.sum()

    A = np.array([np.concatenate([-e, np.eye(len(groups))[g]]) for g, e, _ in entries])
    b = np.array([log for _, _, log in entries])
    start = np.concatenate([np.zeros(num_free), [max(log for g, _, log in entries if g == k) for k in range(len(groups))]])
    found = optimize.minimize(
        value,
        start,
        jac=True,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: A @ v - b, "jac": lambda v: A},
        options={"maxiter": 500, "ftol": 1e-13},
    )
    return found.fun


SYMMETRIC = [Scheme(8, granularity, True, 8, True) for granularity in ("tensor", "channel", 2)]


@pytest.mark.parametrize("scheme", SYMMETRIC, ids=str)
def test_minimum_is_that_of_scipy_from_any_start(scheme):
    noise, symmetries, _ = noise_of(*perceptron(3, (3, 4, 4, 2)), scheme)
    found = minimize(noise, 1e-7, 20.0)
    assert found.gap <= 3e-6
    assert found.value == pytest.approx(math.log(noise.exact(found.z).sum()), abs=1e-12)
    assert found.value == pytest.approx(least(noise, symmetries.num_free), abs=3e-6)
    start = 2 * np.random.default_rng(0).normal(size=symmetries.num_free)
    assert minimize(noise, 1e-7, 20.0, start).value == pytest.approx(found.value, abs=3e-6)
    for _ in range(20):
        near = found.z + 0.01 * np.random.default_rng(1).normal(size=len(start))
        assert math.log(noise.exact(near).sum()) >= found.bound


@pytest.mark.parametrize("kind", ["mixed", "perceptron"])
@pytest.mark.parametrize("scheme", ["w8a8-tensor", "w8"])
def test_the_estimate_is_close_at_any_tolerance(kind, scheme):
    """A rough search may not claim to be near where a finer one finds less."""
    net, x = {"mixed": mixed, "perceptron": perceptron}[kind](3, spread=3.0)
    noise, _, _ = noise_of(net, x, scheme)
    least = minimize(noise, 1e-4, 20.0).value
    for tolerance in (2e-2, 5e-3, 1e-3):
        found = minimize(noise, tolerance, 20.0)
        assert found.bound <= least + 0.5 * tolerance
        assert found.value - least <= 1.5 * math.log1p(tolerance)


def test_bounds_on_scales_hold_and_cost():
    noise, _, _ = noise_of(*mixed(2), "w8a8-tensor")
    free, held = minimize(noise, 1e-3, 20.0), minimize(noise, 1e-3, 0.3)
    assert np.abs(free.z).max() > 0.6
    assert np.abs(held.z).max() == pytest.approx(0.3)
    assert held.value > free.value + 0.01
    assert held.gap < 0.01


def test_descent_finds_the_minimum_of_a_quadratic_in_a_box():
    target, weights = np.array([3.0, -0.5, 0.1]), np.array([1.0, 10.0, 100.0])

    def function(z):
        return float((weights * (z - target) ** 2).sum()), 2 * weights * (z - target)

    z, value, slack = descend(function, np.zeros(3), 1.0, 1e-14, 200)
    np.testing.assert_allclose(z, [1.0, -0.5, 0.1], atol=1e-6)
    assert value == pytest.approx(4.0)
    assert slack < 1e-10
    assert logs(((2.0, np.array([0, 1, 3]), True),), np.array([0.0, 5.0, 6.0, 7.0]), (3,)).tolist() == [0, 10, 14]
