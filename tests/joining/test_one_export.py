"""One export serves scales, signs and permutations, and none of the three sees what another has read."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm._symmetries import symmetries_of
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.joining.signs import signs_of
from equinorm.permuting.permutations import permutations_of


class WithConstants(nn.Module):
    """Mixes odd and homogeneous functions; a constant is written in place while it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0], dtype=x.dtype)
        gate[0] += 1
        gate.mul_(gate)
        return self.third(torch.tanh(self.second(torch.relu(self.norm(self.first(x))))) * gate)


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return WithConstants().double().eval(), torch.randn(3, 4, dtype=torch.float64)


def described(*found: object) -> list[str]:
    return [group.details() if hasattr(group, "details") else f"{group} {group.flips}" for group in found]


READERS = {"scales": symmetries_of, "permutations": permutations_of, "signs": signs_of}


@pytest.fixture(scope="module")
def alone() -> dict[str, list[str]]:
    """What each finds in an export of its own."""
    net, x = network()
    return {name: described(read(graphs_of(net, x, None))) for name, read in READERS.items()}


@pytest.mark.parametrize("order", [("scales", "permutations", "signs"), ("signs", "scales", "permutations", "scales")])
def test_a_reading_finds_what_it_finds_alone(order, alone):
    net, x = network()
    shared = graphs_of(net, x, None)
    for name in order:
        assert described(READERS[name](shared)) == alone[name], name


@pytest.mark.parametrize("both_modes", [False, True])
def test_each_call_and_mode_is_exported_once(monkeypatch, both_modes):
    net, x = network()
    exported = count_exports(monkeypatch)
    graphs = graphs_of(net, x, None, both_modes=both_modes, also=[torch.randn(5, 4, dtype=torch.float64)])
    for read in READERS.values():
        read(graphs)
    assert len(exported) == 2 * (1 + both_modes)


def test_joining_exports_each_network_once(monkeypatch):
    net, x = network()
    twin = copy.deepcopy(net)
    equinorm.permutations(twin, x).permute_(equinorm.permutations(twin, x).random())
    exported = count_exports(monkeypatch)
    equinorm.canonical_(copy.deepcopy(net), x)
    assert len(exported) == 1
    found = equinorm.equivalence(net, twin, x)
    assert found.permutation
    assert len(exported) == 3


def count_exports(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    original, calls = torch.export.export, []

    def counted(model, *args, **kwargs):
        calls.append(type(model))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return calls
