"""Networks inside of wrappers, and networks of other classes that run the same operations, are compared and aligned."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import equinorm


class Net(nn.Module):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.relu(self.first(x)))


class Renamed(Net):
    """The same, of another name for its input."""

    def forward(self, linear: Tensor) -> Tensor:
        return self.last(self.first(linear).relu())


class Gelu(Net):
    """Another function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.first(x)))


X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def copied() -> nn.Module:
    """A permuted and rescaled copy."""
    net = Net().double()
    permutations, symmetries = equinorm.permutations(net, X), equinorm.symmetries(net, X)
    permutations.permute_(permutations.random(torch.Generator().manual_seed(1)))
    symmetries.rescale_(torch.linspace(-1, 1, symmetries.num_free))
    return net


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_wrappers_are_looked_through_on_either_side(wrap):
    net, twin = Net().double(), copied()
    for one, other in ((wrap(net), twin), (net, wrap(twin)), (wrap(net), wrap(twin))):
        assert equinorm.equivalence(one, other, X).joined_by == ("permutation", "rescaling")
        found = equinorm.align(one, other, X)
        assert found.distance_after < 1e-12
        assert type(found.model) is Net


def test_what_the_code_calls_an_input_does_not_matter():
    twin = Renamed().double()
    twin.load_state_dict(copied().state_dict())
    assert equinorm.equivalence(Net().double(), twin, X).equivalent
    assert equinorm.align(Net().double(), twin, X).distance_after < 1e-12
    other = Gelu().double()
    other.load_state_dict(copied().state_dict())
    with pytest.raises(equinorm.EquivalenceError, match="different operations"):
        equinorm.equivalence(Net().double(), other, X)


WRONG = [("flip", "no"), ("power_of_two", 1), ("seed", "a"), ("seed", 0.5), ("rescale", "no")]


@pytest.mark.parametrize(("name", "given"), WRONG)
def test_settings_of_other_kinds_are_refused_before_anything_runs(name, given):
    with pytest.raises(equinorm.EquivalenceError, match=rf"^{name} must be .*{given}"):
        equinorm.align(Net().double(), copy.deepcopy(copied()), X, **{name: given})
