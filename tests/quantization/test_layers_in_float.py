"""Layers that stay in float though the scheme asks for them are named."""

import pytest
import torch
from torch import nn

import equinorm
from equinorm.quantization import Scheme
from equinorm.quantization.points import find_points, layers_in_float

BUFFER, COMPUTED = "its weight is a buffer", "its weight is computed"
LEFT_HAND = "its weight is not the matrix on the right"


class Middle(nn.Module):
    """A layer between two that are rounded."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 16), layer, nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.layer(torch.relu(self.first(x))))


class Learned(nn.Module):
    """A product with a matrix that is a parameter, or a buffer."""

    def __init__(self, product, is_parameter=True, shape=(16, 16)):
        super().__init__()
        values = torch.randn(shape)
        self.register_parameter("w", nn.Parameter(values)) if is_parameter else self.register_buffer("w", values)
        self.product = product

    def forward(self, x):
        return self.product(x, self.w)


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def case(layer, left):
    return pytest.param(layer, left, id=left or "none")


class LowRank(nn.Module):
    """A matrix of rank 2, made by a module of its own."""

    class Made(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(size, 2)), nn.Parameter(torch.randn(2, size))

        def forward(self):
            return self.up @ self.down

    def __init__(self, size):
        super().__init__()
        self.weight = self.Made(size)

    def forward(self, x):
        return nn.functional.linear(x, self.weight())


def attended(x, table):
    return torch.baddbmm(table.expand(len(x), -1, -1), x, x.mT).softmax(-1) @ x


def by_head(x, w):
    return torch.einsum("bti,hij->bthj", x, w).flatten(2)


def named(net: nn.Module, scheme: Scheme) -> dict[str, str]:
    """Layers that are not rounded, and why."""
    symmetries, points = find_points(net.eval(), (torch.randn(4, 5, 8),), None, scheme)
    return layers_in_float(symmetries.values, points, scheme)


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's matrix, transposed."""

    def __init__(self, is_small):
        super().__init__()
        self.encoder = nn.Linear(16, 4 if is_small else 16)

    def forward(self, x):
        return nn.functional.linear(torch.relu(self.encoder(x)), self.encoder.weight.t())


@pytest.mark.parametrize("is_small", [True, False])
def test_a_weight_that_is_used_transposed_too_is_rounded_where_it_is_used_as_it_is(is_small):
    torch.manual_seed(0)
    net = Middle(Tied(is_small))
    _, points = find_points(net, (torch.randn(4, 5, 8),), None, Scheme())
    assert [point.name for point in points] == ["first", "layer.encoder", "last"]
    assert named(net, Scheme()) == {"layer": COMPUTED}


@pytest.mark.parametrize(
    ("make", "left"),
    [
        case(lambda: Learned(nn.functional.linear, is_parameter=False), BUFFER),
        case(lambda: Learned(lambda x, w: x @ w.t()), COMPUTED),
        case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), COMPUTED),
        case(lambda: Learned(lambda x, w: (w @ x.mT).mT), LEFT_HAND),
        case(lambda: Learned(by_head, shape=(2, 16, 8)), "aten.einsum is not rounded"),
        case(lambda: Learned(torch.bmm, shape=(4, 16, 16)), "aten.bmm is not rounded"),
        case(lambda: Recurrent(16, 16, batch_first=True), "aten.lstm is not rounded"),
        case(lambda: LowRank(16), COMPUTED),
        case(lambda: Learned(attended, shape=(5, 5)), ""),
        case(lambda: nn.Conv1d(5, 5, 3, padding=1, bias=False), ""),
    ],
)
def test_products_with_learned_numbers(make, left):
    torch.manual_seed(0)
    assert named(Middle(make()), Scheme()) == ({"layer": left} if left else {})


def test_what_the_scheme_leaves_in_float_is_not_named():
    assert named(Middle(Recurrent(16, 16, batch_first=True)), Scheme())
    assert not named(Middle(Recurrent(16, 16, batch_first=True)), Scheme(in_float=["la*"]))


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: Recurrent(16, 16, batch_first=True), "aten.lstm is not rounded"),
        (lambda: Tied(is_small=True), COMPUTED),
        (lambda: LowRank(16), COMPUTED),
    ],
)
def test_such_networks_are_equalized_and_the_record_says_so(make, left):
    torch.manual_seed(0)
    net, x = Middle(make()).double().eval(), torch.randn(4, 5, 8, dtype=torch.float64)
    found = equinorm.equalize(net, (x,), scheme="w8a8-tensor")
    assert equinorm.deviation(net, found.model, (x,)) <= 1e-12
    assert ("left", f"layer: {left}") in found.facts
