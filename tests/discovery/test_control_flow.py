"""Keyword inputs, regions without gradients, both branches of a condition, and inputs of other shapes."""

import copy

import pytest
import torch
from exactness import X, check
from torch import Tensor, nn

import equinorm


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = torch.relu(self.up(x))
        return self.down(hidden)


def test_regions_without_gradients_are_looked_into():
    symmetries = check(NoGrad().double(), (X,), 6)
    assert [s.depth for s in symmetries.scalings if s.role == "weight"] == [1, 2]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, *, scale: Tensor, flag: bool = False) -> dict[str, Tensor]:
        hidden = torch.relu(self.up(x))
        return {"out": self.down(hidden * scale)} | ({"hidden": hidden} if flag else {})


@pytest.mark.parametrize(("flag", "num_free"), [(False, 6), (True, 0)])
def test_keyword_inputs_and_returned_intermediates(flag, num_free):
    net = Keywords().double()
    assert equinorm.symmetries(net, (X,), {"scale": torch.ones(6).double(), "flag": flag}).num_free == num_free


BRANCHES = {
    "the same value": (lambda net, h: h.clone(), 6),
    "another layer": (lambda net, h: net.third(h).relu(), 12),
    "zeros": (lambda net, h: torch.zeros_like(h), 12),
    "a pinned value": (lambda net, h: h.tanh(), 0),
    "a constant": (lambda net, h: torch.ones_like(h), 6),
}


class Choosing(nn.Module):
    """torch.cond: one branch is a layer."""

    def __init__(self, other) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(*size) for size in ((4, 6), (6, 6), (6, 6), (6, 3)))
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        branches = (lambda h: (self.second(h).relu(),), lambda h: (self.other(self, h),))
        return self.last(torch.cond(x.sum() > 0, *branches, (h,))[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own, from torch.cond
@pytest.mark.parametrize("name", BRANCHES)
def test_both_branches_of_a_condition(name):
    other, num_free = BRANCHES[name]
    net = Choosing(other).double()
    found = check(net, (X,), num_free)
    twin = copy.deepcopy(net)
    equinorm.symmetries(twin, X).rescale_(torch.ones(num_free))
    for inputs in (X.abs(), -X.abs()):
        assert equinorm.deviation(twin, net, inputs) <= 1e-12
    assert not any("<" in pin.reason.source for pin in found.pins)


class Positions(nn.Module):
    """Rows of a table up to the length of the input, and another branch for longer ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x + self.table[: x.shape[0]])
        return self.down(h.relu() if x.shape[0] < 8 else h.relu() + h)


class Longer(Positions):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x + self.table[: x.shape[0]]).relu()
        return self.down(h if x.shape[0] < 8 else h + 1)


def test_inputs_of_other_shapes():
    net, long = Positions().double(), torch.randn(8, 4, dtype=torch.float64)
    assert equinorm.symmetries(net, X).num_free == 6  # the rows that these two inputs do not read are pinned with the others
    for also in ((long,), long, {"x": long}):
        args = () if isinstance(also, dict) else X
        kwargs = {"x": X} if isinstance(also, dict) else None
        assert equinorm.symmetries(net, args, kwargs, also=[also]).num_free == 6
    net = Longer().double()
    assert equinorm.symmetries(net, X, also=[X[:1]]).num_free == 6
    assert equinorm.symmetries(net, X, also=[long]).num_free == 0
