"""Scales of the weights in front of batch normalization: asked for, they join copies in evaluation mode."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm


def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(80, 2)).double()
    net(x())  # running statistics that are none of 0 and 1
    return net.eval()


def moved(net: nn.Module, power_of_two: bool = False) -> nn.Module:
    """A copy that was permuted, flipped, and rescaled in front of its batch normalization too."""
    twin, generator = copy.deepcopy(net), torch.Generator().manual_seed(7)
    scales = equinorm.symmetries(twin, x(), batch_norm="evaluation")
    for group in (equinorm.permutations(twin, x()), equinorm.signs(twin, x())):
        (group.permute_ if isinstance(group, equinorm.Permutations) else group.flip_)(group.random(generator))
    z = torch.randn(scales.num_free, generator=generator, dtype=torch.float64)
    scales.rescale_(2 * z, power_of_two=power_of_two)
    return twin


def test_copies_are_told_and_aligned() -> None:
    net = network()
    twin = moved(net)
    found = equinorm.equivalence(net, twin, x(), batch_norm="evaluation")
    assert found.equivalent
    assert found.joined_by == ("flips of sign", "permutation", "rescaling")
    assert not equinorm.equivalence(net, twin, x()).equivalent
    aligned = equinorm.align(net, twin, x(), batch_norm="evaluation")
    assert aligned.distance_after <= 1e-12 < aligned.distance_before
    assert equinorm.deviation(aligned.model, net, x()) <= 1e-12


def test_copies_get_one_form() -> None:
    net = network()
    forms = [equinorm.canonical(m, x(), power_of_two=True, batch_norm="evaluation") for m in (net, moved(net, True))]
    assert equinorm.deviation(forms[0], net, x()) <= 1e-12
    values = (form.state_dict().values() for form in forms)
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_another_network_is_none_of_the_copies() -> None:
    net = network()
    twin = moved(net)
    with torch.no_grad():
        twin[0].weight[2, 1, 0, 0] *= 1 + 1e-6
    found = equinorm.equivalence(net, twin, x(), batch_norm="evaluation")
    assert not found.equivalent
    assert [(change.tensor, change.entries) for change in found.changes] == [("0.weight", 1)]


@pytest.mark.parametrize("call", [equinorm.equivalence, equinorm.align, equinorm.canonical_, equinorm.canonical])
def test_where_it_does_not_hold_it_is_refused(call) -> None:
    net = network()
    models = (net, copy.deepcopy(net))[: 2 if call in (equinorm.equivalence, equinorm.align) else 1]
    models[-1][4].train()
    with pytest.raises(equinorm.EquivalenceError, match=r"4 of Sequential is in training mode\. Call model\.eval\(\)"):
        call(*models, x(), batch_norm="evaluation")
    with pytest.raises(equinorm.EquivalenceError, match=r"not 'statistics'.*up to the normalization's eps"):
        call(*models, x(), batch_norm="statistics")
    with pytest.raises(equinorm.EquivalenceError, match="must be 'affine' or 'evaluation', not None"):
        call(*models, x(), batch_norm=None)
