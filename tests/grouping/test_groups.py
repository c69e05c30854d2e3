"""Scale groups: who brings scales in, who takes them out, and that scaling so changes nothing."""

import copy

import pytest
import torch
from torch import nn

import equinorm
from equinorm.grouping.groups import ScaleGroup, ScaleGroups


class Concatenated(nn.Module):
    """Two convolutions side by side, a depthwise one behind them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.joint, self.depthwise, self.last = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 5, 3, groups=5), nn.Linear(5, 2)

    def forward(self, x):
        first = self.first(x).relu()
        both = torch.cat([first, self.second(first).relu()], 1)
        return self.last(self.depthwise(self.joint(both).relu()).relu().mean((2, 3)))


class Attention(nn.Module):
    """A norm, grouped queries (two heads of four, one of keys and values), and a gated layer behind another norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(8, elementwise_affine=True), nn.RMSNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, size, bias=False) for size in (8, 4, 4, 8))
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        batch, length, _ = x.shape
        normed = self.norm(x)
        q = self.q(normed).view(batch, length, 2, 4).transpose(1, 2)
        k, v = (layer(normed).view(batch, length, 1, 4).transpose(1, 2).expand(-1, 2, -1, -1) for layer in (self.k, self.v))
        mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, 8))
        normed = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


@pytest.fixture(scope="module")
def convolutional():
    torch.manual_seed(0)
    args = (torch.randn(2, 3, 8, 8, dtype=torch.float64),)
    return equinorm.symmetries(Concatenated().double(), args), args


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    args = (torch.randn(2, 5, 8, dtype=torch.float64),)
    return equinorm.symmetries(Attention().double(), args), args


def in_words(group: ScaleGroup) -> tuple[list[str], list[str], list[str]]:
    return tuple(sorted(map(str, axes)) for axes in (group.up, group.down, group.along))


def test_each_producer_of_a_concatenation_has_its_group(convolutional):
    free = [in_words(group) for group in convolutional[0].groups() if not group.is_pinned]
    assert free == [
        (["first.weight[0]"], ["joint.weight[1]", "second.weight[1]"], ["first.bias[0]"]),
        (["second.weight[0]"], ["joint.weight[1]"], ["second.bias[0]"]),
        (["joint.weight[0]"], ["depthwise.weight[0]"], ["joint.bias[0]"]),
        (["depthwise.weight[0]"], ["last.weight[1]"], ["depthwise.bias[0]"]),
    ]


def test_channels_of_a_group_are_those_of_its_axes(convolutional):
    first, second, *_ = convolutional[0].groups()
    (joint,) = (axis for axis in first.down if axis.tensor == "joint.weight")
    assert joint.channels.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert second.down[0].channels.tolist() == [0, 0, 0, 0, 5, 6, 7, 8]
    assert joint.exponents.flatten().tolist() == [-1] * 4 + [0] * 4
    assert first.ids.tolist() == [1, 2, 3, 4]


def test_groups_of_attention(attention):
    free = [in_words(group) for group in attention[0].groups() if not group.is_pinned]
    assert free == [
        (["norm.weight[0]"], ["k.weight[1]", "q.weight[1]", "v.weight[1]"], []),
        (["k.weight[0]", "q.weight[0]"], [], []),
        (["v.weight[0]"], ["o.weight[1]"], []),
        (["norm2.weight[0]"], ["gate.weight[1]", "up.weight[1]"], []),
        (["up.weight[0]"], ["down.weight[1]"], ["up.bias[0]"]),
    ]


def test_a_group_knows_what_carries_it(attention):
    _, products, values, *_ = attention[0].groups()
    carriers = [value.made_by for value in values.activations]
    assert carriers[0].module == "v"
    assert carriers[0].source.startswith("test_groups.py:")
    assert all(value.name in attention[0].values for value in values.activations)
    assert "softmax" not in " ".join(reason.operation for reason in carriers)
    assert {value.made_by.module for value in products.activations} >= {"q", "k"}


def test_pinned_groups_come_last_with_their_reasons(attention):
    pinned = [group for group in attention[0].groups() if group.is_pinned]
    assert [str(group.up[0]) for group in pinned] == ["o.weight[0]", "gate.weight[0]", "down.weight[0]"]
    assert "SiLU" in str(pinned[1])
    assert all(group.is_pinned for group in attention[0].groups()[5:])


@pytest.mark.parametrize("which", ["convolutional", "attention"])
def test_scaling_by_a_group_changes_nothing(which, request):
    symmetries, args = request.getfixturevalue(which)
    for group in symmetries.groups():
        if group.is_pinned:
            continue
        model = copy.deepcopy(symmetries.model)
        z = torch.zeros(symmetries.num_free, dtype=torch.float64)
        z[group.ids - 1] = torch.randn(len(group.ids), dtype=torch.float64)
        tensors = dict(model.named_parameters())
        with torch.no_grad():
            for axis in group.axes:  # by what the group says alone, not by rescale_
                tensors[axis.tensor].mul_(axis.log_scales(z).exp())
        assert equinorm.deviation(symmetries.model, model, args) < 1e-12
        with torch.no_grad():
            tensors[group.axes[0].tensor].mul_(1.1)
        assert equinorm.deviation(symmetries.model, model, args) > 1e-6


def test_a_group_reads_like_a_sentence(attention):
    text = str(attention[0].groups()[1])
    assert text.startswith("q.weight[0] and, inversely, k.weight[0] bring in 4 scales.\n  Carried by ")
    first = str(attention[0].groups()[0])
    assert "norm.weight[0] brings in 8 scales.\n  q.weight[1], k.weight[1] and v.weight[1] take them out." in first
    assert repr(attention[0].groups()) == "8 scale groups"
    assert str(ScaleGroups([*attention[0].groups()] * 2, {})).endswith("… and 5 more groups")


def test_groups_of_a_tensor_by_any_of_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.first(x).relu())

    groups = equinorm.symmetries(Tied(), (torch.randn(5, 3),)).groups()
    assert groups.of("last.weight") == groups.of("first.weight") != []
    with pytest.raises(
        equinorm.EquinormError, match=r"no parameter or floating-point buffer 'last.weigth'. Did you mean last\.w"
    ):
        groups.of("last.weigth")


def test_halves_of_a_fused_layer_are_groups_of_their_own():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.down = nn.Linear(3, 8), nn.Linear(4, 2)

        def forward(self, x):
            gate, up = self.both(x).chunk(2, -1)
            return self.down(nn.functional.silu(gate) * up)

    symmetries = equinorm.symmetries(Gated(), (torch.randn(5, 3),))
    group, *_ = symmetries.groups()
    assert group.up[0].channels.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert [pin.reason.operation for pin in group.pinned_by] == ["aten.silu"]
    check = symmetries.check("both", ["down"])
    assert check.valid
    assert check.notes == ("4 of 8 channels of both.weight[0] are meant.",)


def test_mappings_name_every_reader_in_order(attention):
    mappings = attention[0].mappings()
    assert [str(mapping) for mapping in mappings] == ["norm → q, k and v", "norm2 → gate and up", "up → down"]
    assert [mapping.is_gain for mapping in mappings] == [True, True, False]
    reasons = [why for _, why in mappings.left_out]
    assert len(reasons) == 2
    assert "cancel in a product" in reasons[0]
    assert "some several times" in reasons[1]
    assert str(mappings).splitlines()[3:] == [f"left out, 1 group: {why}" for why in reasons]


def test_mappings_of_many_layers_are_one_pattern():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4), nn.Tanh()) for _ in range(3)))
    mappings = equinorm.symmetries(nn.Sequential(net), (torch.randn(2, 4),)).mappings()
    assert mappings.patterns() == {("0.*.0", ("0.*.2",)): ["0", "1", "2"]}


def test_a_reader_in_another_layer_keeps_its_number():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 4)}) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer["b"](layer["a"](x).relu()).relu()
            return x

    assert equinorm.symmetries(Layers(), (torch.randn(2, 4),)).mappings().patterns() == {
        ("layers.*.a", ("layers.*.b",)): ["0", "1"],
        ("layers.*.b", ("layers.1.a",)): ["0"],
    }


def test_experts_of_one_layer_are_one_pattern():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.experts = (
                nn.LayerNorm(4),
                nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4)) for _ in range(2)),
            )

        def forward(self, x):
            x = self.norm(x)
            return sum(expert(x) for expert in self.experts)

    net = nn.Sequential(nn.Sequential(Experts(), Experts()))
    assert equinorm.symmetries(net, (torch.randn(2, 4),)).mappings().patterns() == {
        ("0.*.norm", ("0.*.experts.*.0",)): ["0", "1"],
        ("0.*.experts.*.0", ("0.*.experts.*.2",)): ["0", "1"],
    }


class Between(nn.Module):
    """Two linear layers, and what is done in between."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(3, 8), nn.LazyLinear(2), middle
        self.vector = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return self.second(self.middle(self.first(x), self.vector))


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (lambda x, v: (x + v).relu(), "vector[0] must move along with first.weight[0]"),
        (lambda x, v: (x / v).tanh(), "vector[0] scales by s^1 where first.weight[0] scales by s, not by s^-1"),
        (lambda x, v: x.relu().square(), "second.weight[1] scales by s^-2 where first.weight[0] scales by s, not by s^-1"),
        (lambda x, v: torch.cat([x[:, :2].tanh(), x[:, 2:]], 1), "only 6 of 8 channels of first.weight[0] scale"),
        (
            lambda x, v: torch.cat([x, v.tanh().expand_as(x)], 1),
            "second.weight[1] reads other channels than those of first.weight[0] too",
        ),
        (lambda x, v: x[:, :4] * x[:, 4:].sigmoid(), "the channels of first.weight[0] that scale are not its last"),
        (
            lambda x, v: x.flip(1),
            "second.weight[1] reads the channels of first.weight[0] in another order, or some several times",
        ),
        (lambda x, v: (x[:, :4] * x[:, 4:]).tanh(), "first.weight[0] brings the scales in, which cancel in a product"),
    ],
)
def test_a_group_that_is_no_mapping_says_why(middle, words):
    net, x = Between(middle), torch.randn(5, 3)
    net(x)
    mappings = equinorm.symmetries(net, (x,)).mappings()
    assert words in [why for _, why in mappings.left_out]
    assert not [mapping for mapping in mappings if mapping.smooth == "first"]


def test_two_factors_of_one_axis_are_one_subject():
    net = Between(lambda x, v: x[:, :4].relu() * x[:, 4:])
    net(torch.randn(5, 3))
    group, *_ = equinorm.symmetries(net, (torch.randn(5, 3),)).groups()
    assert "\n  second.weight[1] takes them out.\n" in str(group)
