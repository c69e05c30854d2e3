"""Flips of sign: outputs stay bitwise or to rounding, what must not flip does not, and what should is counted."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flipped(net: nn.Module, args: Tensor) -> tuple[nn.Module, equinorm.Signs]:
    twin = copy.deepcopy(net)
    signs = equinorm.signs(twin, args)
    signs.flip_(-torch.ones(signs.num_free, dtype=torch.int64))
    return twin, signs


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.before, self.function, self.after = nn.Linear(3, 4), function, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


FUNCTIONS = {
    "tanh": (torch.tanh, 4),
    "erf": (torch.special.erf, 4),
    "sinc": (torch.special.sinc, 4),
    "nothing": (lambda y: y, 4),
    "cube": (lambda y: y**3, 4),
    "bounds": (lambda y: y.clamp(-0.5, 0.5), 4),
    "absolute": (lambda y: y.abs(), 4),
    "normed": (lambda y: nn.functional.rms_norm(y, (4,)), 4),
    "layer norm": (lambda y: nn.functional.layer_norm(y, (4,)), 1),
    "relu": (torch.relu, 0),
    "gelu": (nn.functional.gelu, 0),
    "one bound": (lambda y: y.clamp(-0.5, 1.0), 0),
    "root": (lambda y: y.abs().sqrt() + y, 0),
    "largest": (lambda y: y + y.max(-1, keepdim=True).values, 0),
    "infinity": (lambda y: torch.tanh(y.masked_fill(torch.tensor([True, False, False, False]), -torch.inf)), 0),
    "padded": (lambda y: torch.tanh(nn.functional.pad(y[:, :3], (0, 1), value=-torch.inf)), 1),  # the one that is not read
    "shifted": (lambda y: torch.tanh(y + 1), 0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_layers(name):
    function, free = FUNCTIONS[name]
    torch.manual_seed(0)
    net, args = Between(function).double(), x(5, 3)
    twin, signs = flipped(net, args)
    assert equinorm.deviation(twin, net, args) <= 1e-15
    assert signs.num_free == free


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)


def images() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, 2))


def weight_norm() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    return nn.Sequential(normed, nn.Tanh(), nn.Linear(4, 2))


NETWORKS = {
    "attention": (attention, x(2, 5, 8), 17),  # queries with keys 8, values 8, one for what a layer norm gives
    "images": (images, x(4, 3, 8, 8), 14),  # 4 in front of the first norm, 5 in front of the second, 5 behind it
    "weight norm": (weight_norm, x(5, 3), 8),  # gains with the next layer; gains with directions
    "lstm": (lambda: nn.LSTM(3, 4, proj_size=2), x(5, 2, 3), 0),
}


@pytest.mark.parametrize(("name", "is_training"), [*((name, False) for name in NETWORKS), ("images", True)])
def test_networks(name, is_training):
    make, args, free = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double().train(is_training)
    twin, signs = flipped(net, args)
    assert equinorm.deviation(twin, net, args) <= 1e-14
    assert signs.num_free == free


EXPERTS = {
    "tanh": (torch.tanh, 12),
    "cube": (lambda y: y**3, 12),
    "over places": (lambda y: torch.tanh(y - y.mean(0)), 4),
    "relu": (torch.relu, 0),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_signs_inside_of_experts_are_their_own(name):
    """Of three experts with four channels each, as long as rows of one expert do not meet those of another."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = (nn.Parameter(torch.randn(shape).double()) for shape in ((3, 4, 5), (3, 2, 4)))

        def forward(self, x: Tensor) -> Tensor:
            index = x[:, :3].argmax(-1)
            inside = function((self.up[index] @ x[:, :, None]).squeeze(-1))
            return (self.down[index] @ inside[:, :, None]).squeeze(-1)

    function, expected = EXPERTS[name]
    net, inputs = Chosen(), x(7, 5)
    twin, signs = flipped(net, inputs)
    assert signs.num_free == expected
    assert torch.equal(net(inputs), twin(inputs))
    signs.flip_(signs.random(torch.Generator().manual_seed(0)))
    assert (net(inputs) - twin(inputs)).abs().max() <= 1e-13


def test_training_goes_on_as_it_would_have():
    torch.manual_seed(0)
    net, args = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), x(5, 3)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1) for model in (net, twin)]
    for step in range(4):
        for model, optimizer in zip((net, twin), optimizers, strict=True):
            optimizer.zero_grad()
            model(args).square().mean().backward()
            optimizer.step()
        if step == 1:
            equinorm.signs(twin, args).flip_(torch.tensor([1, -1, -1, 1]), optimizers[1])
    assert equinorm.deviation(twin, net, args) <= 1e-12


def test_signs_that_are_none_are_refused():
    net, args = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    signs = equinorm.signs(net, args)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(equinorm.RescaleError, match=r"shape \(4,\)"):
        signs.flip_(torch.ones(3))
    with pytest.raises(equinorm.RescaleError, match="−1 and 1"):
        signs.flip_(torch.tensor([1, 1, 2, 1]))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert str(signs) == "Sequential: 4 channels in 1 family may change their sign"


def test_a_wrong_flip_changes_the_outputs():
    net, args = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), x(5, 3)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[0].weight[1] *= -1
    assert equinorm.deviation(twin, net, args) > 1e-3


class OnePlus(nn.Module):
    """A gain that is written 1 + w."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(0.1 * x(4))

    def forward(self, values: Tensor) -> Tensor:
        return values * (1 + self.gain)


@pytest.mark.parametrize("place", range(1, 7))
def test_a_failed_write_puts_everything_back(place, monkeypatch):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), OnePlus(), nn.Tanh(), nn.Linear(4, 2)).double()
    net(x(5, 3)).sum().backward()
    signs = equinorm.signs(net, x(5, 3))
    assert any(flip.offset for flip in signs.flips)
    before = [*copy.deepcopy(net.state_dict()).values(), *(p.grad.clone() for p in net.parameters())]
    copy_, calls = Tensor.copy_, []

    def failing(self: Tensor, *args: object) -> Tensor:
        calls.append(self)
        if len(calls) == place:
            copy_(self.view(-1)[:1], torch.full((1,), torch.nan, dtype=self.dtype))
            raise RuntimeError("no more")
        return copy_(self, *args)

    monkeypatch.setattr(Tensor, "copy_", failing)
    with pytest.raises(equinorm.RescaleError, match=r"no more\. All is as it was before"):
        signs.flip_(-torch.ones(signs.num_free))
    monkeypatch.undo()
    after = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    assert all(torch.equal(value, was) for value, was in zip(after, before, strict=True))


def test_equivalence_and_alignment_find_flips():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.Linear(7, 3)]
    net, args, generator = nn.Sequential(*layers).double(), x(4, 5), torch.Generator().manual_seed(2)
    twin = copy.deepcopy(net)
    for group in (equinorm.permutations(twin, args), equinorm.signs(twin, args)):
        (group.permute_ if isinstance(group, equinorm.Permutations) else group.flip_)(group.random(generator))
    scales = equinorm.symmetries(twin, args)
    scales.rescale_(torch.randn(scales.num_free, generator=generator, dtype=torch.float64))
    found = equinorm.equivalence(net, twin, args)
    assert found.joined_by == ("flips of sign", "permutation", "rescaling")
    assert "equivalent by flips of sign, permutation and rescaling" in str(found)
    moved = copy.deepcopy(net)
    equinorm.signs(moved, args).flip_(found.signs)
    equinorm.permutations(moved, args).permute_(found.permutation)
    equinorm.symmetries(moved, args).rescale_(found.log_scales)
    for a, b in zip(moved.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)
    pytest.importorskip("scipy")
    with torch.no_grad():
        twin[0].weight += 1e-3
    aligned = equinorm.align(net, twin, args)
    assert aligned.distance_after < 0.01
    assert not equinorm.equivalence(net, twin, args).equivalent


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's matrix, transposed: flips and permutations, no scales."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.c, self.d = (nn.Parameter(torch.randn(shape)) for shape in ((6, 4), 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, self.v, self.c)), self.v.t(), self.d)


class Kernel(Tied):
    """Every input with every other, as q·k of one projection."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.v, self.c)
        return hidden @ hidden.mT + self.d


class Factors(Tied):
    """A product of three channels of one layer: flips of two leave it, a flip of one does not."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.v, self.c)[..., :3].prod(-1, keepdim=True) + self.d


@pytest.mark.parametrize(("kind", "free"), [(Tied, 6), (Kernel, 6), (Factors, 5)])
def test_a_sign_that_counts_twice_is_free(kind, free):
    torch.manual_seed(0)
    net, args = kind().double(), x(4, 4)
    twin, signs = copy.deepcopy(net), equinorm.signs(net, args)
    assert signs.num_free == free
    signs.flip_(signs.random(torch.Generator().manual_seed(0)))
    permutations = equinorm.permutations(net, args)
    permutations.permute_(permutations.random(torch.Generator().manual_seed(0)))
    assert equinorm.deviation(net, twin, args) <= 1e-14
    assert not torch.equal(net.v, twin.v)
    assert equinorm.equivalence(net, twin, args).equivalent
    if kind is not Factors:  # whose forms depend on the order of channels
        for one, other in zip(*(equinorm.canonical(each, args).parameters() for each in (net, twin)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_keyword_inputs_that_are_no_dict_are_refused():
    with pytest.raises(equinorm.EquinormError, match="kwargs must be a dict of keyword inputs, not list"):
        equinorm.signs(nn.Linear(2, 2), torch.zeros(1, 2), [1])  # pyright: ignore[reportArgumentType]


def test_tensors_that_were_tied_and_no_longer_are_are_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    net[2].bias = net[0].bias
    signs = equinorm.signs(net, x(5, 3))
    assert signs.num_free
    net[2].bias = nn.Parameter(net[0].bias.detach().clone())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(equinorm.RescaleError, match="shared memory when the model was analysed"):
        signs.flip_(-torch.ones(signs.num_free, dtype=torch.int64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_what_cannot_be_written_is_refused_and_axes_of_one_channel_are_not():
    net = Between(torch.tanh).double()
    signs = equinorm.signs(net, x(5, 3))
    net.before.weight = nn.Parameter(torch.ones(4, 1, dtype=torch.float64).expand(4, 3))
    with pytest.raises(equinorm.RescaleError, match=r"cannot flip before\.weight in place: it is an inference or an expanded"):
        signs.flip_(-torch.ones(4, dtype=torch.int64))
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].weight = nn.Parameter(torch.rand(4, dtype=torch.float64).as_strided((4, 1), (1, 0)))
    signs, before = equinorm.signs(net, x(5, 1)), net[0].weight.detach().clone()
    signs.flip_(-torch.ones(4, dtype=torch.int64))
    assert torch.equal(net[0].weight, -before)
