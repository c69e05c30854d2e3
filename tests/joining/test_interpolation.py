"""Between two networks: ends are the networks, statistics are those of the data, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

import equinorm


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)).double()


def test_ends_and_middle():
    a, b = network(0).eval(), network(1)
    before = copy.deepcopy(a.state_dict())
    for t, expected in ((0, a), (1.0, b)):
        middle = equinorm.interpolate(a, b, t)
        assert not middle.training
        for one, other in zip(middle.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)
    middle = equinorm.interpolate(a, b, 0.25)  # both with the statistics of no batch
    torch.testing.assert_close(middle[4].weight, 0.75 * a[4].weight + 0.25 * b[4].weight)
    assert all(torch.equal(value, before[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_rounded_once(dtype):
    torch.manual_seed(0)
    a, b = (nn.Linear(40, 40).to(dtype) for _ in range(2))
    with torch.no_grad():
        b.weight[3] = a.weight[3]
    for t in (0.1, 0.3, 2.5):
        middle = equinorm.interpolate(a, b, t)
        assert torch.equal(middle.weight, ((1 - t) * a.weight.double() + t * b.weight.double()).to(dtype))
        assert torch.equal(middle.weight[3], a.weight[3])


def test_infinite_numbers_stay():
    a, b = network(0), network(1)
    for net in (a, b):
        net.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1).double())
    for t in (0, 0.5, 1, 2):
        assert torch.equal(equinorm.interpolate(a, b, t).mask, a.mask)


class Two(nn.Module):
    """Two layers; `join` makes their weights share memory."""

    def __init__(self, join: str = "") -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if join == "tied":
            self.two.weight = self.one.weight
        if join == "memory":
            self.two.weight = nn.Parameter(self.one.weight.data.t())
        self.register_buffer("gain", torch.rand(1).expand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two((self.one(x) * self.gain).relu())


@pytest.mark.parametrize("join", ["", "tied", "memory"])
def test_memory_that_tensors_share_is_written_as_one(join):
    torch.manual_seed(0)
    a, b, x = Two(join), Two(join), torch.randn(4, 3)
    middle = equinorm.interpolate(a, b, 0.25)
    for name in ("one.weight", "two.weight", "gain"):
        expected = 0.75 * a.state_dict()[name] + 0.25 * b.state_dict()[name]
        torch.testing.assert_close(middle.state_dict()[name], expected)
    assert equinorm.deviation(equinorm.interpolate(a, b, 1), b, x) == 0


@pytest.mark.parametrize(
    ("join", "why"), [("tied", "are one tensor in the first"), ("memory", "moves differently in the two models.*ties")]
)
def test_weights_that_only_one_network_ties(join, why):
    torch.manual_seed(0)
    a, b, x = Two(join), Two(), torch.randn(4, 3)
    with pytest.raises(equinorm.EquivalenceError, match=r"one\.weight and two\.weight share memory in the first network"):
        equinorm.interpolate(a, b, 0.5)
    assert equinorm.deviation(equinorm.interpolate(b, a, 1), a, x) < 1e-6
    with pytest.raises(equinorm.EquivalenceError, match=why):
        equinorm.align(a, b, x)


def test_statistics_are_measured_again():
    a, b = network(0), network(1)
    batches = [(torch.randn(50, 4).double(),), torch.randn(50, 4).double()]
    middle = equinorm.interpolate(a, b, 0.5, data=batches)
    means = torch.stack([middle[0](batch).mean(0) for batch in (batches[0][0], batches[1])])
    torch.testing.assert_close(middle[1].running_mean, means.mean(0))
    assert middle[1].momentum == 0.1
    assert all(module.training for module in middle.modules())
    assert not bool(b[1].running_mean.any())


def test_interpolated_statistics_are_warned_of():
    a, b = network(0), network(1)
    b(torch.randn(50, 4).double())
    for t in (0, 1):
        equinorm.interpolate(a, b, t)
    for t in (0.5, 1.5):
        with pytest.warns(UserWarning, match=r"2 running statistics of batch normalization, such as 1\.running_mean") as seen:
            middle = equinorm.interpolate(a, b, t)
        assert seen[0].filename == __file__
        assert torch.equal(middle[1].running_mean, (1 - t) * a[1].running_mean + t * b[1].running_mean)
    equinorm.interpolate(a, b, 0.5, data=[torch.randn(50, 4).double()])


def test_what_does_not_fit_is_refused():
    a, b = network(0), network(1)
    with pytest.raises(equinorm.EquivalenceError, match=r"0\.weight is float64 in the first network and float32 in the second"):
        equinorm.interpolate(a, network(1).float(), 0.5)
    b[1].running_var = b[1].running_var.float()
    with pytest.raises(equinorm.EquivalenceError, match=r"1\.running_var is float64 in the first network and float32"):
        equinorm.interpolate(a, b, 0.5)
    b = network(1)
    with pytest.raises(equinorm.EquivalenceError, match="different parameters"):
        equinorm.interpolate(a, nn.Linear(4, 2), 0.5)
    with pytest.raises(equinorm.EquivalenceError, match="t must be a finite number"):
        equinorm.interpolate(a, b, float("nan"))
    with pytest.raises(equinorm.EquivalenceError, match="no batch"):
        equinorm.interpolate(a, b, 0.5, data=[])
    with pytest.raises(equinorm.EquivalenceError, match=r"must be batches of positional inputs, not Tensor. For one: \[x\]"):
        equinorm.interpolate(a, b, 0.5, data=torch.randn(4, 3, 8, 8))
    with pytest.raises(equinorm.EquivalenceError, match=r"does not run on batch 0 of data, .*without labels"):
        equinorm.interpolate(a, b, 0.5, data=[(torch.randn(4, 3, 8, 8), torch.zeros(4))])
