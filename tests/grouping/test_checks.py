"""Is a mapping right: missing readers, names in vain, pins, and what is wrong with the question."""

import pytest
import torch
from torch import nn

import equinorm


class Block(nn.Module):
    """A norm that two layers and a router read; the block's output is pinned."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b, self.router = nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 1)
        self.out = nn.Linear(3, 4)

    def forward(self, x):
        normed = self.norm(x)
        chosen = self.router(normed).sigmoid()
        return x + self.out(chosen * self.a(normed).relu() + (1 - chosen) * self.b(normed).relu())


@pytest.fixture(scope="module")
def symmetries():
    return equinorm.symmetries(Block(), (torch.randn(2, 4),))


def test_a_complete_mapping_is_right(symmetries):
    check = symmetries.check("norm", ["a", "b.weight", ("router.weight", 1)])
    assert check
    assert check.valid
    assert str(check) == "norm.weight[0] → a.weight[1], b.weight[1] and router.weight[1]: right."


def test_a_missing_reader_is_named_with_its_line(symmetries):
    check = symmetries.check("norm", ["a", "b"])
    assert not check.valid
    assert [str(axis) for axis in check.missing] == ["router.weight[1]"]
    assert "router.weight[1] is missing, which the network uses in aten.linear at test_checks.py:" in str(check)
    assert not check.extra
    assert not check.pinned


def test_what_does_not_read_it_is_named(symmetries):
    check = symmetries.check(("norm.weight", 0), ["a", "b", "router", "out"])
    assert not check.valid
    assert not check.missing
    (text,) = check.extra
    assert text.startswith("out.weight does not read what norm.weight[0] scales: it takes out what ")
    assert "a.weight[0]" in text


def test_another_axis_of_a_reader_is_in_vain(symmetries):
    check = symmetries.check("norm", ["a", "b", ("router.weight", 0)])
    assert [str(axis) for axis in check.missing] == ["router.weight[1]"]
    assert len(check.extra) == 1


def test_producers_that_must_move_too_are_missing(symmetries):
    check = symmetries.check("a", ["out"])
    assert [str(axis) for axis in check.missing] == ["b.weight[0]"]


def test_a_pinned_axis_is_wrong_with_the_reason(symmetries):
    check = symmetries.check("out", ["a"])
    assert not check.valid
    assert [pin.reason.operation for pin in check.pinned] == ["aten.add"]
    assert "out.weight[0] is pinned in 4 channels by aten.add at test_checks.py:" in str(check)


def test_an_axis_that_brings_nothing_in_is_pinned(symmetries):
    check = symmetries.check(("a.weight", 1), [])  # an in-axis: it takes out what the norm brings in
    assert not check.valid
    assert "a.weight[1] is pinned in 4 channels by the network (it takes out what norm.weight[0] brings in)" in str(check)


def test_shared_scales_are_noted():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.o = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.o(self.v(x).repeat(1, 2))

    check = equinorm.symmetries(Repeated(), (torch.randn(2, 3),)).check("v", ["o"])
    assert check.valid
    assert check.notes == ("4 channels of o.weight[1] share 2 scales, up to 2 each.",)


class Middle(nn.Module):
    """Two linear layers, and what is done in between."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(3, 4), nn.Linear(4, 2), middle
        self.vector = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        return self.second(self.middle(self.first(x), self.vector))


def checked(middle, *balance):
    return equinorm.symmetries(Middle(middle), (torch.randn(5, 3),)).check("first", balance)


def test_a_bias_that_no_tool_moves_is_missing():
    check = checked(lambda x, vector: (x + vector).relu(), "second")
    assert [str(axis) for axis in check.missing] == ["vector[0]"]  # the layer's own bias is moved with its weight
    assert check.notes == ("vector[0] scales as first.weight[0] does.",)


@pytest.mark.parametrize(
    ("middle", "balance", "words"),
    [
        (lambda x, vector: x.relu().square(), "second", "second.weight[1] scales by s^-2 where first.weight[0] scales by s,"),
        (lambda x, vector: (x / vector).tanh(), "vector", "vector[0] scales by s^1 where first.weight[0] scales by s,"),
        (lambda x, vector: (x * vector).tanh(), ("vector", 0), ""),
    ],
)
def test_what_moves_by_another_power_than_the_inverse_is_wrong(middle, balance, words):
    check = checked(middle, balance)
    assert check.valid == (not words)
    assert words in str(check)
    assert not check.missing
    assert not check.extra


def test_a_layer_that_both_brings_in_and_takes_out_must_be_scaled_twice():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.loop, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x).relu()
            for _ in range(3):
                x = self.loop(x).relu()
            return self.last(x)

    check = equinorm.symmetries(Repeated(), (torch.randn(2, 3),)).check("first", ["loop", "last"])
    assert [str(axis) for axis in check.missing] == ["loop.weight[0]"]


def test_queries_and_keys_scale_inversely_where_the_axis_is_named():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return (self.q(x) @ self.k(x).mT).softmax(-1)

    symmetries = equinorm.symmetries(Products(), (torch.randn(5, 3),))
    assert symmetries.check("q", [("k.weight", 0)])
    assert symmetries.check("q", [("k", -2)])
    assert not symmetries.check("q", ["k"])  # which means what k reads


def test_a_gain_to_which_one_is_added_is_noted():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.zeros(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x.tanh() * (1 + self.weight))

    symmetries = equinorm.symmetries(Offset(), (torch.randn(5, 3),))
    check = symmetries.check("weight", ["layer"])
    assert check.valid
    assert check.notes == ("The network adds 1 to weight: the sum scales.",)
    (mapping,) = symmetries.mappings()
    assert mapping.offset == 1
    assert str(mapping) == "weight (plus 1) → layer"


@pytest.mark.parametrize(
    ("smooth", "balance", "words"),
    [
        ("nor", ["a"], "has no module or tensor 'nor'"),
        ("model.a", ["b"], "Did you mean a.weight?"),
        ("normm", ["a"], "no module or tensor 'normm' with weights. Did you mean norm.weight"),
        ("norm", ["c"], "has no module or tensor 'c'"),
        ("norm", "a", "balance must be a list of names. For one: ['a']"),
        ("norm", ("a.weight", 1), "balance must be a list of names. For one: [('a.weight', 1)]"),
        ("norm", None, "balance must be a list of names, not None"),
        (("norm.weight", 1), ["a"], "norm.weight of shape (4,) has no axis 1"),
        (("norm", -2), ["a"], "norm.weight of shape (4,) has no axis -2"),
        (3, ["a"], "a mapping names modules, tensors, or (tensor, axis), not 3"),
    ],
)
def test_names_that_are_not_there_are_refused(symmetries, smooth, balance, words):
    with pytest.raises(equinorm.EquinormError) as error:
        symmetries.check(smooth, balance)
    assert words in str(error.value)


def test_gains_to_which_one_is_added_stay_in_half_precision_and_the_check_says_so():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.zeros(3)), nn.Linear(3, 2)

        def forward(self, x):
            normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
            return self.layer((normed * (1.0 + self.weight.float())).type_as(x))

    symmetries = equinorm.symmetries(Offset().bfloat16(), (torch.randn(5, 3, dtype=torch.bfloat16),))
    reason = "by aten.add (half precision cannot store w where 1 + w scales) at test_checks.py:"
    text = str(symmetries.check("weight", ["layer"]))
    assert "layer.weight does not read what weight[0] scales: what it reads is pinned" in text
    assert f"weight[0] is pinned in 3 channels {reason}" in text
    mappings = symmetries.mappings()
    ((group, why),) = mappings.left_out
    assert group.is_pinned
    assert not mappings
    assert f"is pinned {reason}" in why
    assert why.endswith(": analyse the model in float32")
