"""A parameter that a function stands in front of: it scales as the function's degree says; numbers are added to it alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import equinorm

F = nn.functional

BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "abs in place": lambda w: w.clone().abs_(),
    "neg": torch.neg,
    "relu": F.relu,
    "leaky_relu": lambda w: F.leaky_relu(w, -0.5),
    "rrelu": lambda w: F.rrelu(w, training=False),
    "dropout": lambda w: F.dropout(w, 0.5, training=True),
    "cast to fewer bits": lambda w: w.float(),
    "abs of a view": lambda w: w.view(1, 4).abs(),
    "view of abs": lambda w: w.abs().view(1, 4),
    "abs of a wider copy": lambda w: w.to(torch.complex128).real.abs(),
}
ITSELF: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda w: w,
    "clone": torch.clone,
    "detach": Tensor.detach,
    "detach in place": lambda w: w.clone().detach_(),
    "contiguous": Tensor.contiguous,
    "positive": torch.positive,
    "same dtype": lambda w: w.double(),
}


class Gain(nn.Module):
    """Hidden channels times a function of a parameter."""

    def __init__(self, gain: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.w, self.down = nn.Linear(3, 4), nn.Parameter(torch.tensor([0.5, -0.5, 1.5, -1.5])), nn.Linear(4, 2)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.down(F.relu(self.up(x)) * self.gain(self.w))


def looked_at(gain: Callable[[Tensor], Tensor]) -> tuple[equinorm.Symmetries, float]:
    """Symmetries, and the largest deviation under several members of the group."""
    torch.manual_seed(0)
    model, x = Gain(gain).double(), torch.randn(7, 3, dtype=torch.float64)
    symmetries = equinorm.symmetries(model, x)
    worst = 0.0
    for seed in range(3):
        original = copy.deepcopy(model)
        draw = torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        symmetries.rescale_(draw, power_of_two=bool(symmetries.casts))
        worst = max(worst, equinorm.deviation(model, original, x))
        model.load_state_dict(original.state_dict())
    return symmetries, worst


@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.parametrize("number", [1, -2.5])
def test_a_number_added_to_a_function_of_a_parameter_holds_the_parameter(name, number):
    symmetries, worst = looked_at(lambda w: number + BEHIND[name](w))
    assert worst <= 1e-12
    assert symmetries.num_free == (8 if name == "neg" else 4)  # 1 − w is a gain that scales


@pytest.mark.parametrize("name", BEHIND)
def test_without_a_number_the_parameter_scales_behind_the_function(name):
    symmetries, worst = looked_at(BEHIND[name])
    assert worst <= 1e-12
    assert symmetries.num_free == 8


@pytest.mark.parametrize("name", ITSELF)
def test_a_number_added_to_the_parameter_itself_scales_with_it(name):
    symmetries, worst = looked_at(lambda w: 1 + ITSELF[name](w))
    assert worst <= 1e-12
    assert symmetries.num_free == 8
    assert {s.name: s.offset for s in symmetries.scalings}["w"] == 1.0


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda w: (1 + w) * w.sign(),
    "bool": lambda w: (1 + w) * w.relu().bool(),
    "signbit": lambda w: (1 + w) * w.signbit(),
    "angle": lambda w: (1 + w) * w.angle(),
    "copysign": lambda w: torch.copysign(1 + w, w),
    "logical_not": lambda w: (1 + w) * w.relu().logical_not(),
    "count": lambda w: (1 + w) * w.relu().count_nonzero(),
    "comparison": lambda w: (1 + w) * (w > 0),
    "argmax": lambda w: (1 + w) * w.argmax(),
    "two numbers": lambda w: (1 + w) * (2 + w),
    "sign before the number": lambda w: w.sign() * (1 + w),
    "mask": lambda w: torch.where(w.relu().bool(), 1 + w, 0.0),
    "abs": lambda w: (1 + w) * w.abs(),
}


@pytest.mark.parametrize("name", READ)
def test_a_parameter_that_is_read_besides_does_not_scale_with_a_number(name):
    symmetries, worst = looked_at(READ[name])
    assert worst <= 1e-12
    assert not next(s for s in symmetries.scalings if s.name == "w").factors


def test_signs_alone_are_kept_by_scales_of_the_parameter():
    symmetries, worst = looked_at(lambda w: w * w.sign())
    assert worst <= 1e-12
    assert symmetries.num_free == 8


@pytest.mark.parametrize("function", [torch.abs, torch.neg, F.relu], ids=lambda f: f.__name__)
@pytest.mark.parametrize("use", ["linear", "matmul", "conv", "sum"])
def test_a_weight_behind_a_function_takes_its_label_from_its_next_use(function, use):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 2)
            self.w = nn.Parameter(torch.randn({"conv": (4, 4, 1), "sum": (4,)}.get(use, (4, 4))))

        def forward(self, x: Tensor) -> Tensor:
            h, w = F.relu(self.up(x)), function(self.w)
            if use == "conv":
                return self.down(F.conv1d(h.unsqueeze(-1), w).squeeze(-1).relu())
            return self.down({"linear": lambda: F.linear(h, w), "matmul": lambda: h @ w, "sum": lambda: h + w}[use]().relu())

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(7, 4, dtype=torch.float64)
    original = copy.deepcopy(model)
    symmetries = equinorm.symmetries(model, x)
    assert symmetries.num_free == (4 if use == "sum" else 8)
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    assert equinorm.deviation(model, original, x) <= 1e-12
