"""Equivalence under permutations and rescalings together."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm.joining.fitting import medians


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


def tanh_network() -> nn.Sequential:
    net = relu_network()
    net[1] = net[3] = nn.Tanh()
    return net


class Gained(nn.Sequential):
    """A network with one number for a gain."""

    def __init__(self) -> None:
        super().__init__(*relu_network())
        self.gain = nn.Parameter(torch.tensor(1.5).double())

    def forward(self, x: Tensor) -> Tensor:
        return self[4]((self[2](self[1](self[0](x))) * self.gain).relu())


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True).double().eval()


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "relu": (relu_network, x(4, 5)),
    "images": (image_network, x(4, 3, 8, 8)),
    "encoder": (encoder, x(2, 5, 8)),
    "tanh": (tanh_network, x(4, 5)),
    "gained": (Gained, x(4, 5)),
}


def moved(net: nn.Module, args: Tensor, std: float = 1.0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy whose signs are flipped, then permuted, then rescaled, and the permutation."""
    twin = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(7)
    if any(isinstance(part, nn.Tanh) for part in net.modules()):
        signs = equinorm.signs(twin, args)
        signs.flip_(signs.random(generator))
    permutations = equinorm.permutations(twin, args)
    order = permutations.random(generator)
    permutations.permute_(order)
    symmetries = equinorm.symmetries(twin, args)
    symmetries.rescale_(std * torch.randn(symmetries.num_free, generator=generator, dtype=torch.float64))
    return twin, dict(zip([family.name for family in permutations.families], order, strict=True))


@pytest.mark.parametrize("name", ["relu", "images", "encoder"])
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


@pytest.mark.parametrize(
    ("name", "tensor", "index", "factor"),
    [
        ("relu", "2.weight", (3, 4), 1.001),
        ("relu", "0.weight", (7, 1), -1.0),
        ("relu", "4.weight", (0, 2), 0.0),
        ("relu", "2.bias", (5,), 30.0),
        ("images", "1.weight", (2,), 1.01),
        ("tanh", "2.weight", (8, 11), 5.0),
        ("gained", "gain", (), 3.0),
    ],
)
def test_one_changed_number_is_named(name, tensor, index, factor):
    make, args = NETWORKS[name]
    net = make()
    twin, order = moved(net, args)
    before = float(twin.get_parameter(tensor).detach()[index])
    twin.get_parameter(tensor).data[index] *= factor
    found = equinorm.equivalence(net, twin, args)
    assert not found.equivalent
    (change,) = found.changes
    assert (change.tensor, change.index, change.entries) == (tensor, index, 1)
    assert (change.first, change.second) == pytest.approx((before, before * factor), rel=1e-9)
    assert found.different == ((tensor, found.difference),)
    assert all(torch.equal(found.permutation[family], order[family]) for family in found.permutation)
    assert f"{change.entry} went from {change.first:.4g} to {change.second:.4g}" in str(found)
    assert change.entry == (f"{tensor}[{', '.join(map(str, index))}]" if index else tensor)
    assert f"All other {found.size - 1} of {found.size} entries agree." in found.notes


def test_what_is_left_is_what_the_reported_moves_leave():
    net, args = relu_network(), x(4, 5)
    twin, _ = moved(net, args)
    with torch.no_grad():
        twin[0].bias.copy_(torch.randn(12, generator=torch.Generator().manual_seed(2)))
    found = equinorm.equivalence(net, twin, args)
    equinorm.permutations(net, args).permute_(found.permutation)
    equinorm.symmetries(net, args).rescale_(found.log_scales)
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=0) == (name != "0.bias")
    assert [(change.tensor, change.entries) for change in found.changes] == [("0.bias", 12)]


def test_swapped_inputs_are_two_columns():
    net, args = relu_network(), x(4, 5)
    twin, _ = moved(net, args)
    with torch.no_grad():
        twin[0].weight[:, [0, 1]] = twin[0].weight[:, [1, 0]]
    found = equinorm.equivalence(net, twin, args)
    assert not found.equivalent
    (change,) = found.changes
    assert (change.tensor, change.entries, change.places) == ("0.weight", 24, (None, (0, 1)))
    assert "24 of 60 entries, at 0, 1 of axis 1" in str(found)


def test_a_network_trained_further_differs_everywhere():
    net, args = relu_network(), x(4, 5)
    twin, _ = moved(net, args)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    found = equinorm.equivalence(net, twin, args)
    assert not found.equivalent
    assert len(found.changes) == 6
    assert [change.difference for change in found.changes] == sorted((d for _, d in found.different), reverse=True)
    assert found.notes[-1].endswith("differ, in 6 tensors, as after training; the most changed tensors come first.")


def test_channels_that_are_copies_of_each_other_match_in_any_order():
    net, args = relu_network(), x(4, 5)
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[5] = tensor[2]
        net[2].weight[:, 5] = net[2].weight[:, 2]
    assert equinorm.equivalence(net, moved(net, args)[0], args).equivalent


def test_dead_channels_of_permuted_copies_match_too():
    torch.manual_seed(0)
    net, args = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 4)).double(), x(4, 6)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((3 * parameter).round())  # most are dead, and some differ by the signs of what they hand on
        net[4].weight[:, :10] = 0.0
        net[4].weight[1:] = 0.0
        net[0].bias.fill_(1.0)
    assert equinorm.equivalence(net, moved(net, args)[0], args).equivalent


def test_what_holds_nan_is_named_with_its_network():
    net, args = relu_network(), x(4, 5)
    twin = copy.deepcopy(net)
    twin[2].weight.data[1, 1] = torch.nan
    with pytest.raises(equinorm.EquivalenceError, match=r"the second network .*2\.weight: it holds NaN"):
        equinorm.equivalence(net, twin, args)


def test_medians_reach_the_middle_of_a_deep_network():
    """From no first guess: a class is told once those around it are settled, and three turns by all weights are too few."""
    torch.manual_seed(0)
    layers = [layer for _ in range(11) for layer in (nn.Linear(6, 6, bias=False), nn.ReLU())]
    net, x = nn.Sequential(*layers, nn.Linear(6, 6, bias=False)).double(), torch.randn(2, 6, dtype=torch.float64)
    symmetries = equinorm.symmetries(net, x)
    before, z = copy.deepcopy(net.state_dict()), torch.randn(symmetries.num_free, dtype=torch.float64)
    symmetries.rescale_(z)
    found = medians(symmetries.scalings, before, net.state_dict(), torch.zeros_like(z))
    torch.testing.assert_close(found, z)


class RoundsInside(nn.Module):
    """Weights in float64, of which the hidden values are rounded to float32, and nearly cancel then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 12).double(), nn.Linear(12, 3).double()
        with torch.no_grad():
            self.up.bias += 100
            self.down.weight -= self.down.weight.mean(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().float().double())


def test_outputs_may_differ_by_what_the_network_itself_rounds():
    net = RoundsInside()
    twin, args = copy.deepcopy(net), x(4, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        twin.up.weight.copy_(3 * net.up.weight[order])
        twin.up.bias.copy_(3 * net.up.bias[order])
        twin.down.weight.copy_(net.down.weight[:, order] / 3)
    found = equinorm.equivalence(net, twin, args)
    assert found.deviation > 1e-7
    assert found.equivalent
    with torch.no_grad():
        twin.up.weight[3, 2] *= 1 + 1e-6
    assert not equinorm.equivalence(net, twin, args).equivalent


class Listed(nn.Module):
    """A network whose modules are made in an order of choice, and run in one."""

    def __init__(self, order: str, is_swapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = {"first": nn.Linear(5, 8), "norm": nn.BatchNorm1d(8), "second": nn.Linear(8, 8), "last": nn.Linear(8, 3)}
        for name in order.split():
            setattr(self, name, made[name])
        self.is_swapped = is_swapped
        self.double().eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (y, x) if self.is_swapped else (x, y)
        return self.last(torch.tanh(self.second(torch.relu(self.norm(self.first(x)))))) + y.sum()


def test_modules_may_be_listed_in_another_order() -> None:
    args = x(4, 5), x(4, 5).square()
    net, twin = Listed("first norm second last"), Listed("last norm second first")
    for group in (equinorm.permutations(twin, args), equinorm.symmetries(twin, args)):
        member = torch.randn(group.num_free).double() if isinstance(group, equinorm.Symmetries) else group.random()
        (group.rescale_ if isinstance(group, equinorm.Symmetries) else group.permute_)(member)
    found = equinorm.equivalence(net, twin, args)
    assert found.equivalent
    assert equinorm.align(net, twin, args).distance_after <= 1e-12
    with torch.no_grad():
        twin.second.weight[2, 3] *= 1 + 1e-6
    assert [change.tensor for change in equinorm.equivalence(net, twin, args).changes] == ["second.weight"]
    with pytest.raises(equinorm.EquivalenceError, match="run different operations"):
        equinorm.equivalence(net, Listed("last norm second first", is_swapped=True), args)
