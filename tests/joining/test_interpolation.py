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
