"""Networks of many small tensors, which are read, solved and written together: the same as one by one."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import equinorm
from equinorm import BalanceError, RescaleError
from equinorm._class_ids import moving_log_factors
from equinorm.balancing import least_maximum, solver
from equinorm.rescaling import in_place
from equinorm.rescaling.factors import factors_of

pytestmark = pytest.mark.filterwarnings("ignore:.*batch normalization")

INPUTS = (torch.zeros(1, 3, 8, 8),)


def network(dtype=torch.float32):
    """Normalized layers, whose gains scale with the columns of what follows: one side moves each tensor."""
    torch.manual_seed(0)
    layers = [(nn.Conv2d(a, b, k), nn.BatchNorm2d(b), nn.ReLU()) for a, b, k in ((3, 6, 3), (6, 8, 1), (8, 5, 3))]
    model = nn.Sequential(*(module for layer in layers for module in layer), nn.Flatten(), nn.Linear(80, 4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.to(dtype)


def analysed(model):
    return equinorm.symmetries(model, tuple(x.to(next(model.parameters()).dtype) for x in INPUTS))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_narrow_gains_are_read_as_wide_ones(p):
    wide = network(torch.float64)
    with torch.no_grad():
        wide[1].weight[0] = 1e-25  # whose square float32 does not hold
        wide[1].bias.zero_()
    narrow = copy.deepcopy(wide).float()
    wide.load_state_dict(narrow.state_dict())
    expected, found = analysed(wide).balance(p, tol=1e-9), analysed(narrow).balance(p, tol=1e-9)
    torch.testing.assert_close(found.log_scales, expected.log_scales, rtol=1e-12, atol=1e-12)
    assert found.norm_before == pytest.approx(expected.norm_before, rel=1e-12)
    assert found.converged


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "inf")])
def test_a_gain_that_is_not_finite_is_named(value, word):
    model = network()
    found = analysed(model)
    with torch.no_grad():
        model[4].weight[2] = value
    with pytest.raises(BalanceError, match=rf"cannot balance 4\.weight: it holds {word}"):
        found.balance()
    with pytest.raises(RescaleError, match=r"cannot rescale 4\.weight: it holds NaN or inf"):
        found.rescale_(torch.ones(found.num_free))


def test_classes_that_stand_apart_are_solved_as_others_are(monkeypatch):
    """The general solver reaches the same least maximum, and the same channels where sweeps make them even."""
    found = analysed(network(torch.float64))
    alone = found.balance(math.inf)
    for module in (solver, least_maximum):
        monkeypatch.setattr(module, "is_separable", lambda problem: False)
    general = found.balance(math.inf)
    assert alone.converged
    assert alone.norm_after == pytest.approx(general.norm_after, rel=1e-12)
    torch.testing.assert_close(alone.log_scales, general.log_scales, rtol=1e-9, atol=1e-9)
    assert alone.cycles <= general.cycles


def test_scales_of_all_tensors_are_those_of_each():
    found = analysed(network())
    moving = [scaling for scaling in found.scalings if scaling.factors]
    z = torch.randn(found.num_free, dtype=torch.float64)
    z[: found.num_free // 2] = 0.0
    each = [[log for log in scaling.log_factors(z) if bool((log != 0).any())] for scaling in moving]
    together = moving_log_factors(moving, z)
    assert [[*map(torch.Tensor.tolist, logs)] for logs in together] == [[*map(torch.Tensor.tolist, logs)] for logs in each]
    assert not all(each)
    with pytest.raises(RescaleError, match="need free log-scales of shape"):
        moving_log_factors(moving, z[:-1])


def test_powers_of_two_are_exact_beside_other_scales():
    logs = [[3 * math.log(2), 0.1, 0.0], [[-math.log(2)]]]
    mixed, exact = factors_of([torch.tensor(log, dtype=torch.float64) for log in logs])
    assert mixed.scale.tolist() == [8.0, math.exp(0.1), 1.0]
    assert (mixed.low, mixed.is_exact) == (0.0, False)
    assert (exact.scale.tolist(), exact.low, exact.high, exact.is_exact) == ([[0.5]], -math.log(2), -math.log(2), True)
    assert factors_of([]) == []


def test_few_tensors_are_looked_at_by_themselves(monkeypatch):
    """Only those whose rows come near to what their dtype holds."""
    model = network()
    with torch.no_grad():
        model[3].weight[1] *= 1e-30
        model[4].bias.zero_()
    found, looked, check = analysed(model), [], in_place.check
    monkeypatch.setattr(in_place, "check", lambda write: looked.append(write.what) or check(write))
    found.balance().apply_()
    assert looked == ["3.weight"]


class Wrapped(torch.Tensor):
    """A tensor whose numbers lie elsewhere: at its own address is nothing."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        args = tree_map(lambda value: value.inner if isinstance(value, cls) else value, args)
        result = operation(*args, **(kwargs or {}))
        return cls(result) if operation is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("held", [Wrapped, lambda weight: torch._neg_view(-weight)], ids=["wrapped", "negated"])
def test_numbers_that_do_not_lie_at_an_address_are_read_all_the_same(monkeypatch, held):
    """Kernels would read nothing there, or numpy refuses."""
    monkeypatch.setattr("equinorm.native.kernels_for", lambda *types: pytest.fail("kernels would read them"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 40))
    found = equinorm.symmetries(model, (torch.zeros(2, 4),))
    for p, is_compiled in ((math.inf, False), (math.inf, True), (2.0, True)):
        expected = found.balance(p, compile=False)
        weight = model[1].weight
        model[1].weight = nn.Parameter(held(weight.detach()))
        torch.testing.assert_close(found.balance(p, compile=is_compiled).log_scales, expected.log_scales)
        model[1].weight = weight
