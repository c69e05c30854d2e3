"""The benchmark's own rounding and its ways of rescaling: what its tables rest on."""

import argparse
import copy

import pytest
import torch
from torch import nn

import equinorm
import quantization
from quantizing.methods import METHODS, folded
from quantizing.rounding import Rounded, Setting, exported, rounded_weight
from quantizing.samples import Inputs
from quantizing.subjects import Subject


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6()]
    net = nn.Sequential(*layers, nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    net[1].weight.data.uniform_(2, 20)
    return net.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_multiples_of_the_step_stay_and_others_move_by_half_a_step_at_most(granularity):
    weight = torch.randint(-127, 128, (4, 64), generator=torch.Generator().manual_seed(0)).float()
    weight[:, ::32] = 127.0  # the largest of every group
    assert torch.equal(rounded_weight(weight, Setting(8, granularity)), weight)
    moved = rounded_weight(weight + 0.3, Setting(8, granularity)) - (weight + 0.3)
    assert 0.1 < float(moved.abs().max()) <= 0.5 * 127.3 / 127 + 1e-4


def test_clipped_ranges_leave_a_smaller_error():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    plain, clipped = (float((rounded_weight(weight, Setting(4, "channel", clipped=c)) - weight).norm()) for c in (False, True))
    assert clipped < 0.95 * plain


@pytest.mark.parametrize("method", ["p=2", "p=inf", "smooth", "noise"])
def test_methods_leave_the_function_alone(network, images, method):
    moved = METHODS[method].apply(network, (images,), Setting(8, "tensor"))
    assert equinorm.deviation(moved, network, (images,)) < 1e-5
    assert equinorm.deviation(folded(network), network, (images,)) < 1e-5
    before, after = (next(net.parameters()).detach() for net in (folded(network), moved))
    assert not torch.allclose(before, after)


def test_correction_takes_the_mean_error_off_the_calibration_batch(network, images):
    rounded = Rounded(folded(network), (images,), Setting(4, "tensor", 8))
    with torch.no_grad():
        wanted = network(images)
    plain, corrected = (float((rounded.run((images,), c)[0] - wanted).mean(0).abs().max()) for c in (False, True))
    assert plain > 1e-2
    assert corrected < 1e-5


def test_the_library_measures_what_the_benchmark_measures(network, images):
    """Two implementations of one rounding, but for the room that the library leaves beyond what it has seen."""
    result = equinorm.equalize(network, images, calibration=[images], scheme="w8-tensor")
    rounded = Rounded(result.model, (images,), Setting(8, "tensor"))
    with torch.no_grad():
        wanted, (found,) = network(images), rounded.run((images,))
    decibels = float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))
    assert decibels == pytest.approx(result.measured()[1], abs=0.1)


def test_copies_are_exported_once_and_keep_their_own_numbers(network, images):
    plain, moved = folded(network), folded(network)
    with torch.no_grad():
        next(moved.parameters()).mul_(1.5)
        for net in (plain, moved):
            torch.testing.assert_close(exported(copy.deepcopy(net), (images,))(images), net(images))


def test_known_draws_are_not_repeated_unless_another_algorithm_made_them(network, images, monkeypatch):
    subject = Subject(
        lambda: network, lambda draw, count, test: Inputs((images[:count].roll(draw + test, 0),)), "made here", count=8
    )
    monkeypatch.setitem(quantization.SUBJECTS, "tiny", subject)
    asked = {"networks": ["tiny"], "settings": ["w8-tensor"], "methods": ["none", "noise"], "images": None}
    one, two = (argparse.Namespace(**asked, draws=draws) for draws in (1, 2))
    known = {(r["network"], r["setting"], r["method"]): r for r in quantization.sweep(one, {})}
    assert [*quantization.sweep(one, dict(known))] == []
    more = [*quantization.sweep(two, dict(known))]
    assert [len(r["draws"]) for r in more] == [2, 2]
    assert [r["draws"][0] for r in more] == [r["draws"][0] for r in known.values()]
    known["tiny", "w8-tensor", "noise"]["algorithm"] = "of yesterday"
    assert [r["method"] for r in quantization.sweep(one, known)] == ["noise"]
