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
    middle = equinorm.interpolate(a, b, 0.25)
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


def test_what_does_not_fit_is_refused():
    a, b = network(0), network(1)
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
