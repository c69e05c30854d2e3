"""Weight matching: copies are found again, and what is found computes what it did."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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


def moved_copy(name):
    """A network, its permuted and rescaled copy, and inputs."""
    make, x = NETWORKS[name]
    net, twin = make(), make()
    permutations = equinorm.permutations(twin, x)
    permutations.permute_(permutations.random(torch.Generator().manual_seed(2)))
    symmetries = equinorm.symmetries(twin, x)
    symmetries.rescale_(torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    return net, twin, x


class Root(nn.Module):
    """Scales of one layer enter the next by their root: powers of two on both sides are those of four."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu().sqrt())


def test_scales_of_the_record_are_those_of_the_copy():
    torch.manual_seed(0)
    net, other, x = Root().double(), Root().double(), torch.randn(4, 5, dtype=torch.float64)
    found = equinorm.align(net, other, x, rescale=True, flip=False, power_of_two=True)
    equinorm.permutations(net, x).permute_(found.permutation)
    equinorm.symmetries(net, x).rescale_(found.log_scales)
    assert found.log_scales.any()
    assert all(torch.equal(one, same) for one, same in zip(net.parameters(), found.model.parameters(), strict=True))


def test_half_precision_takes_powers_of_two():
    net, twin, x = relu_network().bfloat16(), relu_network().bfloat16(), torch.randn(4, 5).bfloat16()
    permutations, symmetries = equinorm.permutations(twin, x), equinorm.symmetries(twin, x)
    permutations.permute_(permutations.random(torch.Generator().manual_seed(2)))
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64) * 2, power_of_two=True)
    with pytest.raises(equinorm.RescaleError, match="powers of two"):
        equinorm.align(twin, net, x, rescale=True)
    assert not equinorm.align(twin, net, x).log_scales.any()
    with pytest.raises(equinorm.EquivalenceError, match="rescale must be"):
        equinorm.align(twin, net, x, rescale="no")
    found = equinorm.align(twin, net, x, power_of_two=True)
    assert found.distance_before > 0.5
    assert found.distance_after == 0.0
    assert equinorm.equivalence(twin, net, x).equivalent
    with torch.no_grad():
        twin[0].weight[0, 0] *= 1.25
    assert not equinorm.equivalence(twin, net, x).equivalent


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_with_noise_are_found_again(name):
    net, twin, x = moved_copy(name)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 1e-3 * parameter.abs().mean() * torch.randn_like(parameter)
    found = equinorm.align(net, twin, x)
    assert found.distance_before > 0.5
    assert found.distance_after < 0.05
    assert equinorm.deviation(found.model, net, x) <= 1e-12


class Residual(nn.Module):
    """A stem, two residual blocks with batch normalization, a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.end = nn.Conv2d(3, 24, 3, bias=False), nn.Linear(24, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 1))
            for _ in range(2)
        )

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.end(x.mean((2, 3)))


TUNED = {
    "deep": (lambda: nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(40, 40), nn.ReLU())), nn.Linear(40, 5)), (4, 40)),
    "odd": (lambda: nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 5)), (4, 20)),
    "encoder": (lambda: nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), (2, 5, 32)),
    "residual": (Residual, (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", TUNED)
def test_a_copy_that_was_trained_further_is_matched_in_whatever_order_it_comes(name):
    torch.manual_seed(0)
    make, shape = TUNED[name]
    net, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.2 * parameter.square().mean().sqrt() * torch.randn_like(parameter)
    away = equinorm.align(net, tuned, x, rescale=False, flip=False, sweeps=1).distance_before
    permutations, signs = equinorm.permutations(net, x), equinorm.signs(net, x)
    order = permutations.random(torch.Generator().manual_seed(1))
    permutations.permute_(order)
    signs.flip_(signs.random(torch.Generator().manual_seed(2)))
    found = equinorm.align(net, tuned, x, rescale=False)
    assert found.distance_before > 3 * away
    assert found.distance_after == pytest.approx(away, rel=1e-3)


def test_channels_are_settled_from_the_ends_before_all_weights_are_matched():
    """Six weights reach a channel from the ends, sixty are in an order that is not known yet: matched at once, they outvote."""
    torch.manual_seed(1)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
    net, x = nn.Sequential(nn.Linear(3, 16), *layers, nn.Linear(16, 3)).eval(), torch.randn(1, 3, 3)
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.5 * parameter.abs().mean() * torch.randn_like(parameter)
    permutations = equinorm.permutations(tuned, x)
    permutations.permute_(permutations.random(torch.Generator().manual_seed(1)))
    assert equinorm.align(net, tuned, x, rescale=False).distance_after < 0.45


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_come_nearer(name):
    """With scales, without, and by what comes nearer, which is what is asked for if nothing is."""
    make, x = NETWORKS[name]
    net, other = make(0), make(1)
    before = copy.deepcopy(net.state_dict())
    distances = []
    for rescale in (True, False, None):
        found = equinorm.align(net, other, x, rescale=rescale)
        assert found.distance_after < found.distance_before
        assert equinorm.deviation(found.model, net, x) <= 1e-12
        distances.append(found.distance_after)
    assert distances[2] == min(distances)
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


def on_a_subspace(make: Callable[[int], nn.Module], x: Tensor) -> tuple[nn.Module, nn.Module, Tensor, dict[str, Tensor]]:
    """A network, a permuted copy whose weights on inputs that data never use are other ones, data, and the permutation."""
    net, twin = make(0), make(0)
    permutations = equinorm.permutations(twin, x)
    order = permutations.random(torch.Generator().manual_seed(2))
    permutations.permute_(order)
    unused = torch.zeros(x.shape[1] if x.dim() > 3 else x.shape[-1], dtype=torch.bool)
    unused[len(unused) // 2 :] = True
    with torch.no_grad():
        first = twin[0].weight
        first[:, unused] = 30 * torch.randn(first[:, unused].shape, generator=torch.Generator().manual_seed(3)).double()
    data = torch.randn((64, *x.shape[1:]), generator=torch.Generator().manual_seed(4)).double()
    data[:, unused] = 0
    return net, twin, data, {f.name: moved for f, moved in zip(permutations.families, order, strict=True)}


def image_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(4, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 8, 3, groups=2), nn.GELU()]
    return (
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 2))
        .double()
        .eval()
    )


@pytest.mark.parametrize("make", [relu_network, image_network])
def test_activations_find_what_weights_do_not_show(make):
    x = torch.randn(64, 5).double() if make is relu_network else torch.randn(64, 4, 6, 6).double()
    net, twin, data, order = on_a_subspace(make, x)
    by_weights = equinorm.align(net, twin, data, flip=False)
    found = equinorm.align(net, twin, data, data=[data, data.flip(0)], flip=False)
    assert any(not torch.equal(by_weights.permutation[name], order[name]) for name in order)
    for name in order:
        assert torch.equal(found.permutation[name], order[name]), name
    assert equinorm.deviation(found.model, net, x) <= 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_are_found_by_activations(name):
    net, twin, x = moved_copy(name)
    signs = equinorm.signs(twin, x)
    signs.flip_(signs.random(torch.Generator().manual_seed(4)))
    found = equinorm.align(net, twin, x, data=[torch.randn_like(x) for _ in range(40)])
    assert found.distance_after <= 1e-6
    assert equinorm.deviation(found.model, net, x) <= 1e-12


class Adapted(nn.Module):
    """A linear layer plus a product of two weights, whose rank no activation shows."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.up, self.down = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(nn.functional.linear(x, self.base.weight + self.up @ self.down, self.base.bias)))


def test_what_no_activation_shows_is_matched_by_weights():
    torch.manual_seed(0)
    net, x = Adapted().double(), torch.randn(64, 5).double()
    twin = copy.deepcopy(net)
    permutations = equinorm.permutations(twin, x)
    assert permutations.num_families == 2
    permutations.permute_(permutations.random(torch.Generator().manual_seed(1)))
    assert equinorm.align(net, twin, x, data=[x], rescale=False).distance_after == 0.0


def test_data_that_fit_no_graph_are_refused():
    net, x = relu_network(), NETWORKS["relu"][1]
    for data, words in {
        "none": ([], "no batch"),
        "others": ([x, x[:2]], r"batch 1 of data .* Give a batch as args too\."),
        "labels": ([(x, x[:, 0])], r"Leave out labels: \[x for x, _ in data\]\."),
        "tensor": (x, r"For one: \[x\]"),
        "nan": ([x * torch.nan], "NaN or inf"),
    }.values():
        with pytest.raises(equinorm.EquivalenceError, match=words):
            equinorm.align(net, relu_network(1), x, data=data)
    with pytest.raises(equinorm.EquivalenceError, match="opaque modules"):
        equinorm.align(net, relu_network(1), x, data=[x], opaque="2")


class Tied(nn.Module):
    """An autoencoder whose last weights are its first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Linear(6, 9), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.first(x)), self.first.weight.T, self.bias)


@pytest.mark.parametrize("seed", range(8))
def test_a_network_that_was_trained_far_comes_no_farther(seed):
    """Matched from the network's ends inwards, five of these end farther away than they stood."""
    torch.manual_seed(seed)
    net, x = Tied().double(), torch.randn(4, 6).double()
    far = copy.deepcopy(net)
    with torch.no_grad():
        for weight in far.parameters():
            weight += weight.std() * torch.randn_like(weight)
    found = equinorm.align(net, far, x)
    assert found.distance_after <= found.distance_before
    assert equinorm.deviation(found.model, net, x) < 1e-12


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 4, 5])
def test_scales_take_no_network_farther(seed, power_of_two):
    """Brought to the scales of the second, all of these end farther away with powers of two, and two of them without."""
    torch.manual_seed(seed)
    net, x = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4)).double(), torch.randn(4, 6)
    torch.manual_seed(seed + 100)
    far = copy.deepcopy(net)
    with torch.no_grad():
        for weight in far.parameters():
            weight += weight.std() * torch.randn_like(weight)
    found = equinorm.align(net, far, x.double(), rescale=True, power_of_two=power_of_two)
    assert found.distance_after <= found.distance_before
    assert equinorm.deviation(found.model, net, x.double()) < 1e-12
