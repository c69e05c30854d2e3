"""Rules from users: right ones free what they say, wrong ones are refused."""

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm.discovery.rules import TABLE, Call, Label, Trace, contract


@torch.library.custom_op("equinorm_tests::scaled_relu", mutates_args=())
def scaled_relu(x: Tensor, weight: Tensor, floor: float) -> Tensor:
    """max(x · wᵀ, floor)."""
    return (x @ weight.t()).clamp(min=floor)


@scaled_relu.register_fake
def _(x, weight, floor):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("equinorm_tests::parts", mutates_args=())
def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.relu(), x.square()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(3, 6), nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 2)

    def forward(self, x):
        return self.down(scaled_relu(self.up(x).relu(), self.middle, 0.0))


SAMPLES = [(torch.randn(4, 3), torch.randn(5, 3), 0.0), (torch.randn(4, 3), torch.randn(5, 3), 0.3)]


def product(trace: Trace, call: Call) -> Label:
    """A matrix product; homogeneous if the floor is 0."""
    if call.floor != 0:
        trace.pin(call.x)
        trace.pin(call.weight)
        return Label(call.shape)
    return contract(trace, "bk,ok->bo", call.x, call.weight)


@pytest.fixture(autouse=True)
def _forget():
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


def test_a_right_rule_counts_from_then_on():
    net, x = Net().double(), torch.randn(4, 3, dtype=torch.float64)
    assert equinorm.symmetries(net, x).num_free == 0
    equinorm.register_rule(scaled_relu, SAMPLES)(product)
    group = equinorm.symmetries(net, x)
    assert group.num_free == 11
    before = net(x)
    group.rescale_(torch.randn(11, dtype=torch.float64))
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def careless(trace, call):
    return contract(trace, "bk,ok->bo", call.x, call.weight)


def along_only(trace, call):
    trace.merge(call.x, [-1])
    return Label(call.shape)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (careless, r"careless for equinorm_tests::scaled_relu.default is wrong: in .*\(float32\[4, 3\], float32\[5, 3\], "
         r"float\), with all tensors as activations, result 0 is off by [\d.e+-]+ of its largest entry"),
        (along_only, "is wrong"),
        (lambda trace, call: trace.label(call.x), r"returns labels of \[\(4, 3\)\] for results of \[\(4, 5\)\]"),
        (lambda trace, call: None, r"returns labels of \['NoneType'\]"),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused(rule, says):
    with pytest.raises(equinorm.EquinormError, match=says):
        equinorm.register_rule(scaled_relu, SAMPLES)(rule)
    assert "equinorm_tests::scaled_relu.default" not in TABLE


def test_several_results():
    def wrong(trace, call):
        return [trace.label(call.x), trace.label(call.x)]

    def right(trace, call):
        return [trace.label(call.x), trace.label(call.x).power(2)]

    with pytest.raises(equinorm.EquinormError, match="result 1 is off"):
        equinorm.register_rule(parts, [(torch.randn(3, 4),)])(wrong)
    assert equinorm.register_rule(parts, [(torch.randn(3, 4),)])(right) is right


@pytest.mark.parametrize(
    ("operator", "samples", "says"),
    [
        (torch.ops.aten.relu.default, [(torch.randn(3),)], "relu.default has a rule already: "),
        (torch.ops.aten.silu_.default, [(torch.randn(3),)], "writes into its inputs"),
        (torch.relu, [(torch.randn(3),)], "operator must be an operator of torch.ops with one overload"),
        (scaled_relu, [], "needs samples"),
        (torch.ops.aten.silu.default, [(torch.arange(3),)], "has no floating-point tensor"),
        (torch.ops.aten.silu.default, [(torch.zeros(3),)], "'self' of the sample .* is empty or zero throughout"),
        (torch.ops.aten.silu.default, [torch.randn(3, 3)], "must be a tuple of positional arguments, not Tensor"),
        (torch.ops.aten.log.default, [(-torch.rand(3),)], "are not finite"),
        (torch.ops.aten._chunk_cat.default, [([torch.randn(3)],)], "takes a list of tensors"),
    ],
)
def test_what_cannot_have_a_rule(operator, samples, says):
    with pytest.raises(equinorm.EquinormError, match=says):
        equinorm.register_rule(operator, samples)(lambda trace, call: trace.label(call.input))


@torch.library.custom_op("equinorm_tests::shifted", mutates_args=())
def shifted(x: Tensor, shift: Tensor | None = None) -> Tensor:
    return x.clone() if shift is None else x + shift


@shifted.register_fake
def _(x, shift=None):
    return torch.empty_like(x)


def test_arguments_that_no_sample_had_are_pinned():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.shift = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return self.down(shifted(self.up(x).relu(), self.shift if self.training else None).relu())

    equinorm.register_rule(shifted, [(torch.randn(4, 3),)])(lambda trace, call: trace.label(call.x))
    net, x = Shifts(), torch.randn(4, 3)
    assert [equinorm.symmetries(net.train(mode), x).num_free for mode in (False, True)] == [6, 0]


@torch.library.custom_op("equinorm_tests::powered", mutates_args=())
def powered(x: Tensor, exponent: int, shift: float = 0.0) -> Tensor:
    return x.abs() ** exponent + shift


@powered.register_fake
def _(x, exponent, shift=0.0):
    return torch.empty_like(x)


@pytest.mark.parametrize(("exponent", "shift", "free"), [(2, 0.0, 6), (3, 0.0, 6), (2, 0.5, 0)])
def test_numbers_that_no_sample_had_are_checked_where_they_are_used(exponent, shift, free):
    class Powers(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.down(powered(self.up(x), exponent, shift))

    equinorm.register_rule(powered, [(torch.randn(4, 3), 2)])(lambda trace, call: trace.label(call.x).power(call.exponent))
    net, x = Powers(), torch.randn(4, 3)
    group = equinorm.symmetries(net, x)
    assert group.num_free == free
    assert free or "its rule could not be confirmed for these arguments" in str(group)


@torch.library.custom_op("equinorm_tests::summed_from", mutates_args=())
def summed_from(x: Tensor, start: int) -> Tensor:
    """Entries from `start` on are replaced by the sum of their magnitudes."""
    rest = x[..., start:].abs().sum(-1, keepdim=True).expand(x[..., start:].shape)
    return torch.cat([x[..., :start], rest], -1)


@summed_from.register_fake
def _(x, start):
    return torch.empty_like(x)


def test_what_held_for_one_shape_is_not_believed_for_another():
    """A cut beyond the end confirms nothing for longer rows."""

    class Cut(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up, self.down = nn.Linear(3, width), nn.Linear(width, 2)

        def forward(self, x):
            return self.down(summed_from(self.up(x), 5))

    equinorm.register_rule(summed_from, [(torch.randn(4, 4), 4)])(lambda trace, call: trace.label(call.x))
    x = torch.randn(4, 3)
    assert [equinorm.symmetries(Cut(width), x).num_free for width in (9, 5, 9)] == [0, 5, 0]


def test_numbers_of_the_other_sign_are_tried():
    with pytest.raises(equinorm.EquinormError, match="is wrong"):
        equinorm.register_rule(torch.ops.aten.celu.default, [(torch.rand(3, 4),)])(lambda trace, call: trace.label(call.input))


def test_an_error_in_a_rule_names_it():
    def broken(trace: Trace, call: Call) -> Label:
        return trace.label(call.wait)

    with pytest.raises(
        equinorm.EquinormError, match=r"the rule .*broken for equinorm_tests::scaled_relu\.default raises on .*\(5, 3\)"
    ):
        equinorm.register_rule(scaled_relu, SAMPLES)(broken)


@pytest.mark.parametrize("equation", ["bk,ok", "bk->b", "bk,ok,k->bo", "...k,ok->...o"])
def test_an_equation_that_is_none_of_two_operands_is_refused(equation):
    with pytest.raises(equinorm.EquinormError, match="two operands and a result, such as 'bk,ok->bo'"):
        contract(Trace(), equation, Label((2, 3)), Label((4, 3)))


def test_equations_may_have_blanks():
    assert contract(Trace(), "b k, o k -> b o", Label((2, 3)), Label((4, 3))).shape == (2, 4)
