"""Weight matching: copies are found again, and what is found computes what it did."""

import copy
import sys

import pytest
import torch
from torch import nn

import equinorm

pytest.importorskip("scipy")


def relu_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)).double()


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(12, 3, 10, 0.0, batch_first=True).double().eval()


def grouped(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(3, 8, 1), nn.Tanh(), nn.Conv1d(8, 8, 1, groups=4), nn.Tanh(), nn.Conv1d(8, 2, 1)).double()


NETWORKS = {
    "relu": (relu_network, torch.randn(4, 5).double()),
    "encoder": (encoder, torch.randn(2, 5, 12).double()),
    "grouped": (grouped, torch.randn(2, 3, 4).double()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_with_noise_are_found_again(name):
    make, x = NETWORKS[name]
    net, twin = make(), make()
    permutations = equinorm.permutations(twin, x)
    permutations.permute_(permutations.random(torch.Generator().manual_seed(2)))
    symmetries = equinorm.symmetries(twin, x)
    symmetries.rescale_(torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 1e-3 * parameter.abs().mean() * torch.randn_like(parameter)
    found = equinorm.align(net, twin, x)
    assert found.distance_before > 0.5
    assert found.distance_after < 0.05
    assert equinorm.deviation(found.model, net, x) <= 1e-12


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_come_nearer(name, rescale):
    make, x = NETWORKS[name]
    net, other = make(0), make(1)
    before = copy.deepcopy(net.state_dict())
    found = equinorm.align(net, other, x, rescale=rescale)
    assert found.distance_after < found.distance_before
    assert equinorm.deviation(found.model, net, x) <= 1e-12
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert "aligned in" in str(found)


def test_more_starts_are_no_worse():
    net, other, x = relu_network(0), relu_network(1), NETWORKS["relu"][1]
    one, many = (equinorm.align(net, other, x, rescale=False, starts=starts) for starts in (1, 5))
    assert many.distance_after <= one.distance_after + 1e-12


def test_scipy_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(equinorm.PermutationError, match=r"equinorm\[align\]"):
        equinorm.align(relu_network(), relu_network(1), NETWORKS["relu"][1])


def test_other_architectures_are_refused():
    with pytest.raises(equinorm.EquivalenceError):
        equinorm.align(relu_network(), nn.Linear(5, 3).double(), NETWORKS["relu"][1])
    with pytest.raises(equinorm.EquinormError, match="starts"):
        equinorm.align(relu_network(), relu_network(1), NETWORKS["relu"][1], starts=0)


def test_distances_where_weights_are_zero_or_no_numbers():
    x = NETWORKS["relu"][1]
    net, empty, broken = relu_network(), relu_network(), relu_network()
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
        broken[0].weight[0, 0] = torch.nan
    assert equinorm.align(net, empty, x).distance_after == float("inf")
    assert equinorm.align(empty, empty, x).distance_after == 0.0
    with pytest.raises(equinorm.EquivalenceError, match=r"0\.weight holds NaN or inf"):
        equinorm.align(broken, net, x, rescale=False)
