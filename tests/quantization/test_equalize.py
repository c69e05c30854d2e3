"""Equalization: the same function, less noise, and words for what cannot be."""

import copy
import json
import math

import pytest
import torch
from quantized_networks import mixed, perceptron
from torch import nn

import equinorm
from equinorm import EqualizeError
from equinorm.quantization import Scheme


@pytest.fixture(scope="module")
def uneven():
    return mixed(0, 1.5)


@pytest.fixture(scope="module")
def found(uneven):
    net, x = uneven
    return equinorm.equalize(net, x, calibration=[x[:8], (x[8:],)], scheme="w8a8-tensor")


def test_function_is_unchanged_and_noise_is_less(uneven, found):
    net, x = uneven
    assert equinorm.deviation(found.model, net, x) <= 1e-12
    assert found.converged
    assert found.gap <= 5e-3
    assert found.noise_after > found.noise_before + 6
    assert found.measured_after > found.measured_before + 6
    assert found.samples == len(x)


def test_the_model_is_untouched_and_the_copy_is_what_the_log_scales_say(uneven, found):
    net, x = uneven
    before = copy.deepcopy(net.state_dict())
    again = equinorm.equalize_(twin := copy.deepcopy(net), x, calibration=[x], scheme="w8a8-tensor")
    assert again.model is twin
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    moved = copy.deepcopy(net)
    equinorm.symmetries(moved, (x,)).rescale_(found.log_scales)
    assert all(torch.equal(one, other) for one, other in zip(moved.parameters(), found.model.parameters(), strict=True))


def test_measuring_again_gives_the_same_and_other_data_something_near(uneven, found):
    _, x = uneven
    assert found.measured() == pytest.approx((found.measured_before, found.measured_after), abs=1e-6)
    assert found.measured([x[:9]])[1] == pytest.approx(found.measured_after, abs=5)


def test_powers_of_two_change_no_bit(uneven):
    net, x = uneven
    net, x = copy.deepcopy(net).float(), x.float()
    found = equinorm.equalize(net, x, calibration=[x], scheme="w8a8-tensor", power_of_two=True)
    assert equinorm.deviation(found.model, net, x) == 0.0
    assert bool(found.log_scales.any())
    assert "powers of two" in found.reason


def test_scales_stay_within_bounds(uneven):
    net, x = uneven
    found = equinorm.equalize(net, x, calibration=[x], scheme="w8a8-tensor", largest=2.0)
    assert 0.5 < float(found.log_scales.abs().max()) <= math.log(2.0)


@pytest.mark.parametrize("largest", [6.0, 8.0, math.inf])
def test_powers_of_two_stay_within_bounds_too(uneven, largest):
    net, x = uneven
    found = equinorm.equalize(net, x, calibration=[x], scheme="w8a8-tensor", largest=largest, power_of_two=True)
    assert 2 <= float(found.log_scales.exp().max()) < 1.001 * largest


def test_bias_correction_takes_out_what_rounding_shifts():
    """Means over many positions and samples show what single errors do on average."""
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    layers = nn.Conv2d(2, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 16, 1, bias=False), nn.ReLU(), *head
    net, x = nn.Sequential(*layers).double().eval(), torch.randn(16, 2, 8, 8, dtype=torch.float64)
    plain, corrected = (
        equinorm.equalize(net, x, calibration=[x], scheme="w4a8-tensor", bias_correction=wanted) for wanted in (False, True)
    )
    assert corrected.measured_after > plain.measured_after + 6
    assert corrected.measured() == pytest.approx((corrected.measured_before, corrected.measured_after), abs=1e-6)
    assert set(corrected.corrections) == {"0.weight", "2.weight", "6.weight"}
    assert net[2].bias is None
    assert corrected.model[2].bias is not None
    assert not plain.corrections


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_what_layers_share_is_not_corrected(tensor):
    """One layer's shift would move the other, and more than was measured."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    setattr(net[2], tensor, getattr(net[0], tensor))
    x = 3 * torch.randn(16, 6, dtype=torch.float64)
    found = equinorm.equalize(net, x, calibration=[x], scheme="w3a4-tensor", bias_correction=True)
    assert set(found.corrections) <= {"4.weight"}
    assert found.measured() == pytest.approx((found.measured_before, found.measured_after), abs=1e-6)


def test_biases_of_grouped_convolutions_are_corrected():
    """How many groups there are is no factor of the bias."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, "valid", groups=2), nn.Flatten()
    net, x = nn.Sequential(*layers).double().eval(), torch.randn(8, 4, 7, 7, dtype=torch.float64)
    found = equinorm.equalize(net, x, calibration=[x], scheme="w3a8-tensor", bias_correction=True)
    assert dict(found.biases) == {"0.weight": "0.bias", "2.weight": "2.bias"}
    assert not found.left


class Functional(nn.Module):
    """A layer without a bias whose weight a function reads: a bias of its module would do nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 2, bias=False)

    def forward(self, x):
        return self.last(nn.functional.linear(x, self.first.weight).relu())


def test_a_bias_that_nothing_would_read_is_not_corrected():
    torch.manual_seed(3)
    net, x = Functional().double().eval(), 3 * torch.randn(16, 6, dtype=torch.float64)
    found = equinorm.equalize(net, x, calibration=[x], scheme="w3a4-tensor", bias_correction=True)
    assert dict(found.biases) == {"last.weight": "last.bias"}
    assert found.model.first.bias is None
    assert "would not read" in found.left["bias of first"]


class Again(nn.Module):
    """A layer whose first result nothing reads."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        self.layer(x)
        return self.last(self.layer(self.first(x).relu()).relu())


def test_a_corrected_bias_counts_in_every_call():
    torch.manual_seed(3)
    net, x = Again().double().eval(), 3 * torch.randn(16, 6, dtype=torch.float64)
    found = equinorm.equalize(net, x, calibration=[x], scheme="w3a4-tensor", bias_correction=True)
    assert "layer.weight" in found.corrections
    assert found.measured() == pytest.approx((found.measured_before, found.measured_after), abs=1e-6)


class TwoBiases(nn.Module):
    """A weight that two calls use, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.last, self.bias = nn.Linear(6, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.last(nn.functional.linear(self.layer(x).relu(), self.layer.weight, self.bias).relu())


def test_a_weight_with_another_bias_in_each_call_is_not_corrected():
    torch.manual_seed(3)
    net, x = TwoBiases().double().eval(), 3 * torch.randn(16, 6, dtype=torch.float64)
    found = equinorm.equalize(net, x, calibration=[x], scheme="w3a4-tensor", bias_correction=True)
    assert dict(found.biases) == {"last.weight": "last.bias"}
    assert "another in each call" in found.left["bias of layer"]


def test_normalizations_are_folded_and_bounds_set_free():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)]
    net = nn.Sequential(*layers, nn.ReLU6(), nn.Conv2d(8, 4, 1)).double().eval()
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.1, 9.0)
    x = torch.randn(8, 2, 9, 9, dtype=torch.float64)
    found = equinorm.equalize(net, x, calibration=[x], scheme="w8a8-tensor")
    assert equinorm.deviation(found.model, net, x) <= 1e-12
    assert found.symmetries.num_free == 16
    assert found.noise_after > found.noise_before + 1
    assert dict(found.preparation.folded) == {"1": "0", "4": "3"}
    assert {type(module).__name__ for module in found.model} == {"Conv2d", "Identity", "Clamp"}
    assert found.measured() == pytest.approx((found.measured_before, found.measured_after), abs=1e-6)


def test_prediction_knows_of_clipped_ranges():
    """Few weights are far off: without them the steps are several times smaller, and their own errors are large."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 6)).double().eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.distributions.StudentT(3.0).sample((40, 40)))
    x = torch.randn(64, 40, dtype=torch.float64)
    clipped = equinorm.equalize(net, x, calibration=[x], scheme=Scheme(4, "tensor", activation_bits=None, clip=True))
    assert clipped.noise_before == pytest.approx(clipped.measured_before, abs=1)  # 2.5 dB less without that
    assert clipped.noise_after == pytest.approx(clipped.measured_after, abs=1.5)
    alone = 10 * math.log10(sum(10 ** (-tensor.before / 10) for tensor in clipped.tensors))
    assert clipped.noise_before == pytest.approx(-alone, abs=1e-9)


@pytest.mark.parametrize("is_in_place", [False, True])
def test_sums_are_rounded_where_the_scheme_says_so(is_in_place):
    """Weights of 16 bits lose nothing: what is lost besides the inputs of layers is lost at the sum."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Conv2d(*shape) for shape in ((2, 6, 3), (6, 6, 1), (6, 3, 1)))

        def forward(self, x):
            x = torch.relu(self.first(x))
            y = self.second(nn.functional.pad(x, (1, 1, 1, 1)))[..., 1:-1, 1:-1]
            if is_in_place:
                y += x
            else:
                y = torch.add(y, x)
            return self.last(y.relu()).mean((2, 3))

    torch.manual_seed(0)
    net, x = Residual().double().eval(), torch.randn(16, 2, 6, 6, dtype=torch.float64)
    without, found = (
        equinorm.equalize(net, x, calibration=[x], scheme=Scheme(16, "tensor", True, 6, in_float=["first", "last"], sums=sums))
        for sums in (False, True)
    )
    assert [tensor.name for tensor in found.tensors][-2:] == ["sum 1 (operand 1)", "sum 1 (operand 2)"]
    assert without.measured_before > found.measured_before + 3
    assert found.measured_before == pytest.approx(found.noise_before, abs=3)
    assert equinorm.deviation(found.model, net, x) <= 1e-12
    assert bool(found.log_scales.any())
    assert found.measured() == pytest.approx((found.measured_before, found.measured_after), abs=1e-6)
    assert [ranges.name for ranges in found.channel_ranges()] == ["second.weight"]


class Hidden(nn.Module):
    """Its first sum is not one of the exported graph: the example decides."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        y = self.layer(x)
        y = y if torch.compiler.is_compiling() else y + 1.0 * y
        return torch.cat([y, y[:, :2] + 2.0 * y[:, 1:]], 1)


def test_sums_that_cannot_be_found_stay_in_float_and_are_said():
    found = equinorm.equalize(Hidden().eval(), X, calibration=[X], scheme=Scheme(sums=True))
    assert [one.name for one in found.points if one.key[0] != "layer.weight"] == [f"sum 2 (operand {n})" for n in (1, 2)]
    assert found.left == {"sum 1": "which sum of the exported graph it is, so how it scales, cannot be told"}
    assert ("left", "sum 1: which sum of the exported graph it is, so how it scales, cannot be told") in found.facts


class Tokens(nn.Module):
    """Positions are a constant, the mask is left out where it hides nothing, and two residual sums stand on one line."""

    def __init__(self):
        super().__init__()
        self.table, self.positions = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, words, mask):
        x = self.table(words) + self.positions(torch.arange(6))[None]
        for layer in (self.first, self.second):
            scores = x @ x.transpose(1, 2)
            if torch.compiler.is_compiling() or not bool(mask.all()):
                scores = scores + torch.where(mask, 0.0, torch.finfo(x.dtype).min)[:, None]
            x = layer(scores.softmax(-1) @ x) + x
        return x


def test_sums_of_masks_and_constants_stay_in_float_and_others_are_told_apart_by_their_line():
    """The rounding of residual sums counts though one batch hides nothing, so that its first sums are others."""
    torch.manual_seed(0)
    net, words, mask = (
        Tokens().eval(),
        torch.randint(0, 9, (4, 6)),
        torch.arange(6).expand(4, 6) < torch.tensor([[3], [6], [5], [6]]),
    )
    batches = [(words, torch.ones_like(mask)), (words, mask), (words[:1], mask[:1])]
    found = equinorm.equalize(net, (words, mask), calibration=batches, scheme=Scheme(16, "tensor", True, 6, sums=True))
    assert [one.name for one in found.points if one.key[0].count("+")] == [
        *("sum 2 (operand 1)", "sum 3 (operand 1)", "sum 3 (operand 2)", "sum 4 (operand 1)", "sum 5 (operand 1)"),
        "sum 5 (operand 2)",
    ]
    masked = dict.fromkeys(("sum 2 (operand 2)", "sum 4 (operand 2)"), "its numbers are those of a mask")
    assert found.left == {"sum 1": "one of its operands does not depend on the inputs", **masked}
    assert found.measured_before == pytest.approx(found.noise_before, abs=3)
    assert found.samples == 9


def test_a_transformer_of_a_library_is_not_refused():
    """Its embeddings are sums with constants, which the exported graph knows and the run does not."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, attn_implementation="eager", **sizes)
    net, words = transformers.BertModel(config, add_pooling_layer=False).eval(), torch.randint(0, 20, (4, 6))
    inputs = {"input_ids": words, "attention_mask": (torch.arange(6) < torch.tensor([[3], [6], [5], [6]])).long()}
    found = equinorm.equalize(net, (), inputs, calibration=[inputs], scheme=Scheme(sums=True))
    rounded = [point.name.partition(" in ")[0] for point in found.points if "+" in point.key[0] and point.key[1] == 0]
    assert rounded == ["sum 3", "sum 4", "sum 5"]
    assert list(found.left.values()) == [
        *2 * ["one of its operands does not depend on the inputs"],
        "its numbers are those of a mask",
    ]


def test_a_sum_that_no_batch_makes_stays_in_float():
    net, words, mask = Tokens().eval(), torch.randint(0, 9, (4, 6)), torch.arange(6).expand(4, 6) < 3
    found = equinorm.equalize(net, (words, mask), calibration=[(words, mask | True)], scheme=Scheme(sums=True))
    assert found.left["sum 2 (operand 1)"] == found.left["sum 4 (operand 1)"] == "no calibration batch adds it"


def test_sums_of_exported_graphs_are_rounded():
    torch.manual_seed(0)
    net, x = mixed(0, 1.5)
    graph = torch.export.export(net, (x,)).module()
    one, other = (equinorm.equalize(model, x, calibration=[x], scheme=Scheme(sums=True)) for model in (net, graph))
    assert any(isinstance(point.key[0], str) and "+" in point.key[0] for point in other.points)
    assert other.measured() == pytest.approx((other.measured_before, other.measured_after), abs=1e-6)
    assert other.measured_before == pytest.approx(one.measured_before, abs=1e-6)


def test_random_inputs_do_without_data(uneven):
    net, x = uneven
    found = equinorm.equalize(net, x, scheme="w8a8-tensor")
    assert found.samples >= 32
    assert found.noise_after > found.noise_before + 6


def test_what_is_worse_measured_is_not_taken(monkeypatch, uneven, found):
    from equinorm.quantization import solve as module

    _, x = uneven
    wrong = module.LeastNoise(-found.log_scales.numpy(), -1.0, -1.0, 1)
    monkeypatch.setattr(module, "minimize", lambda *_: wrong)
    back = equinorm.equalize(found.model, x, calibration=[x], scheme="w8a8-tensor")
    assert not bool(back.log_scales.any())
    assert "best when rounded for real: the scales as they were" in back.reason
    assert back.measured_after == back.measured_before


def test_errors_that_many_positions_share_count_together():
    """Zeros behind ReLU become one constant behind an affine map; rounded alike everywhere, their errors add up."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)
            self.gain, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            return self.last(torch.relu(self.first(x)) * self.gain + self.shift).mean(2)

    torch.manual_seed(0)
    net, x = Constant().double().eval(), torch.randn(8, 1, 100, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight.fill_(1.0), net.first.bias.fill_(-1.0)
    found = equinorm.equalize(net, x, calibration=[x], scheme=Scheme(16, "tensor", True, 8))
    seen = found.activations["last.weight", 0]
    assert float(seen.coherent / seen.sensitivity) > 0.9
    # all zeros alone: F = mean over samples of (share of zeros · w)²
    share = (x <= 1.0).double().mean(2).square().mean() * net.last.weight.item() ** 2
    assert float(seen.coherent) == pytest.approx(float(share), rel=1e-9)


def test_record_and_pictures(tmp_path, found):
    record = found.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record["scheme"] == "w8a8-tensor"
    assert [tensor["name"] for tensor in record["tensors"]][:2] == ["first.weight", "input of first"]
    assert "dB predicted" in str(found)
    assert "signal over noise" in found._repr_html_()
    assert len(found.table) == len(found.tensors) == 13
    pytest.importorskip("matplotlib")
    found.report(tmp_path / "page.html")
    found.report(tmp_path / "picture.png")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<img") == 2
    assert "depthwise.weight" in page
    assert len(found.plot()) == 2


def net_of(*layers):
    return nn.Sequential(*layers).eval()


LINEAR = net_of(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
X = torch.randn(5, 3)


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    @torch.no_grad()
    def forward(self, x):
        return self.layer(x)


class Unread(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.LayerNorm(3)

    def forward(self, x):
        self.layer(x)
        return self.norm(x)


class Overwritten(nn.Module):
    """What the way back reads of a sigmoid is changed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x).sigmoid().mul_(2)


@pytest.mark.parametrize(
    ("net", "options", "words"),
    [
        (LINEAR, {"calibration": [torch.randn(5, 4)]}, "does not run on calibration batch 0"),
        (LINEAR, {"calibration": [(X, X)]}, "the number of inputs differs. Leave out what the model does not take, as labels"),
        (LINEAR, {"calibration": [X[0]]}, "they may differ in sizes alone"),
        (LINEAR, {"calibration": [X, 3]}, "calibration batch 1 must be a tuple of inputs, not int"),
        (LINEAR, {"calibration": X}, "For one"),
        (LINEAR, {"calibration": []}, "holds no batch"),
        (LINEAR, {"calibration": [X * math.nan]}, "NaN or inf on calibration batch 0"),
        (LINEAR, {"calibration": [X], "scheme": "int8"}, "a scheme is written as"),
        (LINEAR, {"calibration": [X], "scheme": 8}, "scheme must be"),
        (LINEAR, {"scheme": Scheme(in_float=["*"])}, "all its layers stay in float"),
        (LINEAR, {"scheme": Scheme(in_float=["hed"])}, "pattern 'hed' matches no layer"),
        (LINEAR, {"scheme": Scheme(overrides={"*": "w4", "x.*": "w4"})}, r"pattern 'x\.\*' matches no layer"),
        (LINEAR, {"largest": 0.5}, "largest must be a number above 1"),
        (LINEAR, {"tol": 0}, "tol must be a number above 0"),
        (LINEAR, {"progress": 3}, "progress must be a function"),
        (net_of(nn.ReLU()), {}, "calls no linear layer or convolution"),
        (nn.Sequential(nn.Linear(3, 3)).train(), {}, "training mode"),
        (net_of(nn.Linear(3, 4), torch.ao.quantization.FakeQuantize()), {}, "is quantized already"),
        (NoGradient().eval(), {}, "no gradient reaches"),
        (Unread().eval(), {}, "no output depends on its layers"),
        (Overwritten().eval(), {}, "gradients of Overwritten cannot be taken"),
        (3, {}, "model must be a torch.nn.Module"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(net, options, words):
    before = copy.deepcopy(net.state_dict()) if net is LINEAR else {}
    with pytest.raises(EqualizeError, match=words) as caught:
        equinorm.equalize_(net, X, **options)
    assert len(str(caught.value)) < 400
    assert all(torch.equal(value, LINEAR.state_dict()[name]) for name, value in before.items())


def test_a_network_without_freedom_says_so():
    net = net_of(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    found = equinorm.equalize(net, X, calibration=[X])
    assert found.reason.startswith("no hidden channel of Sequential can be rescaled")
    assert found.noise_after == found.noise_before


def test_layers_in_float_and_overrides_cost_what_they_should():
    net, x = perceptron(0)
    whole = equinorm.equalize(net, x, calibration=[x])
    part = equinorm.equalize(net, x, calibration=[x], scheme=Scheme(in_float=["0"], overrides={"4": "w4"}))
    assert [t.name for t in part.tensors] == ["2.weight", "input of 2", "4.weight"]
    assert {t.name for t in whole.tensors} > {"0.weight", "input of 4"}
    assert part.noise_after < whole.noise_after
