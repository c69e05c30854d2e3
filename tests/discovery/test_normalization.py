"""Batch normalization read exactly and with its statistics, and gains written 1 + w."""

import copy
import math

import pytest
import torch
from exactness import X, check
from oracle import verdict
from torch import Tensor, nn

import equinorm


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_read_exactly(training):
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3)).double().train(training)
    )
    symmetries = check(net, (torch.randn(4, 3, 9, 9).double(),), 5)
    moving = [s.name for s in symmetries.scalings if s.factors]
    assert moving == ["1.weight", "1.bias", "3.weight"]


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_read_with_its_statistics(training):
    """Convolution, γ, β, mean and (squared) variance move together; the outputs only up to eps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-9), nn.ReLU(), nn.Conv2d(5, 2, 3)).double().train(training)
    net[1].running_mean.normal_()
    args = (torch.randn(4, 3, 9, 9).double(),)
    symmetries = equinorm.symmetries(net, args, batch_norm="statistics")
    assert symmetries.num_free == 5
    exponents = {s.name: [e for e, _ in s.factors] for s in symmetries.scalings}
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight", "3.bias"]
    assert [exponents[name] for name in names] == [[1.0], [1.0], [1.0], [1.0], [1.0], [2.0], [-1.0], []]
    before = copy.deepcopy(net)
    symmetries.rescale_(torch.randn(5, dtype=torch.float64) / 2)
    assert not torch.equal(before[1].running_var, net[1].running_var)
    assert 0 < equinorm.deviation(net, before, args) <= 1e-6


def behind_relu(training: bool = False) -> nn.Sequential:
    """A batch normalization that no convolution stands in front of."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2)).double().train(training)
    net[2].running_mean.normal_()
    net[2].running_var.uniform_(0.5, 2)
    return net


IMAGES = (torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)


def test_batch_norm_read_as_in_evaluation_mode():
    net = behind_relu()
    assert equinorm.symmetries(net, IMAGES).num_free == 3
    symmetries = equinorm.symmetries(net, IMAGES, batch_norm="evaluation")
    assert symmetries.num_free == 6
    assert [s.name for s in symmetries.scalings if s.factors and s.kind == "buffer"] == ["2.running_mean"]
    before, z = copy.deepcopy(net), torch.randn(6, dtype=torch.float64)
    symmetries.rescale_(z)
    assert equinorm.deviation(net, before, IMAGES) <= 1e-12
    assert torch.equal(net[2].running_var, before[2].running_var)
    assert equinorm.deviation(net.train(), before.train(), IMAGES) > 1e-2, "batch statistics undo what the mean does"


def test_evaluation_mode_by_powers_of_two_is_bitwise():
    net = behind_relu().float()
    before, args = copy.deepcopy(net), (IMAGES[0].float(),)
    symmetries = equinorm.symmetries(net, args, batch_norm="evaluation")
    symmetries.rescale_(torch.tensor([1.0, -2, 3, 2, -1, 4]) * math.log(2))
    assert torch.equal(net(*args), before(*args))


@pytest.mark.parametrize("both_modes", [True, False])
def test_training_mode_leaves_nothing_of_the_reading_of_evaluation(both_modes):
    net = behind_relu(training=True)
    found = equinorm.symmetries(net, IMAGES, batch_norm="evaluation", both_modes=both_modes)
    assert found.num_free == 3


class Differentiable(nn.BatchNorm2d):
    """PyTorch has no derivative by the running mean: there the formula stands in."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.running_mean.requires_grad:
            return super().forward(input)
        parts = [None if t is None else t[:, None, None] for t in (self.running_mean, self.running_var, self.weight, self.bias)]
        normalized = (input - parts[0]) * (parts[1] + self.eps).rsqrt()
        return normalized if parts[2] is None else parts[2] * normalized + parts[3]


@pytest.mark.parametrize(
    ("layers", "free"),
    [
        ([nn.Conv2d(2, 3, 2), nn.ReLU(), Differentiable(3), nn.Conv2d(3, 2, 2)], 6),
        ([nn.Conv2d(2, 3, 2), Differentiable(3), nn.ReLU(), nn.Conv2d(3, 2, 2)], 6),
        ([nn.Conv2d(2, 3, 2, bias=False), Differentiable(3, affine=False), nn.ReLU(), nn.Conv2d(3, 2, 2)], 3),
    ],
)
def test_evaluation_mode_against_derivatives(layers, free):
    torch.manual_seed(0)
    net = nn.Sequential(*layers).eval()
    (name,) = (f"{i}.running_mean" for i, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d))
    result = verdict(net, IMAGES, buffers=[name], batch_norm="evaluation")
    assert result.residual < 1e-10
    assert result.dimension == result.found == result.num_free == free


def test_zeros_less_a_mean_are_not_zero():
    """Channels that are padded with zeros do not stay zero behind a normalization that shifts them."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(5, affine=False), nn.Conv2d(5, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            padded = nn.functional.pad(self.up(x).relu(), (0, 0, 0, 0, 0, 2))
            return self.down(self.norm(padded).relu() + padded)

    net = Padded().double().eval()
    net.norm.running_mean.normal_()
    symmetries = equinorm.symmetries(net, IMAGES, batch_norm="evaluation")
    before = copy.deepcopy(net)
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    assert symmetries.num_free == 3
    assert equinorm.deviation(net, before, IMAGES) <= 1e-12


class ShiftedGain(nn.Module):
    """A norm with gain 1 + w, as in Gemma; w may also be read elsewhere."""

    def __init__(self, also: str = "") -> None:
        super().__init__()
        self.also = also
        self.gain = nn.Parameter(0.3 * torch.randn(4))
        self.up = nn.Linear(4, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        out = self.up(x * (1 + self.gain))
        if self.also == "raw":
            out = out + self.gain.sum()
        if self.also == "other":
            out = out * (self.gain - 2).sum()
        return out * (1 + self.gain).square().mean() if self.also == "again" else out


def test_gains_written_one_plus_w_move():
    torch.manual_seed(0)
    net = ShiftedGain().double()
    symmetries = check(net, (X,), 4)
    assert {s.name: s.offset for s in symmetries.scalings} == {"gain": 1.0, "up.weight": 0.0}
    assert "gain + 1 [4]: axis 0 × gain[0]" in str(symmetries)
    balance = symmetries.balance(tol=1e-13)
    balance.apply_()
    torch.testing.assert_close((1 + net.gain).abs(), net.up.weight.norm(dim=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("also", "num_free"), [("raw", 0), ("other", 0), ("again", 1)])
def test_shifted_gains_with_other_uses(also, num_free):
    check(ShiftedGain(also).double(), (X,), num_free)


def test_shifted_gains_that_would_lose_their_precision_are_refused():
    net = ShiftedGain()
    symmetries = equinorm.symmetries(net, X.float())
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(equinorm.RescaleError, match=r"uses 1 \+ gain"):
        symmetries.rescale_(torch.full((4,), -9.0))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    rough = equinorm.symmetries(net.bfloat16(), X.bfloat16())
    assert rough.num_free == 0
    assert "gain[0]: 4 channels by aten.add (half precision cannot store w where 1 + w scales)" in str(rough)
