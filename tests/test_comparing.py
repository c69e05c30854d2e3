"""Comparing networks: the verdict agrees with the outputs, and what cannot be compared is refused in words."""

import copy

import numpy as np
import pytest
import torch
from algorithm_1 import mlp
from torch import nn

import equinorm
from equinorm import EquivalenceError


def pair(change=None, **options):
    """A network and a rescaled copy with a change."""
    torch.manual_seed(0)
    net = Attributed(**options).double()
    twin = copy.deepcopy(net)
    found = equinorm.symmetries(twin, inputs(), opaque=opaque(net))
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
    if change is not None:
        change(twin)
    return net, twin


class Factor(nn.Module):
    """A number inside of a module that is not looked into."""

    number = 1.0

    def forward(self, x):
        return x * float(self.number)


class Attributed(nn.Module):
    def __init__(self, hidden=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.shift = torch.ones(3, dtype=torch.float64)
        self.factor = Factor() if hidden else nn.Identity()

    def forward(self, x):
        return self.factor(self.body(x)) + self.shift


def inputs():
    return (torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)


def opaque(net):
    return ["factor"] if isinstance(net.factor, Factor) else []


def test_networks_with_equal_attributes_are_equivalent():
    for hidden in (False, True):
        net, twin = pair(hidden=hidden)
        assert equinorm.equivalence(net, twin, inputs(), opaque=opaque(net)).equivalent


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("factor", [1.5, 1 + 1e-5])
def test_the_verdict_does_not_contradict_the_outputs(hidden, factor):
    def change(twin):
        if hidden:
            twin.factor.number = factor
        else:
            twin.shift = twin.shift * factor

    net, twin = pair(change, hidden=hidden)
    found = equinorm.equivalence(net, twin, inputs(), opaque=opaque(net))
    assert found.difference <= found.tolerance
    assert found.deviation > (factor - 1) / 10
    assert not found.equivalent
    assert "A rescaling joins the weights, but the outputs differ" in str(found)


def test_permuted_networks_are_equivalent():
    torch.manual_seed(0)
    net, args = mlp(), (torch.randn(3, 5, dtype=torch.float64),)
    twin = copy.deepcopy(net)
    layers = [layer for layer in twin if isinstance(layer, nn.Linear)]
    order = torch.randperm(layers[0].out_features)
    with torch.no_grad():
        layers[0].weight.copy_(layers[0].weight[order])
        layers[0].bias.copy_(layers[0].bias[order])
        layers[1].weight.copy_(layers[1].weight[:, order])
    found = equinorm.equivalence(net, twin, args)
    assert found.equivalent
    assert str(found).startswith("equivalent by permutation: ")
    with torch.no_grad():
        layers[0].weight.mul_(2)
    assert "permutation" not in str(equinorm.equivalence(net, twin, args))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_tensors_without_rows():
    net = nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    assert equinorm.equivalence(net, copy.deepcopy(net), inputs()).equivalent


@pytest.mark.parametrize("tolerance", ["a", -1.0, float("nan"), True, (1e-3,)])
def test_tolerances_that_are_none(tolerance):
    net, twin = pair()
    with pytest.raises(EquivalenceError, match="tolerance must be None or a number of at least 0, not"):
        equinorm.equivalence(net, twin, inputs(), tolerance=tolerance)


WAYS = {"state dict": "holds weights without their network", "program": r"Give its \.module\(\)", "function": "Wrap what it"}


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("compare", [equinorm.equivalence, equinorm.deviation])
def test_what_is_no_module(kind, compare):
    net, _ = pair()
    other = {
        "state dict": net.state_dict,
        "program": lambda: torch.export.export(net, inputs()),
        "function": lambda: torch.relu,
    }
    for models in ((net, other[kind]()), (other[kind](), net)):
        with pytest.raises(EquivalenceError, match=WAYS[kind]):
            compare(*models, inputs())


def test_weights_without_numbers():
    net, _ = pair()
    with pytest.raises(equinorm.EquinormError, match="meta device"):
        equinorm.equivalence(nn.Linear(4, 2, device="meta"), nn.Linear(4, 2, device="meta"), torch.randn(1, 4, device="meta"))
    with pytest.raises(equinorm.EquinormError, match="meta"):
        equinorm.equivalence(net, copy.deepcopy(net).to("meta"), inputs())
    with pytest.raises(equinorm.EquinormError, match="is on the meta device and holds no numbers"):
        equinorm.deviation(net, copy.deepcopy(net).to("meta"), inputs())
    with pytest.raises(equinorm.EquinormError, match="is on the meta device and holds no numbers"):
        equinorm.equalize(nn.Linear(4, 2, device="meta").eval(), torch.randn(1, 4, device="meta"))


class Returning(nn.Module):
    """Returns a value made by a function."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


SAME = {
    "array": lambda x: x.numpy(),
    "sparse": lambda x: x.relu().to_sparse(),
    "csr": lambda x: x.relu().to_sparse_csr(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.05, 0, torch.qint8),
    "whole numbers": lambda x: (x * 100).long(),
    "words": lambda x: {"out": x, "name": "one"},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:.*quantiz", "ignore:.*invariant")
@pytest.mark.parametrize("kind", SAME)
def test_outputs_of_other_kinds(kind):
    """Arrays and sparse tensors are compared by their numbers."""
    one, other = Returning(SAME[kind]), Returning(lambda x: SAME[kind](1.5 * x))
    assert equinorm.deviation(one, one, inputs()) == 0.0
    assert equinorm.deviation(one, other, inputs()) == pytest.approx(1 / 3, rel=0.05)


class Strange:
    def __eq__(self, other):
        raise ValueError("not to be compared")

    __hash__ = None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.to("meta"), "output 0, a Tensor, cannot be compared"),
        (lambda x: Strange(), "output 0, a Strange, cannot be compared: ValueError: not to be compared"),
    ],
)
def test_outputs_that_cannot_be_compared(make, words):
    with pytest.raises(EquivalenceError, match=words):
        equinorm.deviation(Returning(make), Returning(make), inputs())


def test_keyword_inputs_are_a_dict():
    net, _ = pair()
    with pytest.raises(EquivalenceError, match="kwargs must be a dict of keyword inputs, not list"):
        equinorm.deviation(net, net, inputs(), [3])


def test_numpy_arrays_of_other_shapes():
    with pytest.raises(EquivalenceError, match=r"shape \(5, 4\) in one model, \(5, 2\) in the other"):
        equinorm.deviation(Returning(lambda x: np.asarray(x)), Returning(lambda x: np.asarray(x)[:, :2]), inputs())
