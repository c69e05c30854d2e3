"""Layouts are worked out once for a network, and anew where another question is asked."""

import copy
import pickle

import pytest
import torch
from algorithm_1 import mlp

import equinorm
from equinorm.balancing import kept_layouts


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
