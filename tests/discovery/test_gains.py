"""Gains of a parameter, times a number, plus a number: they scale as the parameter plus another number does."""

import copy
import dataclasses

import pytest
import torch
from small_networks.cases import CASES, INPUTS
from small_networks.constants import GAINS

import equinorm

CONTROLS = ["numbers that differ", "two numbers", "with and without a number", "a number plus a square"]
OFFSETS = {"1 + 0.1 g": 10.0, "g 0.1 + 1": 10.0, "1 + g / 10": 10.0, "1 - g": -1.0, "1 - 0.3 g[None]": -1 / 0.3}


def names() -> list[str]:
    return [f"gain: {title}" for title in GAINS if title not in CONTROLS]


OTHERS = {
    "gain of channels: 1 + g.view": 4,
    "gain of channels: (1 - 0.5 g).view": 4,
    "one gain for all: 1 + 0.1 g": 5,
    "a norm's gain 1 + 0.1 g": 4,
    "gains chosen by data: 1 + g": 4,
}
"""Free classes of each."""


@pytest.mark.parametrize("name", [*names(), *OTHERS])
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_gains_with_numbers_move_exactly(name: str, std: float) -> None:
    model, args = copy.deepcopy(CASES[name]).double(), INPUTS[name]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
    group = equinorm.symmetries(model, args)
    assert group.num_free == OTHERS.get(name, 4)
    twin = copy.deepcopy(model)
    dataclasses.replace(group, model=twin).rescale_(std * torch.randn(group.num_free, generator=generator, dtype=torch.float64))
    assert equinorm.deviation(twin, model, args) <= 1e-12


@pytest.mark.parametrize("title", OFFSETS)
def test_what_is_added_is_the_number_over_the_factor(title: str) -> None:
    group = equinorm.symmetries(CASES[f"gain: {title}"], INPUTS[f"gain: {title}"])
    (gain,) = [scaling for scaling in group.scalings if scaling.name == "g"]
    assert gain.offset == pytest.approx(OFFSETS[title], rel=1e-15)


@pytest.mark.parametrize("title", CONTROLS)
def test_gains_that_scale_as_no_tensor_does_stay(title: str) -> None:
    group = equinorm.symmetries(CASES[f"gain: {title}"], INPUTS[f"gain: {title}"])
    (gain,) = [scaling for scaling in group.scalings if scaling.name == "g"]
    assert not gain.factors


def test_half_precision_gains_with_numbers_stay() -> None:
    model = copy.deepcopy(CASES["gain: 1 + 0.1 g"]).bfloat16()
    assert equinorm.symmetries(model, (torch.ones(3, 3, dtype=torch.bfloat16),)).num_free == 0
