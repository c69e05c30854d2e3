"""Equivalence under permutations and rescalings together."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm


def relu_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.LeakyReLU(), nn.Linear(9, 3)]
    return nn.Sequential(*layers).to(dtype)


def image_network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        *[nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)],
    )
    return net.double().eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True).double().eval()


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "relu": (relu_network, x(4, 5)),
    "images": (image_network, x(4, 3, 8, 8)),
    "encoder": (encoder, x(2, 5, 8)),
}


def moved(net: nn.Module, args: Tensor, std: float = 1.0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A permuted, then rescaled copy, and the permutation."""
    twin = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(7)
    permutations = equinorm.permutations(twin, args)
    order = permutations.random(generator)
    permutations.permute_(order)
    symmetries = equinorm.symmetries(twin, args)
    symmetries.rescale_(std * torch.randn(symmetries.num_free, generator=generator, dtype=torch.float64))
    return twin, dict(zip([family.name for family in permutations.families], order, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_permuted_and_rescaled_copies_are_found(name):
    make, args = NETWORKS[name]
    net = make()
    twin, order = moved(net, args)
    found = equinorm.equivalence(net, twin, args)
    assert found.equivalent
    assert all(torch.equal(found.permutation[name], order[name]) for name in found.permutation)
    assert "stand in another order" in str(found)


def test_permutation_and_scales_connect():
    net, args = relu_network(), x(4, 5)
    twin, _ = moved(net, args)
    found = equinorm.equivalence(net, twin, args)
    equinorm.permutations(net, args).permute_(found.permutation)
    equinorm.symmetries(net, args).rescale_(found.log_scales)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


def test_in_single_precision():
    net, args = relu_network(torch.float32), x(4, 5).float()
    assert equinorm.equivalence(net, moved(net, args)[0], args).permutation is not None


def test_scales_alone_need_no_permutation():
    net, args = relu_network(), x(4, 5)
    twin = copy.deepcopy(net)
    equinorm.balance_(twin, args)
    found = equinorm.equivalence(net, twin, args)
    assert found.equivalent
    assert found.permutation is None


@pytest.mark.parametrize("change", ["weight", "inputs", "tuned"])
def test_other_functions_are_never_equivalent(change):
    net, args = relu_network(), x(4, 5)
    twin, _ = moved(net, args)
    with torch.no_grad():
        if change == "weight":
            twin[2].weight[3, 4] *= 1.001
        elif change == "inputs":
            twin[0].weight[:, [0, 1]] = twin[0].weight[:, [1, 0]]
        else:
            for parameter in twin.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)
    assert not equinorm.equivalence(net, twin, args).equivalent


def test_channels_that_are_copies_of_each_other_match_in_any_order():
    net, args = relu_network(), x(4, 5)
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[5] = tensor[2]
        net[2].weight[:, 5] = net[2].weight[:, 2]
    assert equinorm.equivalence(net, moved(net, args)[0], args).equivalent
