"""Writes by compiled kernels: the same bits, all of them or none, whenever an exit comes."""

import copy

import pytest
import torch
from torch import nn

import equinorm
from equinorm import native
from equinorm.rescaling import writing


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(native, "are_shipped", lambda: True)


def network():
    """Rows, columns, kernels, vectors, a transposed weight, which kernels leave alone, and a layer of few rows."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 34, 3), nn.ReLU(), nn.Conv2d(34, 5, 3), nn.ReLU()
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 2)).eval()
    with torch.no_grad():
        net[10].weight.set_(torch.randn(7, 2).T)
    return net


def analysed():
    net = network()
    return net, equinorm.symmetries(net, torch.randn(1, 3, 8, 8), batch_norm="evaluation")


def state(net):
    return [tensor.clone() for tensor in net.state_dict().values()]


def same(net, tensors):
    return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), tensors, strict=True))


@pytest.mark.parametrize("twos", [False, True])
def test_kernels_write_the_same_bits(monkeypatch, twos):
    (one, found), (other, expected) = analysed(), analysed()
    z = torch.randn(found.num_free, dtype=torch.float64)
    versions = found.versions()
    kernels, seen = native.kernels_for(torch.float32, torch.float32), []
    scale_ = type(kernels).scale_
    monkeypatch.setattr(type(kernels), "scale_", lambda self, moves: seen.append(len(moves)) or scale_(self, moves))
    found.rescale_(z, power_of_two=twos)
    assert len(seen) == 1
    assert seen[0] > 10  # and the mark behind them
    assert all(now > before for now, before in zip(found.versions(), versions, strict=True))
    monkeypatch.setattr(native, "are_shipped", lambda: False)
    expected.rescale_(z, power_of_two=twos)
    assert len(seen) == 1
    assert same(one, state(other))


def test_nothing_is_written_where_another_write_fails(monkeypatch):
    net, found = analysed()
    before = state(net)

    def fail(piece):
        raise RuntimeError("device lost")

    monkeypatch.setattr(writing._Piece, "write_", fail)
    with pytest.raises(equinorm.RescaleError, match=r"device lost\. All is as it was before"):
        found.rescale_(torch.ones(found.num_free))
    assert same(net, before)


@pytest.mark.parametrize("is_late", [False, True])
def test_exits_before_and_after_kernels(monkeypatch, is_late):
    """What comes before they run puts all back; what comes after finds all written."""
    net, found = analysed()
    old, kind = copy.deepcopy(net), type(native.kernels_for(torch.float32, torch.float32))
    scale_ = kind.scale_

    def leave(self, moves):
        if is_late:
            scale_(self, moves)
        raise SystemExit(1)

    monkeypatch.setattr(kind, "scale_", leave)
    with pytest.raises(SystemExit):
        found.rescale_(torch.linspace(-1, 1, found.num_free))
    assert same(net, state(old)) != is_late
    monkeypatch.undo()
    assert equinorm.deviation(net, old, torch.randn(1, 3, 8, 8)) <= 1e-5
