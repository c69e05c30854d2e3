"""Letters from users: right ones free what they say, wrong ones are refused, and what cannot be confirmed is pinned."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm.permuting.laws import LAWS


@torch.library.custom_op("equinorm_tests::gated_product", mutates_args=())
def gated_product(x: Tensor, weight: Tensor, gain: Tensor, is_ordered: bool) -> Tensor:
    """(gain · sin x) wᵀ; if ordered, of cumulative sums."""
    h = gain * x.sin()
    return (h.cumsum(-1) if is_ordered else h) @ weight.t()


@gated_product.register_fake
def _(x, weight, gain, is_ordered):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("equinorm_tests::mixed", mutates_args=())
def mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * y.tanh(), torch.atan2(x, y)


@mixed.register_fake
def _(x, y):
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("equinorm_tests::across_heads", mutates_args=())
def across_heads(x: Tensor) -> Tensor:
    """x · Σ x over heads: the channels of all heads must be permuted alike."""
    return x * x.sum(1, keepdim=True)


@across_heads.register_fake
def _(x):
    return torch.empty_like(x)


class Products(nn.Module):
    def __init__(self, is_ordered: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(3, 6), nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6))
        self.is_ordered = is_ordered

    def forward(self, x: Tensor) -> Tensor:
        return gated_product(self.up(x), self.down, self.gain, self.is_ordered)


class Mixtures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat(mixed(self.left(x), self.right(x)), -1))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(across_heads(self.up(x).reshape(-1, 2, 3)).flatten(1))


PRODUCTS = [(torch.randn(4, 3), torch.randn(5, 3), torch.randn(3), False)]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = dict(LAWS)
    yield
    LAWS.clear()
    LAWS.update(before)


@torch.no_grad()
def families(net: nn.Module) -> list[str]:
    """Families of a network in float64, after a random member was seen to change nothing."""
    torch.manual_seed(0)
    net, x = net.double(), torch.randn(4, 3).double()
    found, before = equinorm.permutations(net, x), net(x)
    found.permute_(found.random(torch.Generator().manual_seed(1)))
    assert float((net(x) - before).abs().max()) <= 1e-12 * float(before.abs().max())
    return [str(family) for family in found.families]


def test_operators_without_letters_pin():
    assert families(Products()) == families(Mixtures()) == []


def test_letters_free_what_they_say():
    equinorm.register_axes(gated_product, "bk,ok,k->bo", PRODUCTS)
    assert families(Products()) == ["6 channels: down[1], gain[0], up.weight[0], up.bias[0]"]


def test_pinned_letters_stay():
    equinorm.register_axes(gated_product, "b_,o_,_->bo", PRODUCTS)
    assert families(Products()) == []


def test_elementwise_operators_with_several_results():
    equinorm.register_axes(mixed, "elementwise", [(torch.randn(4, 3), torch.randn(3))])
    axes = "left.weight[0], left.bias[0], right.weight[0], right.bias[0], last.weight[1][0:] as [5], last.weight[1][5:] as [5]"
    assert [text.replace("[1] as", "[1][0:] as") for text in families(Mixtures())] == [f"5 channels: {axes}"]


def test_orders_are_the_same_at_all_places():
    equinorm.register_axes(across_heads, "bhc->bhc", [(torch.randn(4, 2, 3),)])
    found = families(Heads())
    assert [text.split(":")[0] for text in found] == ["2 channels", "3 channels"]


def test_what_meets_other_places_is_not_elementwise():
    with pytest.raises(equinorm.EquinormError, match="is not elementwise: an entry of 'x' changes result 0 at other places"):
        equinorm.register_axes(across_heads, "elementwise", [(torch.rand(4, 2, 3) + 1,)])


@pytest.mark.parametrize(
    ("letters", "words"),
    [
        ("bk,ok,k->ko", "does not fit"),
        ("bk,ok->bo", "does not fit"),
        ("bk,oj,k->bo", "other sizes|wrong"),
        ("elementwise", "does not fit|wrong|broadcast"),
        ("b-k", "says nothing"),
        (None, "says nothing"),
    ],
)
def test_wrong_letters_are_refused(letters, words):
    with pytest.raises((equinorm.EquinormError, RuntimeError), match=words):
        equinorm.register_axes(gated_product, letters, PRODUCTS)
    assert "equinorm_tests::gated_product.default" not in LAWS


def test_samples_show_what_may_be_permuted():
    with pytest.raises(equinorm.EquinormError, match="are wrong: with k in another order"):
        equinorm.register_axes(gated_product, "bk,ok,k->bo", [(*PRODUCTS[0][:3], True)])
    with pytest.raises(equinorm.EquinormError, match="zero throughout"):
        equinorm.register_axes(gated_product, "bk,ok,k->bo", [(torch.zeros(4, 3), *PRODUCTS[0][1:3], True)])
    with pytest.raises(equinorm.EquinormError, match="are wrong"):  # ones are the same in any order
        equinorm.register_axes(gated_product, "bk,ok,k->bo", [(torch.ones(4, 3), torch.ones(5, 3), torch.ones(3), True)])
    with pytest.raises(equinorm.EquinormError, match="needs samples"):
        equinorm.register_axes(gated_product, "bk,ok,k->bo", [])


def test_calls_that_no_sample_shows_are_checked_in_use():
    equinorm.register_axes(gated_product, "bk,ok,k->bo", PRODUCTS)
    net = Products(is_ordered=True)
    assert families(net) == []
    assert "could not be confirmed" in str(equinorm.permutations(net, torch.randn(4, 3).double()).details())


def test_operators_with_laws_are_refused():
    with pytest.raises(equinorm.EquinormError, match="law for permutations already"):
        equinorm.register_axes(torch.ops.aten.linear.default, "bk,ok->bo", [(torch.randn(4, 3), torch.randn(5, 3))])
    equinorm.register_axes(gated_product, "bk,ok,k->bo", PRODUCTS)
    with pytest.raises(equinorm.EquinormError, match="law for permutations already"):
        equinorm.register_axes(gated_product, "bk,ok,k->bo", PRODUCTS)
