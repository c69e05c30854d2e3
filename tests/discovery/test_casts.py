"""A value that scales and is rounded to fewer bits than its weights have: only powers of two are taken, and they are exact."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import equinorm

F = nn.functional


class Net(nn.Module):
    """Two layers, and what happens between and in them."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.gain, self.down = nn.Linear(3, 4), nn.Parameter(torch.tensor([0.5, 2.0, 1.5, 1.25])), nn.Linear(4, 2)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _autocast(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.down(F.relu(m.up(x)))


def _hidden(change: Callable[[Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    return lambda m, x: m.down(change(F.relu(m.up(x))).to(x.dtype))


ROUNDED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "bfloat16": _hidden(Tensor.bfloat16),
    "float16": _hidden(Tensor.half),
    "to another's dtype": _hidden(lambda h: h.type_as(torch.zeros(1, dtype=torch.bfloat16))),
    "copy into fewer bits": _hidden(lambda h: torch.zeros_like(h, dtype=torch.bfloat16).copy_(h)),
    "add in place": _hidden(lambda h: torch.zeros_like(h, dtype=torch.bfloat16).add_(h)),
    "mean in fewer bits": _hidden(lambda h: h.unsqueeze(-1).mean(-1, dtype=torch.bfloat16)),
    "autocast": _autocast,
    "weight": lambda m, x: F.linear(F.relu(m.up(x)), m.down.weight.bfloat16().to(x.dtype), m.down.bias),
    "weight behind a view": lambda m, x: F.relu(m.up(x)) @ m.down.weight.T.bfloat16().to(x.dtype) + m.down.bias,
    "gain": lambda m, x: m.down(F.relu(m.up(x)) * m.gain.bfloat16().to(x.dtype)),
}


def made(run: Callable[[Net, Tensor], Tensor], dtype: torch.dtype) -> tuple[Net, Tensor, equinorm.Symmetries]:
    torch.manual_seed(0)
    model, x = Net(run).to(dtype), torch.randn(7, 3, dtype=dtype)
    return model, x, equinorm.symmetries(model, x)


CASES = [(name, dtype) for name in ROUNDED for dtype in (torch.float32, torch.float64)]
CASES.remove(("autocast", torch.float64))  # which autocast leaves alone


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_real_scales_are_refused_and_powers_of_two_are_exact(name, dtype):
    model, x, symmetries = made(ROUNDED[name], dtype)
    assert symmetries.num_free >= 4
    before, original = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    with pytest.raises(equinorm.RescaleError, match=r"rounds .* test_casts.py:\d+.*power_of_two=True"):
        symmetries.rescale_(torch.full((symmetries.num_free,), 0.1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    symmetries.balance().apply_(power_of_two=True)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert equinorm.deviation(model, original, x) == 0.0
    assert "powers of two only:" in str(symmetries)


@pytest.mark.parametrize("name", ["bfloat16", "gain", "weight", "autocast"])
def test_real_scales_would_not_be_exact(name):
    """What is refused is refused for a reason: without the check outputs move by about a thousandth."""
    model, x, symmetries = made(ROUNDED[name], torch.float32)
    original = copy.deepcopy(model)
    object.__setattr__(symmetries, "casts", ())
    symmetries.rescale_(torch.linspace(0.1, 0.7, symmetries.num_free))
    assert equinorm.deviation(model, original, x) > 1e-4


def test_classes_that_pass_no_cast_take_real_scales():
    torch.manual_seed(0)
    first, last = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)), Net(ROUNDED["bfloat16"])
    model, x = nn.Sequential(first, nn.Tanh(), last).double(), torch.randn(7, 3, dtype=torch.float64)
    symmetries = equinorm.symmetries(model, x)
    (cast,) = symmetries.casts
    assert symmetries.num_free == 9
    assert len(cast.free()) == 4
    log_scales = torch.full((9,), 0.1, dtype=torch.float64)
    log_scales[cast.free() - 1] = math.log(2)
    original = copy.deepcopy(model)
    symmetries.rescale_(log_scales)
    assert equinorm.deviation(model, original, x) <= 1e-12


STEADY: dict[str, tuple[Callable[[Net, Tensor], Tensor], torch.dtype]] = {
    "up and back down to the weights' own dtype": (_hidden(lambda h: h.float().bfloat16()), torch.bfloat16),
    "no conversion": (_hidden(Tensor.float), torch.float32),
    "to more bits": (_hidden(Tensor.double), torch.float32),
    "what is cast does not scale": (lambda m, x: m.down(F.relu(m.up(x.bfloat16().to(x.dtype)))), torch.float32),
    "zeros of fewer bits": (_hidden(lambda h: h + torch.zeros_like(h, dtype=torch.bfloat16)), torch.float32),
    "truth values": (_hidden(lambda h: h * (h > 0).bfloat16().to(h.dtype)), torch.float32),
    "what scales cancels": (_hidden(lambda h: h * (h / h.abs()).nan_to_num(0).bfloat16().to(h.dtype)), torch.float32),
}


def test_a_cast_of_a_value_whose_scales_cancel_does_not_matter():
    """The output of two gains: each scales, along other axes, and their product does not."""

    class Gains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.gain = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            matrix = torch.empty_like(self.matrix).copy_(self.matrix)  # scales: one for all, one for each
            return ((x @ matrix) * self.gain).float()

    model, x = Gains().double(), torch.randn(3, 4, dtype=torch.float64)
    symmetries = equinorm.symmetries(model, x)
    original = copy.deepcopy(model)
    assert symmetries.num_free == 2
    assert not symmetries.casts
    symmetries.rescale_(torch.tensor([0.3, -0.7], dtype=torch.float64))
    assert equinorm.deviation(model, original, x) <= 1e-6  # of the output's float32
    assert equinorm.deviation(uncast(model), uncast(original), x) <= 1e-12


def uncast(model: nn.Module) -> nn.Module:
    """The product without its cast."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.inner.matrix) * self.inner.gain

    return Wide()


@pytest.mark.parametrize("name", STEADY)
def test_casts_that_take_nothing_from_the_weights_do_not_matter(name):
    run, dtype = STEADY[name]
    assert not made(run, dtype)[2].casts


def test_a_norm_in_float32_inside_of_a_bfloat16_model_leaves_its_classes_as_they_are():
    """As Hugging Face writes RMSNorm: exactness is that of bfloat16 weights, which take powers of two only in any case."""

    def normed(m: Net, x: Tensor) -> Tensor:
        h = F.relu(m.up(x)).float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return m.down((m.gain.float() * h).to(x.dtype))

    model, x, symmetries = made(normed, torch.bfloat16)
    assert symmetries.num_free == 4
    assert not symmetries.casts
    original = copy.deepcopy(model)
    symmetries.balance().apply_(power_of_two=True)
    assert equinorm.deviation(model, original, x) == 0.0


def test_half_precision_overflow_is_named_and_weights_are_checked():
    model, _, symmetries = made(lambda m, x: F.linear(F.relu(m.up(x)), m.down.weight.half().to(x.dtype)), torch.float32)
    with pytest.raises(equinorm.RescaleError, match="float16 overflows above 65504"):
        symmetries.rescale_(torch.full((4,), 0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(equinorm.RescaleError, match=r"down.weight: the network casts it to float16, .* overflow"):
        symmetries.rescale_(torch.full((4,), -20 * math.log(2), dtype=torch.float64))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    symmetries.rescale_(torch.full((4,), -2 * math.log(2), dtype=torch.float64))


def test_a_root_that_is_rounded_needs_scales_whose_root_is_a_power_of_two():
    def rooted(m: Net, x: Tensor) -> Tensor:
        return m.down(F.relu(m.up(x)).sqrt().bfloat16().to(x.dtype).square())

    model, x, symmetries = made(rooted, torch.float64)
    original = copy.deepcopy(model)
    with pytest.raises(equinorm.RescaleError, match="powers of two"):
        symmetries.rescale_(torch.full((4,), math.log(2), dtype=torch.float64))
    symmetries.rescale_(torch.full((4,), 0.6, dtype=torch.float64), power_of_two=True)
    assert equinorm.deviation(model, original, x) == 0.0
    symmetries.rescale_(torch.full((4,), 2 * math.log(2), dtype=torch.float64))
    assert equinorm.deviation(model, original, x) == 0.0


EIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda h: h.to(torch.float8_e4m3fn),
    "copy": lambda h: torch.zeros_like(h, dtype=torch.float8_e5m2).copy_(h),
}


@pytest.mark.parametrize("cast", EIGHT.values(), ids=EIGHT)
def test_eight_bits_pin(cast):
    symmetries = made(_hidden(cast), torch.float32)[2]
    assert symmetries.num_free == 0
    assert "rounds to eight bits" in str(symmetries)


def test_training_needs_powers_of_two_where_the_network_itself_casts():
    torch.manual_seed(0)
    model, x = Net(ROUNDED["bfloat16"]), torch.randn(7, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(equinorm.RescaleError, match=r"rounds .*power_of_two=True"):
        equinorm.ENorm(optimizer, model, x)
    hook = equinorm.ENorm(optimizer, model, x, power_of_two=True)
    with torch.no_grad():
        model.up.weight.mul_(64)
    original = copy.deepcopy(model)
    hook.cycle_()
    assert not torch.equal(model.up.weight, original.up.weight)
    assert equinorm.deviation(model, original, x) == 0.0


def test_training_goes_on_under_autocast():
    """The weights are exact in float32; outputs as exact as bfloat16 is."""
    torch.manual_seed(0)
    model, x = Net(_autocast), torch.randn(7, 3)
    hook = equinorm.ENorm(torch.optim.SGD(model.parameters(), lr=0.1), model, x)
    assert hook.symmetries.casts
    assert all(cast.by_autocast for cast in hook.symmetries.casts)
    with torch.no_grad():
        model.up.weight.mul_(64)
    original = copy.deepcopy(model)
    hook.cycle_()
    plain = [nn.Sequential(net.up, nn.ReLU(), net.down) for net in (model, original)]
    assert equinorm.deviation(*plain, x) <= 1e-5
    assert equinorm.deviation(model, original, x) <= 2e-2


def test_training_refuses_a_root_that_is_rounded():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.down(F.relu(m.up(x)).sqrt().bfloat16().to(x.dtype).square()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(equinorm.RescaleError, match="fractional power"):
        equinorm.ENorm(optimizer, model, torch.randn(7, 3), power_of_two=True)
