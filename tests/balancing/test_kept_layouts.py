"""Layouts are worked out once for a network, and anew where another question is asked."""

import copy
import pickle

import pytest
import torch
from algorithm_1 import mlp
from torch import nn

import equinorm
from equinorm.balancing import kept_layouts, layout


@pytest.fixture
def count(monkeypatch):
    made = []
    lay_out = kept_layouts.lay_out
    monkeypatch.setattr(kept_layouts, "lay_out", lambda *arguments: made.append(1) or lay_out(*arguments))
    return made


def network():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    return model, equinorm.symmetries(model, (inputs,)), inputs


def test_a_second_balance_finds_them(count):
    model, found, inputs = network()
    first = found.balance()
    again = found.balance()
    assert len(count) == 1
    assert torch.equal(first.log_scales, again.log_scales)
    with torch.no_grad():
        model[2].weight.mul_(3)
    changed = found.balance()
    assert len(count) == 1
    assert torch.equal(changed.log_scales, equinorm.symmetries(model, (inputs,)).balance().log_scales)
    assert not torch.equal(changed.log_scales, first.log_scales)


@pytest.mark.parametrize("options", [{"biases": True}, {"modules": ["0", "2"]}], ids=str)
def test_other_questions_have_other_layouts(count, options):
    model, found, inputs = network()
    plain = found.balance()
    other = found.balance(**options)
    assert len(count) == 2
    assert torch.equal(other.log_scales, equinorm.symmetries(model, (inputs,)).balance(**options).log_scales)
    assert not torch.equal(other.log_scales, plain.log_scales)
    assert torch.equal(found.balance(p=2.0).log_scales, plain.log_scales)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))], ids=["copied", "pickled"])
def test_copies_begin_without(count, copied):
    _, found, _ = network()
    found.balance()
    assert found.kept
    assert not copied(found.kept)


def test_large_ones_are_not_kept(count, monkeypatch):
    monkeypatch.setattr(kept_layouts, "LARGEST", 3)
    _, found, _ = network()
    assert torch.equal(found.balance().log_scales, found.balance().log_scales)
    assert len(count) == 2
    assert not found.kept


def test_the_short_way_to_a_layout_leads_to_the_same(monkeypatch):
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, groups=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2)),
    )
    found = equinorm.symmetries(model.eval(), (torch.randn(1, 3, 4, 4),))
    asked = [s for s in found.scalings if s.factors], found.family_ranges, found.num_free, torch.zeros(found.num_free + 1) > 0
    short = layout._plain_layouts(asked[0], layout.family_of_classes(found.family_ranges, found.num_free))
    monkeypatch.setattr(layout, "_is_along_one_axis", lambda scaling: False)
    general = layout.lay_out(*asked).layouts
    pairs = [(one, other) for one, other in zip(short, general, strict=True) if one is not None]
    assert 5 <= len(pairs) < len(general)
    for one, other in pairs:
        assert (one.scaling, one.along, one.is_matrix) == (other.scaling, other.along, other.is_matrix)
        for part, same in zip(one.parts, other.parts, strict=True):
            assert (part.picks, part.loops) == (same.picks, same.loops)
            for side, own in zip(part.sides, same.sides, strict=True):
                assert (side.family, side.exponent, side.ids.tolist()) == (own.family, own.exponent, own.ids.tolist())
