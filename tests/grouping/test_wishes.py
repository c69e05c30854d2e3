"""Scales that users wish for, and the nearest valid ones."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import equinorm


class Tied(nn.Module):
    """Two channels of a value projection, each read twice; a gain between two layers."""

    def __init__(self):
        super().__init__()
        self.v, self.o, self.last = nn.Linear(3, 2, bias=False), nn.Linear(4, 3), nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x):
        return self.last(self.gain * self.o(self.v(x).repeat(1, 2)).relu())


@pytest.fixture(scope="module")
def symmetries():
    torch.manual_seed(0)
    return equinorm.symmetries(Tied().double(), (torch.randn(2, 3, dtype=torch.float64),))


def entries(symmetries, name, z):
    (scaling,) = [scaling for scaling in symmetries.scalings if scaling.name == name]
    return scaling.log_scales(z).flatten()


def test_a_wish_that_can_come_true_does(symmetries):
    z = symmetries.scales({("v.weight", 0): torch.tensor([2.0, 0.5])})
    assert torch.allclose(entries(symmetries, "v.weight", z), torch.tensor([2.0, 0.5], dtype=torch.float64).log())
    assert torch.count_nonzero(z) == 2


@pytest.mark.parametrize(
    ("reduce", "wanted"), [("geometric mean", [4.0, 6.0]), ("minimum", [2.0, 4.0]), ("maximum", [8.0, 9.0])]
)
def test_tied_channels_share_one_scale(symmetries, reduce, wanted):
    z = symmetries.scales({("o.weight", 1): [2.0, 4.0, 8.0, 9.0]}, reduce=reduce)
    assert torch.allclose(entries(symmetries, "o.weight", z)[:4].exp(), torch.tensor(wanted * 2, dtype=torch.float64))
    assert torch.allclose(entries(symmetries, "v.weight", z).exp(), 1 / torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize(("reduce", "wanted"), [("maximum", [8.0, 5.0]), ("minimum", [2.0, 3.0])])
def test_of_axes_that_move_inversely_the_first_decides(symmetries, reduce, wanted):
    wishes = {("o.weight", 1): [2.0, 4.0, 8.0, 3.0], ("v.weight", 0): [1 / 4.0, 1 / 5.0]}
    z = symmetries.scales(wishes, reduce=reduce)
    assert torch.allclose(entries(symmetries, "o.weight", z)[:4].exp(), torch.tensor(wanted * 2, dtype=torch.float64))


def test_wishes_are_met_in_least_squares(symmetries):
    torch.manual_seed(1)
    wishes = {
        (name, 0): torch.rand(size, dtype=torch.float64) + 0.5 for name, size in [("gain", 3), ("o.weight", 3), ("v.weight", 2)]
    }
    wishes["last.weight", 1] = torch.rand(3) + 0.5
    z = symmetries.scales(wishes)
    rows, targets = [], []
    scalings = {scaling.name: scaling for scaling in symmetries.scalings}
    for (name, axis), scales in wishes.items():  # a plain matrix, from the exponents as they are stored
        matrix = torch.zeros(len(scales), symmetries.num_free, dtype=torch.float64)
        for exponent, ids in scalings[name].factors:
            if ids.size(axis) > 1:
                for row, id in enumerate(ids.flatten().tolist()):
                    matrix[row, id - 1] += exponent
        rows.append(matrix)
        targets.append(scales.double().log())
    expected = np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(targets).numpy(), rcond=None)[0]
    assert np.abs(z.numpy() - expected).max() < 1e-12


def test_scales_are_for_rescaling(symmetries):
    model = copy.deepcopy(symmetries.model)
    args = (torch.randn(2, 3, dtype=torch.float64),)
    again = equinorm.symmetries(model, args)
    again.rescale_(again.scales({("o.weight", 1): [1.0, 2.0, 3.0, 4.0], ("gain", 0): [1.0, 2.0, 3.0]}))
    assert equinorm.deviation(symmetries.model, model, args) < 1e-12


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({}, "at least one entry"),
        ({"o.weight": [1.0]}, "a wish is for (name of a tensor, axis)"),
        ({("o", 0): [1.0]}, "no tensor 'o' that could scale. Some that it has: o.weight, o.bias"),
        ({("o.weight", 2): [1.0]}, "o.weight of shape (3, 4) has no axis 2"),
        ({("o.weight", 1): [1.0]}, "must have shape (4,), as the tensor has shape (3, 4); not (1,)"),
        ({("gain", 0): [1.0, 0.0, 1.0]}, "gain, axis 0, must be finite and positive"),
        ({("gain", 0): "abc"}, "must be numbers"),
        (
            {("last.weight", 0): [1.0, 2.0]},
            "last.weight cannot scale along axis 0 (shape (2, 3)). It is pinned by model output",
        ),
        ({("v.weight", 1): [1.0, 2.0, 3.0]}, "v.weight cannot scale along axis 1"),
        ({("gain", (0, -1)): torch.ones(3, 3)}, "gain: (0, -1) names an axis twice"),
        ({("gain", 0): torch.ones(3, dtype=torch.complex64)}, "gain, axis 0, must be real numbers, not complex64"),
        ({("gain", ()): 2.0}, "gain cannot scale as a whole (shape (3,))"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(symmetries, wishes, words):
    with pytest.raises(equinorm.RescaleError) as error:
        symmetries.scales(wishes)
    assert words in str(error.value)


def test_an_extreme_of_several_classes_is_refused(symmetries):
    with pytest.raises(equinorm.RescaleError, match="geometric mean"):
        symmetries.scales({("last.weight", 1): [1.0, 2.0, 3.0]}, reduce="maximum")
    with pytest.raises(equinorm.RescaleError, match="reduce must be one of"):
        symmetries.scales({("gain", 0): [1.0, 2.0, 3.0]}, reduce="mean")


def test_experts_in_one_tensor_scale_along_two_axes():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 5, 3))

        def forward(self, x):
            return torch.bmm(torch.bmm(x, self.up.transpose(1, 2)).relu(), self.down.transpose(1, 2)).sum(0)

    found = equinorm.symmetries(Experts(), (torch.randn(2, 7, 4),))
    assert str(found.groups()[0].up[0]) == "up[0, 1]"
    z = found.scales({("up", (0, 1)): torch.full((2, 3), 2.0)})
    assert torch.allclose(z, torch.full((6,), 2.0, dtype=torch.float64).log())
    with pytest.raises(equinorm.RescaleError, match=r"scales along axes \(0, 1\) together"):
        found.scales({("up", 1): [1.0, 2.0, 3.0]})


def test_one_scale_for_a_whole_tensor():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.first, self.last = nn.Parameter(torch.tensor(2.0)), nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.gain * self.first(x).relu())

    found = equinorm.symmetries(Scaled(), (torch.randn(2, 3),))
    z = found.scales({("gain", ()): 3.0})
    (scaling,) = [scaling for scaling in found.scalings if scaling.name == "gain"]
    assert float(scaling.log_scales(z)) == pytest.approx(float(torch.tensor(3.0).log()))
