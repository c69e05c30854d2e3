"""Submodules that `torch.export` cannot record: pinned at their borders, the rest stays exact."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equinorm

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Branching(nn.Module):
    """Control flow on data."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x).tanh()
        return x


class Around(nn.Module):
    """Layers before and behind a submodule; `use` says how its result is used."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
        self.middle = middle
        self.third, self.last = nn.Linear(6, 7), nn.Linear(7, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).relu())
        return self.last(self.third(self.use(h)).relu())

    def use(self, h: Tensor) -> Tensor:
        return self.middle(h)


def check(net: nn.Module, num_free: int, opaque: Any = "middle", inputs: Tensor = X) -> equinorm.Symmetries:
    """So many classes; a random member of the group keeps the function, also where the submodule takes its other branch."""
    twin = copy.deepcopy(net)
    found = equinorm.symmetries(twin, inputs, opaque=opaque)
    assert found.num_free == num_free
    found.rescale_(torch.randn(num_free, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for factor in (1.0, -1.0):
        assert equinorm.deviation(twin, net, (factor * inputs,)) <= 1e-12
    return found


def test_what_an_error_advises_works():
    net = Around(Branching())
    with pytest.raises(equinorm.ExportError, match=r"branches on the value of a tensor.*opaque='middle'"):
        equinorm.symmetries(net, X)
    found = check(net, 8 + 7)
    reasons = {str(pin.reason) for pin in found.pins if pin.tensor in ("second.weight", "middle.inner.weight")}
    assert reasons
    assert all(reason.startswith("equinorm.opaque (declared opaque)") for reason in reasons)


def test_a_failed_export_prints_nothing(capfd):
    with pytest.raises(equinorm.ExportError):
        equinorm.symmetries(Around(Branching()), X)
    assert capfd.readouterr() == ("", "")


def test_modules_and_names():
    net = Around(Branching())
    check(net, 8 + 7, ["middle"])
    assert equinorm.symmetries(net, X, opaque=net.middle).num_free == 8 + 7
    assert equinorm.symmetries(net, X, opaque=[net.middle, "middle.inner"]).num_free == 8 + 7


def test_the_model_is_untouched():
    net = Around(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(), Branching()))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    equinorm.symmetries(net, X, opaque="middle")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert "forward" not in vars(net.middle)


class Repeating(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2) if float(x.sum()) > 0 else x.repeat(1, 2).sin()


class Wide(Around):
    def use(self, h: Tensor) -> Tensor:
        return self.middle(h[:, :3]) + self.middle(h)[:, 3:9]


def test_calls_of_several_shapes():
    check(Wide(Repeating()), 8 + 7)


class Filling(nn.Module):
    """Writes into what it is given."""

    def forward(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x if x.sum() > 0 else x.sin())


class Filled(Around):
    def use(self, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)  # zeros would fit any scale, if they stayed zeros
        self.middle(h.detach() * 0 + 1, out)
        return h * out


class Zeroed(Around):
    def use(self, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        self.middle(torch.ones_like(h), out)
        return h + out


def test_writes_into_inputs():
    check(Zeroed(Filling()), 8 + 7)
    check(Filled(Filling()), 8 + 6 + 7)  # times what has no scale


class Counting(nn.Module):
    """Writes into a buffer that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(6))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            self.offset += 1
        self.calls += 1
        return x * 0


class Reading(Around):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        self.middle(torch.ones_like(h[:, :6]))
        h = torch.cat([h[:, :6] + self.middle.offset + self.middle.calls, h[:, 6:]], 1)
        return self.last(self.third(self.second(h)).relu())


def test_writes_into_buffers():
    """The offset starts as zeros, which would fit any scale."""
    check(Reading(Counting()), 2 + 6 + 7)


class Splitting(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.sin() if x.sum() > 0 else x.cos()
        return y, y[:, :3], x


class Shared(Around):
    """Writes into one result, reads another one of the same memory."""

    def forward(self, x: Tensor) -> Tensor:
        whole, part, given = self.middle(torch.zeros(5, 6, dtype=x.dtype))
        h = self.first(x).relu()
        whole.copy_(h[:, :6])
        given.copy_(h[:, 2:])
        return self.last(self.third(torch.cat([part, given[:, :3]], 1)).relu()) + self.second(h).sum()


def test_results_that_share_memory():
    check(Shared(Splitting()), 7)


class Neighbour(nn.Module):
    """Uses a tensor of another module."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.others[0].weight.norm() if x.sum() > 0 else x


def test_reads_of_other_modules():
    net = Around(nn.Identity())
    net.middle = Neighbour(net.third)
    found = check(net, 8)
    assert any(pin.tensor == "third.weight" and pin.reason.detail == "declared opaque" for pin in found.pins)


class Leaving(nn.Module):
    """Leaves a tensor behind."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.sum() if x.sum() > 0 else -x.sum()
        return x


class Finding(Around):
    def use(self, h: Tensor) -> Tensor:
        return self.middle(h) + self.middle.last


def test_what_is_left_in_attributes():
    """Zeros of an earlier call would fit any scale, so nobody may read them."""
    assert check(Around(Leaving()), 8 + 7)
    with pytest.raises(equinorm.ExportError, match="has no attribute 'last'"):
        equinorm.symmetries(Finding(Leaving()), X, opaque="middle")


class Global(nn.Module):
    cache = torch.zeros(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        Global.cache.add_(1)
        return x


class Listing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return iter([x])


class Sparse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse()


@pytest.mark.parametrize(
    ("middle", "opaque", "says"),
    [
        (Branching(), "midle", "the model has no module 'midle'. Its first modules are first, second, middle"),
        (Branching(), nn.Linear(2, 2), "the model has no module Linear of opaque"),
        (Branching(), 3, "opaque must be names or modules, not int"),
        (Branching(), "", "opaque: the model itself"),
        (nn.Sequential(Branching(), nn.ModuleDict({"unused": nn.Identity()})), "middle.1.unused", "does not run on inputs"),
        (Global(), "middle", "writes into 1 tensor that the model neither gives to it"),
        (Listing(), "middle", "returns list_iterator"),
        (Sparse(), "middle", "returns sparse tensors"),
    ],
)
def test_refusals(middle: nn.Module, opaque: Any, says: str):
    with pytest.raises(equinorm.ExportError, match=says):
        equinorm.symmetries(Around(middle), X, opaque=opaque)


class Unused(Around):
    def use(self, h: Tensor) -> Tensor:
        return h


def test_a_module_that_is_never_called():
    with pytest.raises(equinorm.ExportError, match="Unused never calls its module 'middle'"):
        equinorm.symmetries(Unused(Branching()), X, opaque="middle")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules():
    net = Around(nn.Identity())
    net.middle = torch.jit.script(Branching().double())
    assert equinorm.symmetries(net, X, opaque="middle").num_free == 8 + 7


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore::UserWarning")
def test_packed_weights():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    net = torch.ao.quantization.quantize_dynamic(net, {"4"})
    before = net(X.float())
    with pytest.raises(equinorm.ExportError, match=r"packed weights.*\(opaque=\['4'\]\)"):
        equinorm.symmetries(net, X.float())
    found = equinorm.symmetries(net, X.float(), opaque="4")
    assert found.num_free == 6
    assert torch.equal(net(X.float()), before)


def test_balancing_and_training():
    net = Around(Branching())
    twin = copy.deepcopy(net)
    assert equinorm.balance_(twin, X, opaque="middle").converged
    assert equinorm.deviation(twin, net, X) <= 1e-12
    assert equinorm.equivalence(twin, net, X, opaque="middle").equivalent
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    hook = equinorm.ENorm(optimizer, twin, X, opaque="middle", c=1.2)
    twin(X).sum().backward()
    optimizer.step()
    assert hook.steps == 1
    assert equinorm.deviation(twin, net, -X) <= 1e-12


class Hidden:
    """No tensor, tuple, list or dict."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Peeking(nn.Module):
    def forward(self, x: Tensor, hidden: Hidden) -> Tensor:
        return x * hidden.value.mean() if x.sum() > 0 else x - hidden.value.mean()


class Passing(Around):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last(self.third(self.middle(x[:, :1].repeat(1, 6), Hidden(h))).relu()) + self.second(h).sum() * 0


def test_reads_of_what_is_not_given_are_refused():
    with pytest.raises(equinorm.ExportError, match="reads what the model has computed and does not give it"):
        equinorm.symmetries(Passing(Peeking()), X, opaque="middle")


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(5, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.table


def test_results_that_a_module_keeps_are_refused():
    with pytest.raises(equinorm.ExportError, match="one that it keeps"):
        equinorm.symmetries(Around(Keeping()), X, opaque="middle")


class Foreign(nn.Module):
    """Computes in NumPy, whose memory comes and goes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy())).clone()


def test_other_libraries():
    for _ in range(10):
        around = Around(Foreign())
        symmetries = equinorm.symmetries(around, X, opaque="middle")
        assert symmetries.num_free > 0


class Both(Around):
    """The inner module is called by the outer one, and again outside of it."""

    def use(self, h: Tensor) -> Tensor:
        return self.middle[2](self.middle(h))


def test_nested_modules_that_are_also_called_outside():
    net = Both(nn.Sequential(nn.Identity(), nn.Linear(6, 6), Branching()))
    check(net, 8 + 7, ["middle", "middle.2"])


def test_one_module_under_two_names():
    net = Around(Branching())
    net.twin = net.middle
    check(net, 8 + 7, ["middle", "twin"])
