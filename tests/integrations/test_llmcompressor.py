"""Mappings in llm-compressor's own classes, resolved and applied by its own modifiers."""
# ruff: noqa: E402 -- what is imported below may not be installed

import copy
import importlib.util

import pytest

for package in ("transformers", "llmcompressor"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

import torch

import equinorm
import mappings as audit
from zoo import from_transformers as zoo

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages' own making


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen2MoeForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"])
def analysed(request):
    zoo.import_transformers()
    from equinorm.integrations.llmcompressor import mappings

    torch.manual_seed(0)
    model, inputs = audit.build(request.param)
    return request.param, model, inputs, mappings(equinorm.symmetries(model, (), inputs))


@pytest.mark.parametrize("kind", ["smoothquant", "awq"])
def test_its_modifiers_resolve_and_apply_them_without_a_deviation(analysed, kind):
    from llmcompressor.modeling.moe.linearize import linearize_moe

    name, model, inputs, found = analysed
    linearize_moe(model)
    model, inputs = audit.doubled(model, inputs)
    before = audit.outputs(model, inputs)
    record = audit.deviation(model, inputs, before, getattr(audit, kind), getattr(found, kind))
    assert record["deviation"] < 1e-6, record  # norms compute in float32
    assert len(record["scaled"]) == len(getattr(found, kind))
    assert record["scaled"], name
    mappings = copy.deepcopy(getattr(found, kind))
    for mapping in mappings:
        if len(mapping.balance_layers) > 1:  # what is left out is noticed
            mapping.balance_layers.pop()
            record = audit.deviation(model, inputs, before, getattr(audit, kind), mappings)
            assert record["deviation"] > 1e-4, record
            break


def test_modifiers_take_them(analysed):
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    *_, found = analysed
    assert SmoothQuantModifier(mappings=found.smoothquant).mappings
    assert AWQModifier(mappings=found.awq).mappings == found.awq


def test_what_its_classes_cannot_say_is_left_out_with_a_reason(analysed):
    name, _, _, found = analysed
    if name == "LlamaForCausalLM":
        assert any("cancel in a product" in text for text in found.left_out)
        assert any("some several times" in text for text in found.left_out)
    assert all(text.endswith(".") for text in found.left_out)
