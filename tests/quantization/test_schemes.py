"""Schemes: what they say, their short form, and what they refuse."""

import pytest
import torch

from equinorm import EqualizeError
from equinorm.quantization import Scheme
from equinorm.quantization.fake_quantization import rounded, rounded_weight
from equinorm.quantization.points import Point


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("w8a8", Scheme()),
        ("w4", Scheme(4, "channel", activation_bits=None)),
        ("w4g32", Scheme(4, 32, activation_bits=None)),
        ("w4g32a8", Scheme(4, 32)),
        ("W8A8-tensor", Scheme(8, "tensor")),
    ],
)
def test_short_forms(text, wanted):
    assert Scheme.parse(text) == wanted
    assert Scheme.parse(str(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("onnxruntime", Scheme(8, "tensor", sums=True, outputs=True)),
        ("onnxruntime-channel", Scheme(8, sums=True, outputs=True)),
        ("XNNPACK", Scheme(8, "tensor", sums=True, outputs=True, fused_clamps=False)),
        ("x86", Scheme(sums=True)),
        ("x86-tensor", Scheme(8, "tensor", sums=True)),
    ],
)
def test_names_of_tools_stand_for_what_they_round(text, wanted):
    assert Scheme.parse(text) == wanted
    assert str(wanted) == text.lower()


def test_what_the_short_form_does_not_say_is_said_too():
    assert str(Scheme(weight_symmetric=False)) == "w8a8, weight_symmetric=False"
    assert str(Scheme(4, 32, activation_bits=None, clip=True)) == "w4g32, clip=True"
    assert str(Scheme(overrides={"layer1.*": "w4"}, in_float=["head"])) == "w8a8, layer1.*: w4, head in float"
    assert str(Scheme(8, "tensor", sums=True, outputs=True, clip=True)) == "w8a8-tensor, clip=True, sums=True, outputs=True"


@pytest.mark.parametrize(
    "text", ["onnxruntime-row", "x86-", "w٨a8", "", "8", "w8a", "w8a8-row", "a8", "w4g0", "w1a8", "w8a17", "w4g8-tensor", 8]
)
def test_other_texts_are_refused(text):
    with pytest.raises(EqualizeError):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"weight_bits": 1}, "weight_bits"),
        ({"weight_bits": True}, "weight_bits"),
        ({"activation_bits": 0}, "activation_bits"),
        ({"weight_granularity": "row"}, "weight_granularity"),
        ({"weight_granularity": True}, "weight_granularity"),
        ({"weight_symmetric": 1}, "weight_symmetric"),
        ({"overrides": {"a": 3}}, "scheme"),
        ({"overrides": 3}, "overrides"),
        ({"in_float": 3}, "in_float"),
        ({"clip": 1}, "clip"),
        ({"sums": None}, "sums"),
        ({"fused_clamps": "no"}, "fused_clamps"),
    ],
)
def test_wrong_values_are_named(options, word):
    with pytest.raises(EqualizeError, match=word):
        Scheme(**options)


def test_overrides_and_what_stays_in_float():
    scheme = Scheme(overrides={"layer1.*": "w4", "layer*": Scheme(2)}, in_float=["head"])
    assert scheme.within("head") is None
    assert scheme.within("layer1.0") == Scheme.parse("w4")
    assert scheme.within("layer2.0") == Scheme(2)
    assert scheme.within("other") is scheme
    hash(scheme)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_has_as_many_steps_as_bits_say(symmetric):
    values = torch.linspace(-1.0, 3.0, 100_001, dtype=torch.float64)
    found = rounded(values, values.min(), values.max(), 3, symmetric)
    step = 3.0 / 3 if symmetric else 4.0 / 7
    assert len(found.unique()) == (5 if symmetric else 8)  # from −1 on, of −3 … 3
    assert float((found - values).abs().max()) <= step / 2 + 1e-12
    assert 0.0 in found.tolist()
    assert rounded(torch.zeros(3), torch.tensor(0.0), torch.tensor(0.0), 8, symmetric).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("symmetric", "expected"), [(False, [-1, -1, 0, 1, 2, 2]), (True, [-2, -2, 0, 0, 2, 2])])
def test_numbers_beyond_the_bounds_are_cut_off(symmetric, expected):
    """Steps of 1 from −1 to 2, or of 2 from −2 to 2; what is given stays as it is."""
    values = torch.tensor([-5.0, -1.2, -0.4, 0.6, 2.0, 9.0])
    before = values.clone()
    assert rounded(values, torch.tensor(-1.0), torch.tensor(2.0), 2, symmetric).tolist() == expected
    assert torch.equal(values, before)


@pytest.mark.parametrize("block", ["tensor", "channel", 16])
def test_clipped_ranges_are_the_best_fractions(block):
    """Of tails as heavy as these, 3 bits do better to leave out the largest."""
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((6, 64, 3)).double()

    def made(clip, weight=weight):
        point = Point("layer", "layer.weight", 0, 1, False, Scheme(3, block, clip=clip), None)
        return rounded_weight(weight, point)

    def errors(found):
        squares = (found - weight).square()
        return squares.sum() if block == "tensor" else squares.reshape(6, -1, 16 if block == 16 else 64, 3).sum((2, 3))

    plain, clipped = errors(made(False)), errors(made(True))
    assert bool((clipped <= plain).all())
    assert float(clipped.sum()) < 0.8 * float(plain.sum())
    rows = made(True).reshape(1 if block == "tensor" else 6, -1)[:, : 48 if block == 16 else None]
    assert all(len(row.unique()) <= 7 for row in rows)
