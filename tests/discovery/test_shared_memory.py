"""Weights whose numbers something else holds, or that lie on one another, are pinned, with the reason."""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equinorm

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@dataclass(slots=True)
class Slots:
    inside: Any


class Net(nn.Module):
    """Multiplies by a number that it reads from an attribute."""

    def __init__(self, make: Callable[[Tensor], Any], read: Callable[[Any], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(i, o).double() for i, o in ((4, 5), (5, 6), (6, 3)))
        self.a.bias.data.abs_().add_(1)
        self.alias, self.read = make(self.a.bias), read

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu() * self.read(self.alias)).relu())


def first(alias: Any) -> float:
    return float(alias[0])


ALIASES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], float]]] = {
    "data": (lambda w: w.data[0], float),
    "detached": (lambda w: w.detach()[1], float),
    "list of numbers": (lambda w: w.data, lambda alias: alias.tolist()[0]),
    "numpy": (lambda w: w.detach().numpy(), first),
    "reversed": (lambda w: w.detach().numpy()[::-1], first),
    "from numpy": (lambda w: torch.from_numpy(w.detach().numpy())[2], float),
    "other dtype": (lambda w: w.detach().numpy().view(np.int64), first),
    "storage": (lambda w: w.untyped_storage(), lambda alias: 1.0),
    "in a list": (lambda w: [1, ("a", w.data[0])], lambda alias: float(alias[1][1])),
    "in a dict": (lambda w: {"a": {"b": w.detach().numpy()}}, lambda alias: float(alias["a"]["b"][0])),
    "in an object": (lambda w: types.SimpleNamespace(inside=w.data[0]), lambda alias: float(alias.inside)),
    "in slots": (lambda w: Slots(w.data[0]), lambda alias: float(alias.inside)),
    "in a closure": (lambda w: (lambda v: lambda: v)(w.data[0]), lambda alias: float(alias())),
    "in a partial": (lambda w: functools.partial(first, w.detach().numpy()), lambda alias: alias()),
    "the parameter": (lambda w: [w], lambda alias: alias[0].tolist()[0]),
    "unused": (lambda w: w.data[0], lambda alias: 1.0),
}


@pytest.mark.parametrize("how", ALIASES)
def test_numbers_read_from_an_alias(how):
    net = Net(*ALIASES[how])
    found = equinorm.symmetries(net, X)
    assert found.num_free == 6
    if how != "the parameter":
        assert any(pin.tensor.startswith("a.") and "attribute" in pin.reason.detail for pin in found.pins)
    before = net(X)
    found.rescale_(torch.randn(6, dtype=torch.float64))
    torch.testing.assert_close(net(X), before, rtol=1e-12, atol=1e-12)


def test_copies_are_no_aliases():
    net = Net(lambda w: [w.detach().clone(), w.detach().numpy().copy()], lambda alias: 1.0)
    net.held = [net.a]
    assert equinorm.symmetries(net, X).num_free == 11


class Own(torch.optim.SGD):
    """An optimizer of a user's."""


def test_optimizers_that_a_model_holds_pin_nothing():
    net = Net(lambda w: None, lambda alias: 1.0)
    net.training_state = {"optimizer": Own(net.parameters(), lr=0.1)}
    net.schedule = torch.optim.lr_scheduler.StepLR(net.training_state["optimizer"], 3)
    assert equinorm.symmetries(net, X).num_free == 11


def test_tensors_on_the_meta_device():
    def net(make: Callable[[Tensor], Any]) -> nn.Module:
        return Net(make, lambda alias: 1.0).to_empty(device="meta")

    shared, apart = net(lambda w: None), net(lambda w: None)
    shared.alias = shared.a.bias.data[0]
    assert equinorm.symmetries(shared, X.to("meta")).num_free == 6
    assert equinorm.symmetries(apart, X.to("meta")).num_free == 11


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_weights_computed_anew_before_each_call_are_no_aliases(wrap):
    """Before the first call spectral norm's weight is the parameter itself."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), wrap(nn.Linear(5, 3))).double().eval()
    found = equinorm.symmetries(net, X)
    assert not any("attribute" in pin.reason.detail for pin in found.pins)


def test_recurrent_layers_hold_their_weights_twice():
    net = nn.RNN(4, 5, nonlinearity="relu").double()
    held = list(net._flat_weights)
    found = equinorm.symmetries(net, X[None])
    assert not any("attribute" in pin.reason.detail for pin in found.pins)
    assert all(a is b for a, b in zip(held, net._flat_weights, strict=True))


class Stored(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.gain = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * self.gain).relu())


@pytest.mark.parametrize(
    ("weight", "free"), [(torch.ones(1).expand(5), 5), (torch.ones(5), 10), (torch.ones(2, 1).expand(2, 5)[0], 5)]
)
def test_expanded_weights_are_pinned_with_a_reason(weight, free):
    net = Stored(weight.double() if weight.stride() == (1,) else weight.double().as_strided(weight.shape, weight.stride()))
    found = equinorm.symmetries(net, X)
    assert found.num_free == free
    assert any(pin.reason.detail == "its entries share memory" for pin in found.pins) == (free == 5)
    before = net(X)
    found.rescale_(torch.randn(free, dtype=torch.float64))
    torch.testing.assert_close(net(X), before, rtol=1e-12, atol=1e-12)


def test_parameters_made_twice_from_one_array():
    """Two storages, one memory."""
    numbers = np.abs(np.random.default_rng(0).normal(size=(5,)))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
            self.one, self.two = (nn.Parameter(torch.from_numpy(numbers)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) * self.one).relu() * self.two)

    net = Twice()
    found = equinorm.symmetries(net, X)
    before = net(X)
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
    torch.testing.assert_close(net(X), before, rtol=1e-12, atol=1e-12)
