"""The canonical form: equal networks give equal weights, others do not, and outputs stay."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import equinorm


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mixed() -> nn.Module:
    layers = [nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double()


def images() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True).double().eval()


class Tables(nn.Module):
    """Tokens and places from tables of the model's own, one read by indices, one in part."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.values, self.queries, self.keys = nn.Linear(8, 3), *(nn.Linear(8, 8) for _ in range(3))
        self.tokens, self.places = nn.Parameter(torch.randn(11, 8)), nn.Parameter(torch.randn(9, 8))

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens[index] + self.places[: index.shape[1]]
        scores = self.queries(x) @ self.keys(x).transpose(-1, -2)
        return self.head(scores.softmax(-1) @ self.values(x) + x)


def untold() -> nn.Module:
    """Scales that no norm tells: of a dead neuron, and of weights that are normalized."""
    layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
    nn.utils.parametrizations.weight_norm(layers[2])
    with torch.no_grad():
        layers[4].weight[:, 2] = 0
    return nn.Sequential(*layers).double()


class Experts(nn.Module):
    """The best of five experts, as in a mixture: rows of data choose the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.router = nn.Linear(5, 6), nn.Linear(6, 5)
        self.up, self.down = (nn.Parameter(torch.randn(shape)) for shape in ((5, 8, 6), (5, 6, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).tanh()
        weights, index = self.router(x).softmax(-1).max(-1)
        gate, value = (self.up[index] @ x[:, :, None]).chunk(2, 1)
        return (self.down[index] @ (nn.functional.silu(gate) * value)).squeeze(-1) * weights[:, None]


def experts() -> nn.Module:
    return Experts().double()


class Multiplied(nn.Module):
    """Tanh channels that are all multiplied: the sign of one follows from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.middle, self.after = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.before(x))))
        return x.prod(-1, keepdim=True) + self.after(x)


def multiplied() -> nn.Module:
    return Multiplied().double()


class Masked(nn.Module):
    """A mask that is a parameter, in front of a Tanh: flips of its rows and columns are told but for one of all."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.middle, self.after = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.mask = nn.Parameter((torch.rand(6, 6) > 0.4).float())

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(torch.tanh(self.before(x)), self.middle.weight * self.mask, self.middle.bias)
        return self.after(torch.tanh(x))


def masked() -> nn.Module:
    return Masked().double()


NETWORKS = {
    "multiplied": (multiplied, x(4, 5)),
    "masked": (masked, x(4, 5)),
    "experts": (experts, x(9, 5)),
    "mixed": (mixed, x(4, 5)),
    "images": (images, x(4, 3, 8, 8)),
    "encoder": (encoder, x(2, 5, 8)),
    "untold": (untold, x(4, 5)),
}


def moved(net: nn.Module, args: Tensor, in_powers_of_two: bool, seed: int = 7) -> nn.Module:
    """A copy that was permuted, flipped and rescaled."""
    twin, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    permutations, signs, scales = (find(twin, args) for find in (equinorm.permutations, equinorm.signs, equinorm.symmetries))
    permutations.permute_(permutations.random(generator))
    signs.flip_(signs.random(generator))
    z = torch.randn(scales.num_free, generator=generator, dtype=torch.float64)
    scales.rescale_(2 * z, power_of_two=in_powers_of_two)
    return twin


@pytest.mark.parametrize(
    ("name", "in_powers_of_two"),
    [
        ("experts", False),
        ("experts", True),
        ("mixed", False),
        ("mixed", True),
        ("images", True),
        ("encoder", False),
        ("untold", False),
        ("untold", True),
    ],
)
def test_copies_get_the_same_form(name, in_powers_of_two):
    make, args = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    before = copy.deepcopy(net.state_dict())
    forms = [equinorm.canonical(m, args, power_of_two=in_powers_of_two) for m in (net, moved(net, args, in_powers_of_two))]
    assert equinorm.deviation(forms[0], net, args) <= 1e-12
    for a, b in zip(*(form.state_dict().values() for form in forms), strict=True):
        if in_powers_of_two:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_all_copies_of_a_network_with_tables_get_one_form():
    torch.manual_seed(0)
    net, index = Tables().double(), torch.randint(0, 11, (2, 5))
    form = equinorm.canonical(net, index, power_of_two=True)
    for seed in range(6):
        other = equinorm.canonical(moved(net, index, True, seed), index, power_of_two=True)
        assert all(torch.equal(a, b) for a, b in zip(form.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("name", "in_powers_of_two"), [("multiplied", True), ("masked", False)])
def test_signs_that_follow_from_others_are_chosen_alike_in_all_copies(name, in_powers_of_two):
    make, args = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    form = equinorm.canonical(net, args, power_of_two=in_powers_of_two)
    assert equinorm.deviation(form, net, args) <= 1e-12
    for seed in range(4):
        other = equinorm.canonical(moved(net, args, in_powers_of_two, seed), args, power_of_two=in_powers_of_two)
        for a, b in zip(form.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0 if in_powers_of_two else 1e-9, atol=0 if in_powers_of_two else 1e-9)


class Gated(nn.Module):
    """Weights times parameters of their shape, by ReLU and at the end: their scales tell one another."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.middle, self.after = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.mask, self.gate = nn.Parameter(torch.rand(8, 6) + 0.1), nn.Parameter(torch.rand(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.before(x).relu(), self.middle.weight * self.mask, self.middle.bias)
        return nn.functional.linear(x.relu(), self.after.weight * self.gate, self.after.bias)


@pytest.mark.parametrize("make", [masked, lambda: Gated().double(), Gated])
def test_powers_of_two_do_not_depend_on_the_order_of_channels_that_a_copy_has(make):
    torch.manual_seed(0)
    net = make()
    args = x(4, 5).to(next(net.parameters()).dtype)
    form = equinorm.canonical(net, args, power_of_two=True)
    for seed in range(4):
        other = moved(net, args, True, seed)
        found = equinorm.canonical_(other, args, power_of_two=True)
        twos = found.log_scales / math.log(2)
        assert float((twos - twos.round()).abs().max()) <= 1e-13
        assert all(torch.equal(a, b) for a, b in zip(form.parameters(), other.parameters(), strict=True))
    assert equinorm.deviation(form, net, args) <= (1e-12 if args.dtype == torch.float64 else 1e-6)


def test_alignment_settles_what_no_norm_tells():
    torch.manual_seed(0)
    net, args = untold(), x(4, 5)
    found = equinorm.align(moved(net, args, False), net, args)
    assert found.distance_after <= 1e-12 < found.distance_before


def test_the_form_of_the_form_is_itself():
    torch.manual_seed(0)
    net, args = NETWORKS["mixed"][0](), NETWORKS["mixed"][1]
    found = equinorm.canonical_(net, args)
    assert len(found.permutation) == 3
    again = equinorm.canonical_(net, args)
    assert again.permutation == {}
    assert again.num_flipped == 0
    assert float(again.log_scales.abs().max()) <= 1e-9


def test_other_networks_get_other_forms():
    make, args = NETWORKS["mixed"]
    torch.manual_seed(0)
    net = make()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[2].weight[3, 4] *= 1.001
    forms = [equinorm.canonical(model, args).state_dict() for model in (net, twin)]
    assert max(float((a - b).abs().max()) for a, b in zip(*(form.values() for form in forms), strict=True)) > 1e-6


def test_channels_that_are_copies_are_counted_and_tie():
    torch.manual_seed(0)
    net, args = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double(), x(4, 5)
    with torch.no_grad():
        net[0].weight[5], net[0].bias[5], net[2].weight[:, 5] = net[0].weight[2], net[0].bias[2], net[2].weight[:, 2]
    forms = [copy.deepcopy(net), moved(net, args, True)]
    found = [equinorm.canonical_(form, args, power_of_two=True) for form in forms]
    assert [one.ties for one in found] == [1, 1]
    assert "1 channel that weights do not tell from others" in str(found[0])
    assert all(torch.equal(a, b) for a, b in zip(forms[0].parameters(), forms[1].parameters(), strict=True))


def test_scales_halfway_between_powers_of_two_are_rounded_alike():
    torch.manual_seed(0)
    net, args = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 16, bias=False)).double(), x(4, 4)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(weight.sign())
    twin = moved(net, args, True)
    found = [equinorm.canonical_(model, args, power_of_two=True) for model in (net, twin)]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    twos = torch.cat([one.log_scales for one in found]) / math.log(2)
    torch.testing.assert_close(twos, twos.round())


def test_weights_that_are_no_numbers_are_refused():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(equinorm.EquivalenceError, match=r"0\.weight of Sequential holds NaN or inf"):
        equinorm.canonical_(net, torch.randn(2, 5))
    assert all(torch.equal(value, before[key]) or value.isnan().any() for key, value in net.state_dict().items())


def test_submodules_that_are_not_looked_into_are_named_or_given():
    net = mixed()
    named, *given = [equinorm.canonical(net, x(2, 5), opaque=hidden) for hidden in ("2", net[2], [net[2]])]
    assert torch.equal(named[2].weight, net[2].weight)
    assert not torch.equal(named[4].weight, net[4].weight)
    for other in given:
        assert all(map(torch.equal, other.parameters(), named.parameters()))


class Stacked(nn.Module):
    """Layers that share a table, whose results are stacked in front of one more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)
        self.table = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden, found = self.first(x).relu(), []
        for weight in self.table:
            hidden = nn.functional.linear(hidden, weight).relu()
            found.append(hidden)
        return self.last(torch.stack(found, 1)).sum(1)


def test_scales_that_are_found_do_not_depend_on_the_order_of_channels():
    torch.manual_seed(0)
    net, inputs = Stacked().double(), torch.randn(2, 4, dtype=torch.float64)
    copied = copy.deepcopy(net)
    permutations = equinorm.permutations(copied, (inputs,))
    permutations.permute_(permutations.random(torch.Generator().manual_seed(3)))
    equinorm.canonical_(net, (inputs,))
    equinorm.canonical_(copied, (inputs,))
    for one, other in zip(net.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
