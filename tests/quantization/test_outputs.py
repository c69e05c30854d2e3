"""Outputs that quantizers round although no layer reads them as they are."""

import pytest
import torch
from torch import nn

import equinorm
from equinorm.quantization import Scheme
from equinorm.quantization.fake_quantization import Rounding, Simulation
from equinorm.quantization.outputs import Output, find_outputs
from equinorm.quantization.points import find_points
from equinorm.quantization.statistics import gather
from equinorm.quantization.terms import by_name

ROUNDED = Scheme(8, "tensor", outputs=True)


class Net(nn.Module):
    """Layers whose outputs a PReLU, a ReLU, a pooling, a sum, or nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(4))
        self.act, self.last = nn.PReLU(6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.b(self.act(self.a(x))))
        x = self.d(nn.functional.max_pool2d(self.c(x), 2)) + nn.functional.max_pool2d(x, 2)
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return Net().double().eval(), torch.randn(24, 3, 8, 8, dtype=torch.float64)


def outputs(net, x, scheme):
    symmetries, points = find_points(net, (x,), None, scheme)
    return [output.point.module for output in find_outputs(points, symmetries)]


def test_outputs_count_where_nothing_else_rounds_them(case):
    assert outputs(*case, ROUNDED) == ["a", "d", "last"]
    assert outputs(*case, Scheme(8, "tensor", outputs=True, sums=True)) == ["a", "last"]
    assert outputs(*case, Scheme(8, "tensor")) == outputs(*case, Scheme(8, "tensor", False, None, outputs=True)) == []
    assert outputs(*case, Scheme(8, "tensor", outputs=True, in_float=["a"])) == ["d", "last"]


def test_they_are_rounded_and_their_noise_is_foreseen(case):
    """Few steps for activations, many for weights: all of the noise is theirs."""
    net, x = case
    found = {}
    for rounds in (False, True):
        scheme = Scheme(16, "channel", activation_bits=6, outputs=rounds)
        found[rounds] = equinorm.equalize(net, x, calibration=[x], scheme=scheme)
        assert found[rounds].noise_before == pytest.approx(found[rounds].measured_before, abs=1.5)
    assert found[True].measured_before < found[False].measured_before - 1
    assert [one.name for one in found[True].tensors if one.name.startswith("output")] == [
        f"output of {n}" for n in ("a", "d", "last")
    ]
    values = found[True].simulated(x)[1].unique()  # of two outputs, one step
    assert len(values) <= 2**6
    output = next(one for one in found[True].points if isinstance(one, Output))
    channels = output.scaling.log_scales(found[True].log_scales).exp().reshape(-1, 1, 1)
    seen = found[True].activations[output.key]
    made = (net.a(x) * channels).amax((0, 2, 3)).detach()
    torch.testing.assert_close(seen.high, made.clamp(min=0), rtol=1e-9, atol=0)


def test_a_spread_that_only_outputs_see_is_evened():
    """A PReLU's output, of one range, from inputs of very different ones: only what is rounded in front of it tells."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 4)).double().eval()
    x = torch.randn(64, 4, dtype=torch.float64)
    with torch.no_grad():
        net[0].bias.copy_(-30 * torch.arange(8.0))  # far below zero, where the slope brings them back
        net[1].weight.copy_(1 / (1 + 30 * torch.arange(8.0)))
    plain = equinorm.equalize(net, x, calibration=[x], scheme="w8a8")
    told = equinorm.equalize(net, x, calibration=[x], scheme=Scheme(outputs=True))
    assert told.measured_after > told.measured_before + 3
    untold = equinorm.equalize_(plain.model, x, calibration=[x], scheme=Scheme(outputs=True)).measured_before
    assert told.measured_after > untold + 1


def test_what_a_clamp_reads_is_rounded_where_tools_do_not_fuse_it():
    """A ReLU6 as it is, and set free: then behind its ReLU, which is fused, and beyond its bound."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    x = 40 * torch.randn(64, 4, dtype=torch.float64)
    apart = Scheme(8, "tensor", outputs=True, fused_clamps=False)
    assert outputs(net, x, ROUNDED) == ["4"]
    assert outputs(net, x, apart) == ["0", "4"]
    freed, _ = equinorm.quantization.prepare(net, (x,))
    assert outputs(freed, x, ROUNDED) == ["0", "4"]
    found = equinorm.equalize(freed, x, calibration=[x], scheme=apart)
    first, last = (one for one in found.points if isinstance(one, Output))
    assert (first.point.module, first.is_rectified, last.is_rectified) == ("0", True, False)
    seen, channels = found.activations[first.key], first.scaling.log_scales(found.log_scales).exp().flatten()
    torch.testing.assert_close(seen.high, (net[0](x).relu() * channels).amax(0).detach(), rtol=1e-9, atol=0)
    assert not bool(seen.low.any())
    assert float(net[0](x).detach().max()) > 6
    assert found.noise_before == pytest.approx(found.measured_before, abs=1.5)


def rounded(values, high):
    """Numbers from 0 on, in 255 steps."""
    return (values / (high / 255)).round().clamp(0, 255) * (high / 255)


def test_of_bounds_that_differ_only_the_largest_is_fused():
    """What the layer puts out up to the largest bound is rounded, and again what all bounds leave of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 2)).double().eval().requires_grad_(False)
    x = 9 * torch.randn(64, 4, dtype=torch.float64)
    freed, _ = equinorm.quantization.prepare(net, (x,))
    symmetries, points = find_points(freed, (x,), None, Scheme(16, "channel", outputs=True))
    output, last = find_outputs(points, symmetries)
    assert (output.bounds, last.bounds) == (("1.upper",), ())
    places = (points[1], output)
    seen = gather(freed, (*points, output), [((x,), {})]).activations
    rounding = Rounding(freed, places, seen, by_name(symmetries.scalings))
    z = torch.randn(symmetries.num_free, dtype=torch.float64)
    for log_scales in (z, torch.zeros_like(z)):
        scales = output.scaling.log_scales(log_scales).exp()
        made, bounds, weight = net[0](x).relu() * scales, 6 * scales, net[2].weight / scales
        assert float(made.max()) > float(bounds.max())
        read = rounded(rounded(made, bounds.max()).minimum(bounds), made.minimum(bounds).max())
        step = weight.abs().amax(1, keepdim=True) / (2**15 - 1)
        wanted = read @ ((weight / step).round() * step).T + net[2].bias
        (found,) = Simulation(rounding, log_scales).outputs(((x,), {}))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_clamp_of_ones_own_is_rounded_twice_wherever_its_bounds_are():
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.upper = nn.Parameter(torch.full((6,), 3.0))

        def forward(self, x):
            return torch.relu(x).minimum(self.upper)

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), Bounded(), nn.Linear(6, 2)).eval(), torch.randn(64, 4)
    symmetries, points = find_points(net, (x,), None, ROUNDED)
    first, last = find_outputs(points, symmetries)
    assert (first.point.module, first.is_rectified, first.bounds, last.point.module) == ("0", True, (), "2")
