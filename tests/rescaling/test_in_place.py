"""Rescaling in place: exact, atomic, and along with gradients and optimizer state."""

import copy
import math
import signal
import threading

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm import native
from equinorm.rescaling import in_place, writing

LN2 = math.log(2.0)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    ).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor]:
    return (torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype),)


def random_scales(symmetries: equinorm.Symmetries, std: float = 2.0) -> Tensor:
    return std * torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def state(net: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in net.state_dict().values()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_real_scales_keep_the_function(dtype, tolerance):
    net, args = network(dtype), inputs(dtype)
    before = copy.deepcopy(net)
    symmetries = equinorm.symmetries(net, args)
    symmetries.rescale_(random_scales(symmetries))
    assert not torch.equal(net[0].weight, before[0].weight)
    assert equinorm.deviation(net, before, args) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_powers_of_two_are_bitwise(dtype):
    net, args = network(dtype), inputs(dtype)
    before = copy.deepcopy(net)
    symmetries = equinorm.symmetries(net, args)
    small = 0.7 if dtype == torch.float16 else 3.0  # float16 has few exponents
    symmetries.rescale_(random_scales(symmetries, small), power_of_two=True)
    assert not torch.equal(net[0].weight, before[0].weight)
    with torch.no_grad():
        assert torch.equal(net(*args), before(*args))


def test_multiples_of_ln_2_are_exact_without_rounding():
    net, args = network(torch.float32), inputs(torch.float32)
    before = copy.deepcopy(net)
    symmetries = equinorm.symmetries(net, args)
    symmetries.rescale_(LN2 * random_scales(symmetries, 5.0).round())
    with torch.no_grad():
        assert torch.equal(net(*args), before(*args))


def test_there_and_back():
    net, args = network(), inputs()
    before = state(net)
    symmetries = equinorm.symmetries(net, args)
    z = random_scales(symmetries)
    symmetries.rescale_(z)
    symmetries.rescale_(-z)
    for a, b in zip(state(net), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_parameters_stay_the_same_objects():
    net, args = network(), inputs()
    identities = [(id(p), p.data_ptr()) for p in net.parameters()]
    equinorm.balance_(net, args)
    assert identities == [(id(p), p.data_ptr()) for p in net.parameters()]


def test_gradients_are_those_of_the_new_point():
    net, args = network(), inputs()
    net(*args).square().sum().backward()
    symmetries = equinorm.symmetries(net, args)
    symmetries.rescale_(random_scales(symmetries))
    carried = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(*args).square().sum().backward()
    for a, p in zip(carried, net.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-11, atol=1e-13)


class Tied(nn.Module):
    """An embedding and its transpose as a head; also one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.twice(torch.relu(self.twice(x)))
        return self.head(self.down(torch.relu(self.up(x))))


def test_tied_tensors_move_once():
    torch.manual_seed(0)
    net, args = Tied().double(), (torch.arange(11),)
    before = copy.deepcopy(net)
    symmetries = equinorm.symmetries(net, args)
    assert ("embed.weight", "head.weight") in [scaling.names for scaling in symmetries.scalings]
    symmetries.rescale_(random_scales(symmetries))
    assert net.head.weight is net.embed.weight
    assert not torch.equal(net.up.weight, before.up.weight)
    assert equinorm.deviation(net, before, args) <= 1e-12


def test_parameters_that_share_memory_move_once():
    net, args = network(), inputs()
    twin = nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(4, 5)}).double()
    twin["b"].weight.data = twin["a"].weight.data
    twin["b"].bias.data = twin["a"].bias.data
    net = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), twin["a"], nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), twin["b"], nn.ReLU(), nn.Linear(5, 2)
    ).double()
    args = (torch.randn(4, 3).double(),)
    before = copy.deepcopy(net)
    net[2].weight.grad, net[6].weight.grad = torch.ones(5, 4).double(), torch.ones(5, 4).double()
    symmetries = equinorm.symmetries(net, args)
    symmetries.rescale_(random_scales(symmetries))
    assert net[2].weight.data_ptr() == net[6].weight.data_ptr()
    assert torch.equal(net[2].weight.grad, net[6].weight.grad)
    assert not torch.equal(net[2].weight, before[2].weight)
    assert equinorm.deviation(net, before, args) <= 1e-12


def test_overlapping_memory_is_pinned():
    net = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)
    ).double()
    memory = torch.randn(24).double()
    net[0].weight.data, net[2].weight.data = memory[:16].view(4, 4), memory[8:].view(4, 4)
    symmetries = equinorm.symmetries(net, (torch.randn(1, 4).double(),))
    assert symmetries.num_free == 0
    assert any(pin.reason.operation == "storage" and "overlaps" in pin.reason.detail for pin in symmetries.pins)


def test_frozen_parameters_move_too():
    net, args = network(), inputs()
    net[3].requires_grad_(False)
    before = copy.deepcopy(net)
    symmetries = equinorm.symmetries(net, args)
    symmetries.rescale_(random_scales(symmetries))
    assert not net[3].weight.requires_grad
    assert equinorm.deviation(net, before, args) <= 1e-12


def refused(net, args, z, words):
    before = state(net)
    symmetries = equinorm.symmetries(net, args)
    with pytest.raises(equinorm.RescaleError, match=words):
        symmetries.rescale_(z if isinstance(z, Tensor) else torch.full((symmetries.num_free,), z, dtype=torch.float64))
    assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(state(net), before, strict=True))


def test_overflow_is_refused_and_nothing_written():
    refused(network(torch.float32), inputs(torch.float32), 95.0, r"0\.weight: it would overflow float32")


def test_underflow_of_a_channel_is_refused():
    net = network(torch.float32)
    net[8].weight.data *= 1e-30  # the last tensor to be written
    refused(net, inputs(torch.float32), 40.0, r"underflow")


@pytest.mark.parametrize(
    ("dtype", "twos", "small", "others"),
    [(torch.float16, 20, 2.0**-5, 0.4), (torch.float16, 16, 2.0**-9, 6e4), (torch.float32, 120, 2.0**-30, 0.4)],
)
def test_underflow_of_a_column_is_refused(dtype, twos, small, others):
    """Also where other entries keep every row large, and for powers of two."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).to(dtype)
    net[0].weight.data[0] = net[2].weight.data[:, 0] = small
    net[0].bias.data.zero_()
    net[2].weight.data[:, 1] = others
    z = torch.zeros(6, dtype=torch.float64)
    z[0] = twos * math.log(2)
    refused(net, (torch.rand(2, 4).to(dtype),), z, r"2\.weight: 4 of its 24 entries would underflow")


def test_single_entries_of_a_column_may_underflow():
    """Which changes it by less than rounding does."""
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.ReLU(), nn.Linear(2, 4, bias=False)).half()
    net[2].weight.data[:, 0] = torch.tensor([0.5, 2.0**-20, 0.25, 0.0])
    symmetries = equinorm.symmetries(net, torch.rand(1, 4).half())
    symmetries.rescale_(torch.tensor([6.0, 0.0], dtype=torch.float64) * math.log(2))
    assert net[2].weight[:, 0].tolist() == [2.0**-7, 0.0, 2.0**-8, 0.0]


def test_half_precision_asks_for_powers_of_two():
    refused(network(torch.bfloat16), inputs(torch.bfloat16), 0.3, r"power_of_two=True")


def test_not_finite_is_refused():
    net = network()
    net[3].bias.data[2] = math.nan
    refused(net, inputs(), 0.3, r"3\.bias: it holds NaN or inf")


def test_meta_is_analysed_but_not_rescaled():
    net = network().to("meta")
    symmetries = equinorm.symmetries(net, (torch.empty(2, 3, 10, 10, device="meta", dtype=torch.float64),))
    assert symmetries.num_free == 8 + 6 + 7
    with pytest.raises(equinorm.RescaleError, match="meta device"):
        symmetries.rescale_(torch.ones(symmetries.num_free))
    with pytest.raises(equinorm.BalanceError, match="meta device"):
        symmetries.balance()


@pytest.mark.parametrize(("z", "words"), [(torch.zeros(3), r"shape \(21,\)"), (torch.full((21,), math.nan), "finite")])
def test_log_scales_are_checked(z, words):
    refused(network(), inputs(), z, words)


def test_a_model_that_changed_is_refused():
    net, args = network(), inputs()
    symmetries = equinorm.symmetries(net, args)
    net[8].weight = nn.Parameter(torch.randn(4, 9).double())
    with pytest.raises(equinorm.RescaleError, match=r"8\.weight of the model got shape \(4, 9\)"):
        symmetries.rescale_(torch.ones(symmetries.num_free))


def test_a_tensor_that_is_expanded_after_the_analysis_is_refused():
    net, args = network(), inputs()
    symmetries = equinorm.symmetries(net, args)
    net[8].weight = nn.Parameter(torch.randn(1, 7).double().expand(4, 7))
    with pytest.raises(equinorm.RescaleError, match="expanded"):
        symmetries.rescale_(torch.ones(symmetries.num_free))
    assert equinorm.symmetries(net, args).num_free == symmetries.num_free - 7


def test_interrupt_while_writing_leaves_all_or_nothing(monkeypatch, interruptible):
    """Ctrl-C in the middle of the writes is raised after the last of them."""
    net, args = network(), inputs()
    expected = copy.deepcopy(net)
    symmetries, twin = equinorm.symmetries(net, args), equinorm.symmetries(expected, args)
    z = random_scales(symmetries)
    twin.rescale_(z)
    monkeypatch.setattr(native, "are_shipped", lambda: False)  # kernels write in one call
    writes, write_ = [], writing._Piece.write_

    def interrupted(piece):
        writes.append(piece)
        if len(writes) == 3:
            signal.raise_signal(signal.SIGINT)
        write_(piece)

    monkeypatch.setattr(writing._Piece, "write_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        symmetries.rescale_(z)
    assert len(writes) > 3
    assert all(torch.equal(a, b) for a, b in zip(state(net), state(expected), strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_while_writing_leaves_no_first_guess_of_the_old_point(monkeypatch, interruptible):
    """L-BFGS computes its first guess anew before Ctrl-C is raised."""
    net, (x,) = network(), inputs()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    symmetries = equinorm.symmetries(net, (x,))
    write_ = in_place.write_
    monkeypatch.setattr(in_place, "write_", lambda *given: (write_(*given), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        symmetries.rescale_(random_scales(symmetries), optimizer)
    held = optimizer.state[optimizer._params[0]]
    difference, step = held["old_dirs"][-1], held["old_stps"][-1]
    torch.testing.assert_close(held["H_diag"], difference.dot(step) / difference.dot(difference))


@pytest.mark.parametrize(("weight", "decades"), [(1e30, 15), (1e-30, -15)])
def test_products_that_leave_the_dtype_on_the_way(weight, decades):
    """Row scales times column scales are harmless; the weights times row scales alone are not."""
    net = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)
    )
    with torch.no_grad():
        for layer, size in ((net[0], 1 / weight), (net[2], weight), (net[4], 1.0)):
            layer.weight.copy_(size * (1 + torch.rand_like(layer.weight)))
    symmetries = equinorm.symmetries(net, (torch.randn(1, 3),))
    expected = net[2].weight.detach().clone()
    symmetries.rescale_(torch.full((8,), decades * math.log(10), dtype=torch.float64))
    torch.testing.assert_close(net[2].weight.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_and_of_other_sizes(dtype):
    """Bounds on rows come from norms; exact powers of two must come out whatever the rows hold."""
    net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).to(dtype)
    sizes = torch.tensor([1.0, 0.0, 1e-3, 1e3, 1.0]) if dtype == torch.float16 else torch.tensor([1e18, 0.0, 1e-18, 1e-25, 1.0])
    with torch.no_grad():
        net[0].weight.copy_((1 + torch.rand(5, 3)) * sizes[:, None])
    before = [layer.weight.detach().clone() for layer in (net[0], net[2])]
    twos = torch.tensor([1.0, -2.0, 3.0, -1.0, 2.0], dtype=torch.float64)
    equinorm.symmetries(net, (torch.randn(1, 3, dtype=dtype),)).rescale_(twos * math.log(2))
    assert torch.equal(net[0].weight, before[0] * (2 ** twos[:, None]).to(dtype))
    assert torch.equal(net[2].weight, before[1] * (2**-twos).to(dtype))


@pytest.mark.parametrize("width", [64, 1024])
def test_small_weights_of_half_precision_take_powers_of_two(width):
    """Initial weights lie near float16's subnormals, where doubling is exact."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).half()
    with torch.no_grad():
        net[2].weight.mul_(64)  # it is halved
    before = net[0].weight.detach().clone()
    symmetries = equinorm.symmetries(net, (torch.randn(1, width).half(),))
    symmetries.rescale_(torch.full((width,), math.log(2), dtype=torch.float64))
    assert torch.equal(net[0].weight, 2 * before)


def test_interrupt_while_checking_writes_nothing(monkeypatch):
    net, args = network(), inputs()
    before, symmetries = state(net), equinorm.symmetries(net, args)
    check, seen = in_place.check_writable, []

    def interrupted(what, tensor):
        seen.append(what)
        if len(seen) == 3:
            raise KeyboardInterrupt
        check(what, tensor)

    monkeypatch.setattr(in_place, "check_writable", interrupted)
    with pytest.raises(KeyboardInterrupt):
        symmetries.rescale_(random_scales(symmetries))
    assert all(torch.equal(a, b) for a, b in zip(state(net), before, strict=True))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_channels():
    net = nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    before, args = copy.deepcopy(net), (torch.randn(2, 4).double(),)
    assert len(equinorm.balance_(net, args).dead) == 3  # they hear nothing
    assert equinorm.deviation(net, before, args) <= 1e-12


def test_other_threads_can_rescale():
    net, args = network(), inputs()
    symmetries = equinorm.symmetries(net, args)
    before = copy.deepcopy(net)
    thread = threading.Thread(target=symmetries.rescale_, args=(random_scales(symmetries),))
    thread.start()
    thread.join()
    assert not torch.equal(net[0].weight, before[0].weight)
    assert equinorm.deviation(net, before, args) <= 1e-12


HOMOGENEOUS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW": torch.optim.AdamW,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_optimizer_state_is_what_it_would_have_been(name):
    """State gathered from gradients at the new point equals the state carried there (weights do not move in between)."""
    states = []
    for carry in (True, False):
        net, args = network(), inputs()
        symmetries = equinorm.symmetries(net, args)
        z = random_scales(symmetries, 0.5)
        if not carry:
            symmetries.rescale_(z)
        optimizer = HOMOGENEOUS[name](net.parameters())
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0, eps=1e-30)  # an eps has a unit of its own
        for step in range(3):
            optimizer.zero_grad()
            (net(*args) * (step + 1)).square().sum().backward()
            optimizer.step()
        if carry:
            symmetries.rescale_(z, optimizer)
        states.append([v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)])
    assert len(states[0]) >= 8
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_coupled_weight_decay_in_momentum_is_refused():
    net, args = network(), inputs()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    net(*args).sum().backward()
    optimizer.step()
    before = state(net)
    with pytest.raises(equinorm.RescaleError, match="weight decay"):
        equinorm.balance_(net, args, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(state(net), before, strict=True))


def test_unknown_optimizer_is_refused():
    net, args = network(), inputs()

    class Own(torch.optim.SGD):
        pass

    with pytest.raises(equinorm.RescaleError, match="state of Own: how it scales is not known"):
        equinorm.balance_(net, args, optimizer=Own(net.parameters()))


def test_the_default_dtype_does_not_matter():
    """Vectors of bfloat16 are read as they are, and numpy has no such numbers."""

    class Gains(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(3)) for _ in range(2))

        def forward(self, x):
            return x * self.first * self.second

    model, inputs = Gains().bfloat16(), torch.randn(2, 3).bfloat16()
    symmetries, before = equinorm.symmetries(model, (inputs,)), model(inputs)
    first = model.first.detach().clone()
    torch.set_default_dtype(torch.bfloat16)
    try:
        symmetries.rescale_(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), power_of_two=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model(inputs), before)
    assert not torch.equal(model.first, first)
