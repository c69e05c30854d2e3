"""Batches, dtypes and models that are not as usual: results stay right, or the error says what to do."""

import copy

import pytest
import torch
from quantized_networks import perceptron
from torch import nn
from torch.nn import functional

import equinorm
from equinorm._errors import RescaleError
from equinorm.quantization import prepare
from equinorm.quantization.batches import may_be_cut


def tensor_of(net, args, **options):
    """With one step for each tensor."""
    return equinorm.equalize(net, args, scheme="w8a8-tensor", **options)


# ------------------------------------------------------------------------------------------------- rows that belong together


class Recurrent(nn.Module):
    """Steps in time along the first axis, which add up."""

    def __init__(self):
        super().__init__()
        self.encoder, self.lstm, self.last = nn.Linear(4, 6), nn.LSTM(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.lstm(torch.relu(self.encoder(x)))[0].cumsum(0))


class WithTable(nn.Module):
    """A table that belongs to all rows, with as many of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, table):
        return self.last(torch.relu(self.first(x)) + table.mean(0))


class Masked(nn.Module):
    """Attention whose mask is as large as the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, mask):
        x = torch.relu(self.first(x))
        return self.last(x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("kind", ["steps in time", "a table", "a mask"])
def test_rows_that_belong_together_stay_together(kind):
    torch.manual_seed(0)
    net, args = {
        "steps in time": lambda: (Recurrent(), (torch.randn(40, 3, 4),)),
        "a table": lambda: (WithTable(), (torch.randn(32, 6), 3 * torch.randn(32, 8))),
        "a mask": lambda: (Masked(), (torch.randn(4, 4, 6), torch.triu(torch.full((4, 4), -torch.inf), 1))),
    }[kind]()
    result = tensor_of(net.eval(), args, calibration=[args])
    assert abs(result.noise_before - result.measured_before) < 6
    assert result.measured_after > (45 if kind == "a table" else 35)


def test_which_batches_may_be_cut():
    net, x = perceptron()
    assert may_be_cut(net, [((x,), {})])
    assert may_be_cut(net, [((x[:1],), {})])
    assert not may_be_cut(Recurrent(), [((torch.randn(8, 3, 4),), {})])
    assert not may_be_cut(nn.Sequential(net, nn.Softmax(0)), [((x,), {})])


def test_exported_for_more_rows_than_trials_take():
    net, _ = perceptron()
    x = torch.randn(100, 5, dtype=torch.float64)
    result = tensor_of(torch.export.export(net, (x,)).module(), (x,), calibration=[x])
    assert result.measured_after >= result.measured_before > 20


# --------------------------------------------------------------------------------------------------------------- half precision


class Cast(nn.Module):
    """Rounds what scales to half precision; its weights are in single."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.first(x).relu().bfloat16().float())


@pytest.mark.parametrize("net", [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16(), Cast()])
def test_real_scales_are_refused_in_half_precision_before_data_are_looked_at(net):
    x, done = torch.randn(16, 4, dtype=next(net.parameters()).dtype), []
    options = {"calibration": [x], "scheme": "w8a8-tensor", "progress": lambda *what: done.append(what)}
    with pytest.raises(RescaleError, match=r"cannot rescale .*exactly.* Use powers of two \(power_of_two=True\)"):
        equinorm.equalize(net.eval(), x, **options)
    assert not done
    assert equinorm.equalize(net, x, **options, power_of_two=True).measured_after > 0
    assert done


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w8a8-tensor", "w16a16"])
def test_half_precision_says_what_single_does(dtype, scheme):
    """Squares of its gradients, and steps of 16 bits, are beyond it."""
    net, x = perceptron(spread=0.0)
    with torch.no_grad():
        net[2].weight.mul_(30)
        net[4].weight.mul_(300)
    net = net.to(dtype)
    low, high = (
        equinorm.equalize(one, one_x, calibration=[one_x], scheme=scheme, power_of_two=True)
        for one, one_x in ((net, x.to(dtype)), (copy.deepcopy(net).float(), x.to(dtype).float()))
    )
    assert low.noise_before == pytest.approx(high.noise_before, abs=0.5)
    if scheme == "w8a8-tensor":
        assert low.measured_before == pytest.approx(high.measured_before, abs=4)
    else:
        assert low.measured_before > 25


# --------------------------------------------------------------------------------------------------------------- refusals


def refused(match, call):
    with pytest.raises(equinorm.EqualizeError, match=match):
        call()


def test_batches_without_rows_and_layers_without_channels():
    net, x = perceptron()
    refused("calibration batch 1 has no rows: leave it out", lambda: tensor_of(net, x, calibration=[x, x[:0]]))
    refused("batch 0 has no rows", lambda: tensor_of(net, x).measured([x[:0]]))
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Sequential(nn.Linear(5, 0), nn.ReLU(), nn.Linear(0, 2)).eval()
    refused(r"what 2 reads is empty .*in_float=\[name\]", lambda: tensor_of(empty, x.float()))


def test_other_inputs_than_the_models():
    net, x = perceptron()
    result = tensor_of(net, x, calibration=[x])
    refused(r"does not run on calibration batch 0, \(float64\[9, 6\]\)", lambda: result.measured([x.new_ones(9, 6)]))
    refused(r"does not run on inputs \(float64\[9, 6\]\)", lambda: result.simulated(x.new_ones(9, 6)))


def test_other_inputs_may_be_tuples_after_calibration_with_dicts():
    net, x = perceptron()
    named = tensor_of(net, (), kwargs={"input": x}, calibration=[{"input": x}])
    assert named.measured([(x,)]) == named.measured([{"input": x}]) == tensor_of(net, x, calibration=[x]).measured([x])


def test_keywords_of_one_batch_are_not_given_to_others():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x, shift=None):
            return self.second(self.first(x if shift is None else x + shift).relu())

    torch.manual_seed(0)
    x, shift = torch.randn(40, 5), torch.tensor(3.0)
    result = tensor_of(Shifted().eval(), x, calibration=[{"x": x, "shift": shift}])
    without = result.measured([(x,)])
    assert without == result.measured([{"x": x}]) != result.measured([{"x": x, "shift": shift}])


def test_gradients_that_are_not_finite():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x):
            x = self.layer(x)
            return torch.where(x > 0, x.sqrt(), torch.zeros_like(x))

    refused("gradients of Root are NaN or inf on calibration batch 0", lambda: tensor_of(Root().eval(), torch.randn(8, 5)))


def test_in_place_refuses_what_a_copy_refuses():
    net, x = perceptron()
    whole = nn.Sequential(net, nn.Dropout()).eval()
    whole[1].train()
    for equalize in (equinorm.equalize, equinorm.equalize_):
        refused("is in training mode, as 1", lambda equalize=equalize: equalize(whole, x))
    assert tensor_of(nn.DataParallel(net), x).measured_after > 20  # only the wrapper trains


def test_inference_mode():
    net, x = perceptron()
    with torch.inference_mode():
        refused("equalize outside of it", lambda: tensor_of(net, x))


@pytest.mark.parametrize("attribute", ["eps", "max_val"])
def test_attributes_of_modules_that_are_replaced(attribute):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.act, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU6(), nn.Linear(4, 2)

        def forward(self, x):
            number = self.norm.eps if attribute == "eps" else self.act.max_val
            return self.last(self.act(self.norm(self.first(x)))) + number

    net, x = Reads().eval(), torch.randn(8, 5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    refused(f"Reads reads the attribute '{attribute}' of a .* fold=False or free=False", lambda: tensor_of(net, x))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    copied, _ = prepare(net, x, fold=attribute != "eps", free=attribute != "max_val")
    assert torch.allclose(copied(x), net(x), atol=1e-5)
    with pytest.raises(equinorm.EquinormError, match="does not run on inputs"):
        prepare(net, functional.pad(x, (0, 1)))
