"""Batch normalization read exactly and with its statistics, and gains written 1 + w."""

import copy

import pytest
import torch
from exactness import X, check
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
    assert equinorm.symmetries(net.bfloat16(), X.bfloat16()).num_free == 0
