"""Experts of a mixture, whose weights are matrices side by side in one tensor, against energies written out entry by entry."""

import dataclasses
import math

import pytest
import torch
from mixtures import FAMILIES, KINDS, mixture
from torch import Tensor

import equinorm
from equinorm.balancing import layout
from equinorm.balancing.assemble import problem_of
from equinorm.balancing.energy_reader import Reading
from equinorm.balancing.options import BalanceOptions
from equinorm.balancing.streamed import StreamedBlock
from equinorm.balancing.weight_passes import CompiledPass, StripPass


@pytest.fixture
def entry_by_entry(monkeypatch):
    """What lays out every tensor as a list of its entries from now on."""
    return lambda: [monkeypatch.setattr(layout, way, lambda *_: None) for way in ("_is_along_one_axis", "_joined")]


def laid_out(symmetries: equinorm.Symmetries) -> layout.NetworkLayout:
    counted = [s for s in symmetries.scalings if s.factors and s.role == "weight" and s.kind == "parameter"]
    held = torch.zeros(symmetries.num_free + 1, dtype=torch.bool)
    return layout.lay_out(counted, symmetries.family_ranges, symmetries.num_free, held)


@pytest.mark.parametrize("name", [*KINDS, *FAMILIES])
def test_every_weight_is_a_matrix(name):
    network = laid_out(mixture(name)[2])
    assert all(found.is_matrix for found in network.layouts)
    assert any(len(found.scaling.shape) == 3 for found in network.layouts)


@pytest.mark.parametrize("options", [{"method": "cyclic", "cycles": 3}, {"method": "cyclic", "cycles": 3, "p": math.inf}, {}],
                         ids=["cyclic", "largest", "two-level"])  # fmt: skip
@pytest.mark.parametrize("name", [*KINDS, *FAMILIES])
def test_balances_are_those_of_the_entries(entry_by_entry, name, options):
    _, _, symmetries = mixture(name)
    found = symmetries.balance(**({"tol": 1e-13} | options))
    entry_by_entry()
    symmetries = dataclasses.replace(symmetries)  # begins without layouts
    assert not any(found.is_matrix for found in laid_out(symmetries).layouts)
    expected = symmetries.balance(**({"tol": 1e-13} | options))
    assert found.norm_before == pytest.approx(expected.norm_before, rel=1e-12)
    assert found.norm_after == pytest.approx(expected.norm_after, rel=1e-12)
    assert found.norm_after < 0.99 * found.norm_before
    near = 1e-12 if "cycles" in options else 1e-10  # where it stops at a residual, not after so many cycles
    torch.testing.assert_close(found.log_scales, expected.log_scales, rtol=0, atol=near)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("name", KINDS)
def test_streamed_sums_are_those_of_the_entries(entry_by_entry, monkeypatch, name, compile, p):
    """Weights in float32, strip by strip, at log-scales that are not zero."""
    monkeypatch.setattr("equinorm.balancing.energy_reader.AT_ONCE", 15)
    monkeypatch.setattr("equinorm.balancing.weight_passes.LEAST", 1)
    _, _, symmetries = mixture(name)
    tensors = {name: tensor.detach().float() for name, tensor in symmetries.tensors.items()}
    z = torch.randn(symmetries.num_free + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[0] = 0.0
    options = BalanceOptions(p=p, tol=1e-12, compile=compile)
    found = problem_of(laid_out(symmetries), tensors, options)
    stream = next(b.stream for b in found.blocks if isinstance(b, StreamedBlock) and b.stream.layout.scaling.name == "gate_up")
    assert isinstance(stream.reader, CompiledPass if compile else StripPass)
    found.refine()
    entry_by_entry()
    expected = problem_of(laid_out(symmetries), tensors, options)
    assert not expected.streams
    for index, total in expected.log_energies(z).items():
        assert found.log_energies(z)[index] == pytest.approx(total, abs=1e-12)


ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["packed", "transposed"])
def test_energies_of_experts_in_every_memory_layout(monkeypatch, name, order):
    """Squares by channel whatever the order of axes in memory, also where one expert is more than a strip."""
    monkeypatch.setattr("equinorm.balancing.energy_reader.STRIP", 12)
    for found in laid_out(mixture(name)[2]).layouts:
        if len(found.scaling.shape) < 3:
            continue
        weight = torch.randn(found.scaling.shape, dtype=torch.float64)
        weight = weight.permute(order).contiguous().permute([order.index(axis) for axis in range(3)])
        expected = weight.square().sum(found.others) if found.others else weight.square()
        kept = sorted(found.axes)
        expected = expected.permute([kept.index(axis) for axis in found.axes]).reshape(
            *found.sizes, *[1] * (2 - len(found.sizes))
        )
        reading = Reading(found, weight, BalanceOptions().norm, torch.float64)
        torch.testing.assert_close(reading.read_energies(), expected, rtol=1e-15, atol=0)
        if reading.has_strips:
            strips = torch.full(expected.shape if reading.slow_side == 0 else expected.T.shape, math.nan, dtype=torch.float64)
            for here, there, strip in reading.strips():
                strips[here, there] = strip
            torch.testing.assert_close(strips if reading.slow_side == 0 else strips.T, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", [*KINDS, *FAMILIES])
def test_powers_of_two_leave_outputs_as_they_are(name):
    model, inputs, symmetries = mixture(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        before = output(model, inputs)
        balance = symmetries.balance()
        balance.apply_(power_of_two=True)
        assert torch.equal(output(model, inputs), before)
        assert symmetries.balance(cycles=0).norm_before < 0.99 * balance.norm_before
    finally:
        model.load_state_dict(state)


def output(model: torch.nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, Tensor) else found.logits
