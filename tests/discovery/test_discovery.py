"""What discovery promises besides the rules: an untouched model, reasons, hooks, mutation, ties, modes, errors."""

import copy
import math
from collections import defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import equinorm


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def check(net: nn.Module, args: tuple, num_free: int) -> equinorm.Symmetries:
    """So many classes, and a random member of the group keeps the function."""
    symmetries = equinorm.symmetries(net, args)
    assert symmetries.num_free == num_free
    twin = copy.deepcopy(net)
    z = torch.randn(num_free, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equinorm.symmetries(twin, args).rescale_(z)
    assert equinorm.deviation(twin, net, args) <= 1e-12
    return symmetries


def test_the_model_is_untouched():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 3))
    net[1].eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    versions = [p._version for p in net.parameters()]
    equinorm.symmetries(net, torch.randn(2, 3, 8, 8))
    assert modes == [module.training for module in net.modules()]
    assert versions == [p._version for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(torch.nn.functional.gelu(hidden))  # the line that pins


def test_pins_name_operation_and_source_line():
    symmetries = equinorm.symmetries(Smooth().double(), X)
    (pin,) = [pin for pin in symmetries.pins if pin.tensor == "up.weight"]
    assert pin.channels == 6
    assert pin.reason.operation == "aten.gelu"
    assert pin.reason.source.startswith("test_discovery.py:")
    assert "the line that pins" in pin.reason.code
    assert str(pin.reason) in str(symmetries)


def test_families_and_text():
    symmetries = equinorm.symmetries(two_layers(), X)
    assert [(f.tensor, f.axis, f.ids) for f in symmetries.families] == [("0.weight", 0, range(1, 7))]
    text = str(symmetries)
    assert "6 free scale classes" in text
    assert "2.weight [3, 6]: axis 1 ÷ 0.weight[0]" in text
    assert symmetries.coverage == (24 + 6 + 18) / (24 + 6 + 18 + 3)


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_what_hooks_read_is_pinned(kind):
    net, seen = two_layers(), []
    if kind == "forward":
        net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    elif kind == "pre":
        net[2].register_forward_pre_hook(lambda module, args: seen.append(args))
    else:
        net[0].register_full_backward_hook(lambda module, into, out: None)
    symmetries = equinorm.symmetries(net, X)
    assert symmetries.num_free == 0
    assert any("observed" in pin.reason.operation for pin in symmetries.pins)
    assert len(net[0]._forward_hooks) == (kind == "forward")


@pytest.mark.parametrize(
    "register", [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook]
)
def test_what_hooks_of_all_modules_read_is_pinned(register):
    seen: list = []
    handle = register(lambda module, *values: seen.append(values))
    try:
        assert equinorm.symmetries(two_layers(), X).num_free == 0
    finally:
        handle.remove()
    assert equinorm.symmetries(two_layers(), X).num_free == 6


def test_a_hook_elsewhere_pins_nothing():
    net = nn.Sequential(*two_layers(), nn.ReLU(), nn.Linear(3, 2)).double()
    net[4].register_forward_hook(lambda module, args, output: None)
    assert equinorm.symmetries(net, X).num_free == 6


class Mutating(nn.Module):
    """Changes a tensor in place that it reads again, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        part = hidden[:, :2]
        part.add_(1.0)
        return self.down(torch.relu(hidden))


def test_mutation_through_a_view_is_seen():
    check(Mutating().double(), (X,), 4)


class Dropping(nn.Module):
    """Writes a slice of what a dropout takes, or of what it returns: the same tensor where it does nothing."""

    def __init__(self, before: bool, result: bool = False) -> None:
        super().__init__()
        self.before, self.result = before, result
        self.up, self.down, self.dropout = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.up(x).clone()
        dropped = self.dropout(hidden)
        (hidden if self.before else dropped)[:, :2].add_(1.0)
        out = self.down(torch.relu(dropped if self.before else hidden))
        return (out, dropped) if self.result else out


@pytest.mark.parametrize(("before", "result", "num_free"), [(True, False, 4), (False, False, 4), (True, True, 0)])
def test_slices_written_around_an_idle_dropout(before, result, num_free):
    check(Dropping(before, result).double().eval(), (X,), num_free)


class Filled(nn.Module):
    """Fills a new tensor in place: zeros fit any scale, the last column does not."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.up, self.down = value, nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        mask = hidden.new_zeros(6)
        mask[5:] = self.value
        return self.down(torch.relu(hidden + mask))


@pytest.mark.parametrize(("value", "num_free"), [(0.0, 6), (1.0, 5)])
def test_new_tensors_filled_in_place(value, num_free):
    check(Filled(value).double(), (X,), num_free)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.side, self.down = (nn.Linear(a, b, bias=False) for a, b in [(4, 6), (4, 6), (6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        out = torch.zeros_like(hidden)
        out[:, :3] = self.side(x)[:, :3]
        out[:, 3:] = hidden[:, 3:]
        return self.down(torch.relu(out))


def test_slices_overwritten_by_activations():
    net = Overwriting().double()
    symmetries = equinorm.symmetries(net, X)
    twin = copy.deepcopy(net)
    equinorm.symmetries(twin, X).rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    assert equinorm.deviation(twin, net, X) <= 1e-12
    assert symmetries.num_free >= 6


class Indexed(nn.Module):
    """Reads channels in an order that a buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.register_buffer("order", torch.tensor([3, 1, 5, 0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))[:, self.order])


class Counting(Indexed):
    """The same, but the buffer changes at every call: no constant."""

    def forward(self, x: Tensor) -> Tensor:
        self.order.copy_(self.order.roll(1))
        return super().forward(x)


def test_integer_buffers_are_constants_unless_they_change():
    net = Indexed().double()
    check(net, (X,), 6)
    before = net.order.clone()
    changing = Counting().double()
    assert equinorm.symmetries(changing, X).num_free == 1  # any channel may be read anywhere
    assert torch.equal(changing.order, before)


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


def test_roles_and_depths():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).double().eval()
    scalings = {s.name: (s.role, s.depth) for s in equinorm.symmetries(net, torch.randn(1, 3, 8, 8).double()).scalings}
    assert scalings["0.weight"] == ("weight", 1)
    assert scalings["0.bias"] == ("bias", 1)
    assert scalings["1.weight"] == ("weight", 2)
    assert scalings["1.bias"] == ("bias", 2)
    assert scalings["4.weight"] == ("weight", 3)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_read_exactly(training):
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3)).double().train(training)
    )
    symmetries = check(net, (torch.randn(4, 3, 9, 9).double(),), 5)
    moving = [s.name for s in symmetries.scalings if s.factors]
    assert moving == ["1.weight", "1.bias", "3.weight"]


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_read_with_its_statistics(training):
    """Convolution, γ, β, mean and (squared) variance move together; the outputs only up to eps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-9), nn.ReLU(), nn.Conv2d(5, 2, 3)).double().train(training)
    net[1].running_mean.normal_()
    args = (torch.randn(4, 3, 9, 9).double(),)
    symmetries = equinorm.symmetries(net, args, batch_norm="statistics")
    assert symmetries.num_free == 5
    exponents = {s.name: [e for e, _ in s.factors] for s in symmetries.scalings}
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight", "3.bias"]
    assert [exponents[name] for name in names] == [[1.0], [1.0], [1.0], [1.0], [1.0], [2.0], [-1.0], []]
    before = copy.deepcopy(net)
    symmetries.rescale_(torch.randn(5, dtype=torch.float64) / 2)
    assert not torch.equal(before[1].running_var, net[1].running_var)
    assert 0 < equinorm.deviation(net, before, args) <= 1e-6


def test_meta_tensors_suffice():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        assert equinorm.symmetries(net, torch.empty(2, 4)).num_free == 6


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


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_not_exportable_says_what_to_do():
    net = nn.Sequential(nn.Linear(4, 4), Branching())
    with pytest.raises(equinorm.ExportError, match=r"cannot export Sequential with inputs \(float32\[2, 4\]\)") as error:
        equinorm.symmetries(net, torch.randn(2, 4))
    assert "control flow" in str(error.value)
    assert error.value.cause is not None


def test_wrong_shapes_are_an_export_error():
    with pytest.raises(equinorm.ExportError, match=r"float64\[2, 5\]"):
        equinorm.symmetries(two_layers(), torch.randn(2, 5).double())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: equinorm.symmetries(torch.relu, X), "torch.nn.Module"),
        (lambda: equinorm.symmetries(two_layers(), {"x": X}), "tuple of inputs"),
        (lambda: equinorm.symmetries(two_layers(), X, batch_norm="fused"), "'affine' or 'statistics'"),
        (lambda: equinorm.symmetries(two_layers(), X, also=[5]), "also must hold further inputs"),
    ],
)
def test_arguments_out_of_range(call, words):
    with pytest.raises(equinorm.EquinormError, match=words):
        call()


def test_a_group_of_one_million_channels_is_no_burden():
    """Labels are stride-0 along the batch: neither batch nor width blows them up."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(64, 1 << 20), nn.ReLU(), nn.Linear(1 << 20, 64))
        symmetries = equinorm.symmetries(net, torch.empty(4096, 64))
    assert symmetries.num_free == 1 << 20
    assert all(ids.numel() <= 1 << 20 for scaling in symmetries.scalings for _, ids in scaling.factors)
    assert math.isclose(symmetries.coverage, 1.0, abs_tol=1e-3)


class ShiftedGain(nn.Module):
    """A norm with gain 1 + w, as in Gemma; w may also be read elsewhere."""

    def __init__(self, also: str = "") -> None:
        super().__init__()
        self.also = also
        self.gain = nn.Parameter(0.3 * torch.randn(4))
        self.up = nn.Linear(4, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        out = self.up(x * (1 + self.gain))
        if self.also == "raw":
            out = out + self.gain.sum()
        if self.also == "other":
            out = out * (self.gain - 2).sum()
        return out * (1 + self.gain).square().mean() if self.also == "again" else out


def test_gains_written_one_plus_w_move():
    torch.manual_seed(0)
    net = ShiftedGain().double()
    symmetries = check(net, (X,), 4)
    assert {s.name: s.offset for s in symmetries.scalings} == {"gain": 1.0, "up.weight": 0.0}
    assert "gain + 1 [4]: axis 0 × gain[0]" in str(symmetries)
    balance = symmetries.balance(tol=1e-13)
    balance.apply_()
    torch.testing.assert_close((1 + net.gain).abs(), net.up.weight.norm(dim=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("also", "num_free"), [("raw", 0), ("other", 0), ("again", 1)])
def test_shifted_gains_with_other_uses(also, num_free):
    check(ShiftedGain(also).double(), (X,), num_free)


def test_shifted_gains_that_would_lose_their_precision_are_refused():
    net = ShiftedGain()
    symmetries = equinorm.symmetries(net, X.float())
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(equinorm.RescaleError, match=r"uses 1 \+ gain"):
        symmetries.rescale_(torch.full((4,), -9.0))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert equinorm.symmetries(net.bfloat16(), X.bfloat16()).num_free == 0


class Writes(nn.Module):
    """A hidden value meets memory that something else writes or shares."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("memory", torch.zeros(2, 6))
        self.alias = self.up.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        if self.how == "noise into zeros":
            noise = torch.zeros_like(hidden)
            noise[:, :4].normal_()
            hidden = hidden + noise
        elif self.how == "drawn into zeros":
            noise = torch.zeros_like(hidden)
            noise[:, :4] = torch.rand(2, 4, dtype=x.dtype)
            hidden = hidden + noise
        elif self.how == "remembered":
            out = self.down(hidden + self.memory)
            self.memory.copy_(hidden)
            return out
        elif self.how == "assigned":
            out = self.down(hidden + self.memory)
            self.memory = hidden.detach()
            return out
        elif self.how == "aliased attribute":
            return self.down(hidden) + self.alias.sum()
        elif self.how == "aliased by einsum":
            view = torch.einsum("ij->ij", hidden)
            view.mul_(x.sum())
            view.add_(1.0)
        elif self.how == "aliased by dropout":
            view = torch.dropout(hidden, 0.5, False)
            view[:, 0] = 1.0
        elif self.how == "input":
            x.add_(hidden[:, :4])
        return self.down(hidden)


@pytest.mark.parametrize(
    ("how", "most"),
    [
        ("noise into zeros", 2),
        ("drawn into zeros", 2),
        ("remembered", 0),
        ("assigned", 0),
        ("aliased attribute", 0),
        ("aliased by einsum", 0),
        ("aliased by dropout", 6),  # what is overwritten moves alone
        ("input", 2),
    ],
)
def test_memory_that_something_else_writes_or_shares(how, most):
    torch.manual_seed(0)
    net = Writes(how).double()
    net.alias = net.up.bias.detach()
    symmetries = equinorm.symmetries(net, X.clone())
    assert symmetries.num_free <= most
    before = copy.deepcopy(net)
    before.alias = before.up.bias.detach()
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    for _ in range(2):  # the second call reads what the first has written
        torch.manual_seed(1)
        a, given_a = net(given := X.clone()), given
        torch.manual_seed(1)
        b, given_b = before(given := X.clone()), given
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given_a, given_b, rtol=1e-12, atol=1e-12)


def test_attributes_that_a_forward_assigns_are_put_back():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 5), None

        def forward(self, x):
            self.last = self.layer(x).relu()
            self.count = 1
            return self.last

    model = Keeps()
    equinorm.symmetries(model, (torch.randn(2, 4),))
    assert model.last is None
    assert not hasattr(model, "count")


@pytest.mark.parametrize("where", ["attribute", "dict", "list", "nested", "deque", "object", "tuple"])
def test_what_a_forward_keeps_for_later_calls_is_pinned(where):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
            self.cache, self.seen, self.last = {"lists": defaultdict(list)}, [], None
            self.queue, self.state = deque(), SimpleNamespace()

        def forward(self, x):
            if where == "dict" and "bias" not in self.cache:
                self.cache["bias"] = self.a.bias * 2
            bias = self.cache["bias"] if where == "dict" else self.a.bias * 2
            h = (nn.functional.linear(x, self.a.weight) + bias).relu()
            if where == "list":
                self.seen.append(h)
            if where == "nested":
                self.cache["lists"]["h"].append(h)
            if where == "deque":
                self.queue.append(h)
            if where == "object":
                self.state.h = h
            if where == "attribute":
                self.last = h
            if where == "tuple":
                self.last = (1, (h, None))
            return self.c(self.b(h).relu())

    model, x = Keeps().double(), torch.randn(2, 4, dtype=torch.float64)
    group = equinorm.symmetries(model, x)
    assert (group.num_free, model.last, model.seen, len(model.queue), vars(model.state)) == (6, None, [], 0, {})
    assert model.cache == {"lists": {}}
    assert any(pin.reason.operation == "equinorm.observed" for pin in group.pins)
    before = model(x)
    group.rescale_(torch.randn(6, dtype=torch.float64))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_recomputed_weights_are_not_kept():
    """The older weight norm assigns the weight anew before every call."""
    old = torch.nn.utils.weight_norm(nn.Linear(4, 5))
    net = nn.Sequential(old, nn.ReLU(), nn.Linear(5, 3))
    assert equinorm.symmetries(net, torch.randn(2, 4)).num_free >= 5
    assert not any(pin.reason.operation == "equinorm.observed" for pin in equinorm.symmetries(net, torch.randn(2, 4)).pins)


def test_hooks_that_a_model_installs_at_its_first_call_are_installed_once():
    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen, self.ready = nn.Linear(4, 5), [], False

        def forward(self, x):
            if not self.ready:
                self.layer.register_forward_hook(lambda module, args, output: self.seen.append(output))
                self.ready = True
            return self.layer(x).relu()

    model = Records()
    equinorm.symmetries(model, (torch.randn(2, 4),))
    assert (model.ready, model.seen, len(model.layer._forward_hooks)) == (False, [], 0)
    model(torch.randn(2, 4))
    assert len(model.seen) == 1


@pytest.mark.parametrize("write", [False, True])
def test_a_hook_reads_what_the_model_itself_does_not_use(write):
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.side, self.down = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            h = self.up(x).relu()
            self.side(h)
            if write:
                h = h.clone()
                h[:, :1] = 0
            return self.down(h)

    model, x = Side(), torch.randn(5, 3)
    assert equinorm.symmetries(model, x).num_free == 4
    model.side.register_forward_hook(lambda *_: None)
    assert equinorm.symmetries(model, x).num_free == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_wrappers_are_looked_through(wrap):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    found = equinorm.symmetries(wrap(model), (torch.randn(2, 4),))
    assert (found.num_free, [scaling.name for scaling in found.scalings]) == (5, ["0.weight", "0.bias", "2.weight", "2.bias"])


def test_arguments_of_the_wrong_kind_are_named():
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 4)
    with pytest.raises(equinorm.EquinormError, match="kwargs must be a dict of keyword inputs, not list"):
        equinorm.symmetries(model, (inputs,), [1])
    with pytest.raises(equinorm.RescaleError, match=r"log_scales must be a tensor of shape \(5,\), not NoneType"):
        equinorm.symmetries(model, (inputs,)).rescale_(None)
    with pytest.raises(equinorm.EquivalenceError, match="args must be a tuple of inputs, not NoneType"):
        equinorm.deviation(model, model, None)


class ListsOfWrites(nn.Module):
    """Writes into zeros through an operation on lists of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        shift = x.new_zeros(6)
        torch._foreach_add_([shift], [x.new_ones(6)])
        return self.down(self.up(x).relu() + shift)


def test_writes_into_lists_of_tensors():
    check(ListsOfWrites().double(), (X,), 0)


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


def test_unused_parameters_are_listed():
    net = two_layers()
    net.spare = nn.Linear(2, 5).double()
    net.forward = lambda x: net[2](net[1](net[0](x)))
    pins = {pin.tensor: (pin.channels, str(pin.reason)) for pin in equinorm.symmetries(net, X).pins}
    assert pins["spare.weight"] == pins["spare.bias"] == (5, "no operation (the graph does not use it)")


def test_tensors_without_a_shape_are_refused():
    with pytest.raises(equinorm.ExportError, match=r"tensors without a shape yet, as 0\.weight: run it once"):
        equinorm.symmetries(nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)), X.float())


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
    assert equinorm.symmetries(net, X).num_free == 6 + 6  # six rows that these two inputs do not read
    for also in ((long,), long, {"x": long}):
        args = () if isinstance(also, dict) else X
        kwargs = {"x": X} if isinstance(also, dict) else None
        assert equinorm.symmetries(net, args, kwargs, also=[also]).num_free == 6
    net = Longer().double()
    assert equinorm.symmetries(net, X, also=[X[:1]]).num_free == 6 + 6
    assert equinorm.symmetries(net, X, also=[long]).num_free == 0


@pytest.mark.parametrize("change", [lambda net: net.append(nn.ReLU()), lambda net: net.__setitem__(1, nn.GELU())])
def test_a_model_that_changed_is_refused(change):
    net = two_layers()
    found = equinorm.symmetries(net, X)
    balance = found.balance()
    found.rescale_(torch.ones(6))  # a rescaling is no change
    change(net)
    with pytest.raises(equinorm.RescaleError, match="since the model was analysed"):
        found.rescale_(torch.ones(6))
    with pytest.raises(equinorm.RescaleError):
        balance.apply_()


def test_parameters_may_be_replaced_by_others_of_their_shapes():
    net = two_layers()
    found = equinorm.symmetries(net, X)
    net.load_state_dict(two_layers().state_dict(), assign=True)
    before = net(X)
    found.rescale_(torch.ones(6))
    assert torch.allclose(net(X), before, rtol=1e-12)


def test_scales_that_cancel_do_not_count():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    found = equinorm.symmetries(net, X)
    moving = [scaling.name for scaling in found.scalings if scaling.factors]
    assert moving == ["0.parametrizations.weight.original"]
    assert found.coverage == 32 / 67


def test_sparse_buffers():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(2).double().to_sparse())
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.sparse.mm(self.adjacency, self.up(x)).relu())

    check(Graph().double(), (X,), 6)


def test_empty_batches():
    assert equinorm.symmetries(two_layers(), X[:0]).num_free in (0, 6)


class Merging(nn.Module):
    """One law pins a class that another law, of the same sum, has three of."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.first, self.second, self.last, self.exponent = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(3, 3), exponent

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([x[:, :1], self.first(x)], 1).relu()
        g = self.second(x).relu()[:, [0, 0, 1]]
        return self.last(h + g**self.exponent)


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_laws_of_one_sum_that_meet(exponent):
    check(Merging(exponent).double(), (X,), 1)


def test_ties_made_later_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    found = equinorm.symmetries(net, X)
    copy.deepcopy(found).rescale_(torch.ones(8))  # a copy has a copied model
    net[2].bias = net[0].bias
    with pytest.raises(equinorm.RescaleError, match="shares its memory"):
        found.rescale_(torch.ones(8))


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
    ],
    ids=["int8", "float8", "bool", "overlapping entries"],
)
def test_weights_that_cannot_be_rescaled_are_pinned(weight):
    model = Stored(weight)
    twin, inputs = copy.deepcopy(model), torch.randn(2, 3)
    symmetries = equinorm.symmetries(model, inputs)
    moving = {scaling.name for scaling in symmetries.scalings if scaling.factors}
    assert moving == {"a.weight", "a.bias", "b.weight"}  # all alike
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    assert equinorm.deviation(model, twin, inputs) < 1e-5


@pytest.mark.parametrize("strides", [(4, 1), (1, 2), (5, 1), (8, 2)])
def test_weights_with_gaps_or_turned_are_not_taken_to_overlap(strides):
    symmetries = equinorm.symmetries(Stored(torch.randn(16).as_strided((2, 4), strides)), torch.randn(2, 3))
    assert symmetries.num_free == 6


def test_function_transforms_are_refused_with_a_way_out():
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(torch.relu)(x)

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), Mapped(), nn.Linear(4, 2))
    with pytest.raises(equinorm.ExportError, match=r"torch\.vmap.*opaque"):
        equinorm.symmetries(model, torch.randn(2, 3))
    assert equinorm.symmetries(model, torch.randn(2, 3), opaque="3").num_free == 4
