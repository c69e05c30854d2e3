"""Models without numbers, of a million channels, in wrappers, with empty batches, and laws that meet or cancel."""

import math

import pytest
import torch
from exactness import X, check, two_layers
from torch import Tensor, nn

import equinorm


def test_meta_tensors_suffice():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        assert equinorm.symmetries(net, torch.empty(2, 4)).num_free == 6


def test_a_group_of_one_million_channels_is_no_burden():
    """Labels are stride-0 along the batch: neither batch nor width blows them up."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(64, 1 << 20), nn.ReLU(), nn.Linear(1 << 20, 64))
        symmetries = equinorm.symmetries(net, torch.empty(4096, 64))
    assert symmetries.num_free == 1 << 20
    assert all(ids.numel() <= 1 << 20 for scaling in symmetries.scalings for _, ids in scaling.factors)
    assert math.isclose(symmetries.coverage, 1.0, abs_tol=1e-3)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_wrappers_are_looked_through(wrap):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    found = equinorm.symmetries(wrap(model), (torch.randn(2, 4),))
    assert (found.num_free, [scaling.name for scaling in found.scalings]) == (5, ["0.weight", "0.bias", "2.weight", "2.bias"])


def test_scales_that_cancel_do_not_count():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    found = equinorm.symmetries(net, X)
    moving = [scaling.name for scaling in found.scalings if scaling.factors]
    assert moving == ["0.parametrizations.weight.original"]
    assert found.coverage == 32 / 67


def test_empty_batches():
    assert equinorm.symmetries(two_layers(), X[:0]).num_free in (0, 6)


class Merging(nn.Module):
    """One law pins a class that another law, of the same sum, has three of."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.first, self.second, self.last, self.exponent = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(3, 3), exponent

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([x[:, :1], self.first(x)], 1).relu()
        g = self.second(x).relu()[:, [0, 0, 1]]
        return self.last(h + g**self.exponent)


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_laws_of_one_sum_that_meet(exponent):
    check(Merging(exponent).double(), (X,), 1)
