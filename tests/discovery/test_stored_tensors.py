"""Tensors by how they are stored: sparse, complex, eight bits, overlapping, plain attributes."""

import copy

import pytest
import torch
from exactness import X, check
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import equinorm


class SparseLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4).double().to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.weight, x.t()).t()


def test_sparse_tensors_are_pinned():
    net = nn.Sequential(SparseLayer(), nn.Linear(6, 5).double(), nn.ReLU(), nn.Linear(5, 3).double())
    found = equinorm.symmetries(net, X)
    assert found.num_free == 5
    before = net(X)
    found.rescale_(torch.ones(5))
    assert torch.allclose(net(X), before, rtol=1e-12)


def test_complex_weights_are_pinned():
    net = nn.Sequential(nn.Linear(4, 6, dtype=torch.complex128), nn.Linear(6, 3, dtype=torch.complex128))
    found = check(net, (X.to(torch.complex128),), 0)
    assert any(pin.reason.detail == "complex weights are not rescaled" for pin in found.pins)


def test_sparse_buffers():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(2).double().to_sparse())
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.sparse.mm(self.adjacency, self.up(x)).relu())

    check(Graph().double(), (X,), 6)


class Attribute(nn.Module):
    """A number that is set from outside, as masks and factors that fade in are; 0 would fit any scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.settings = {"share": torch.zeros(())}

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) + self.settings["share"] * torch.sigmoid(self.b(x)))


def test_plain_attributes_are_not_taken_at_their_value():
    symmetries = equinorm.symmetries(Attribute(), torch.randn(2, 3))
    assert symmetries.num_free == 0


class Stored(nn.Module):
    """One weight that is stored in another way than others."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 3)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(torch.relu(self.a(x)) @ self.weight.to(x.dtype).T))


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(2, 4, dtype=torch.int8),
        torch.ones(2, 4).to(torch.float8_e4m3fn),
        torch.ones(2, 4, dtype=torch.bool),
        torch.randn(9).as_strided((2, 4), (1, 1)),
        TwoTensor(torch.ones(2, 4), torch.ones(2, 4)),
    ],
    ids=["int8", "float8", "bool", "overlapping entries", "wrapped"],
)
def test_weights_that_cannot_be_rescaled_are_pinned(weight):
    model = Stored(weight)
    twin, inputs = copy.deepcopy(model), torch.randn(2, 3)
    symmetries = equinorm.symmetries(model, inputs)
    moving = {scaling.name for scaling in symmetries.scalings if scaling.factors}
    assert moving == {"a.weight", "a.bias", "b.weight"}  # all alike
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    assert equinorm.deviation(model, twin, inputs) < 1e-5


def test_what_reads_numbers_names_tensors_that_hold_others():
    model, inputs = Stored(TwoTensor(torch.ones(2, 4), torch.ones(2, 4))).eval(), torch.randn(2, 3)
    with pytest.raises(equinorm.EquivalenceError, match=r"weight of Stored is of type TwoTensor.* before their weights are"):
        equinorm.equivalence(model, copy.deepcopy(model), inputs)
    with pytest.raises(equinorm.EqualizeError, match="quantized already"):
        equinorm.equalize(model, [inputs])


@pytest.mark.parametrize("strides", [(4, 1), (1, 2), (5, 1), (8, 2)])
def test_weights_with_gaps_or_turned_are_not_taken_to_overlap(strides):
    symmetries = equinorm.symmetries(Stored(torch.randn(16).as_strided((2, 4), strides)), torch.randn(2, 3))
    assert symmetries.num_free == 6
