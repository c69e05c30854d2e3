"""Discovery against the oracle on one block of language models from Hugging Face: every rescaling that derivatives find.

EQUINORM_ZOO=1 tests every family (five minutes); the default is two.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torchvision") is None:
    pytest.skip("transformers and torchvision are not installed", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import zoo
import zoo_transformers
from oracle import verdict

SMALL = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"head_dim": 4, "vocab_size": 6, "max_position_embeddings": 12}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 3}
EXPERTS |= {"shared_expert_intermediate_size": 3}
OWN = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12},
    "opt": {"ffn_dim": 6, "word_embed_proj_dim": 8},
    "mamba": {"state_size": 2},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 1, "num_heads": 2},
}
"""Sizes that a family names in its own way."""

FOUND = {
    "llama": 36, "mistral": 36, "mixtral": 42, "qwen2": 36, "qwen2_moe": 39, "qwen3": 36, "qwen3_moe": 36, "gemma": 28,
    "gemma2": 28, "gemma3": 28, "phi3": 36, "olmo2": 20, "olmoe": 42, "gpt_neox": 38, "gpt2": 32, "falcon": 14, "opt": 38,
    "stablelm": 38, "starcoder2": 22, "nemotron": 37, "granite": 36, "granite_moe": 42, "cohere": 20, "gpt_oss": 30,
    "mamba": 18, "t5": 100, "bert": 24,
}  # fmt: skip
"""Dimension of the group of each, which the oracle confirms."""


class Block(nn.Module):
    """A model as a function of its token ids; in float64 throughout where it is run."""

    def __init__(self, model: nn.Module, others: dict[str, object]) -> None:
        super().__init__()
        self.model, self.others = model, others

    def forward(self, ids: Tensor) -> object:
        if torch.compiler.is_exporting():
            return self.model(input_ids=ids, **self.others)
        with zoo.Double():
            return self.model(input_ids=ids, **self.others)


@pytest.mark.parametrize("name", FOUND if os.environ.get("EQUINORM_ZOO") else ["llama", "mixtral"])
def test_every_symmetry_of_a_block_is_found(name):
    torch.manual_seed(0)
    sizes = SMALL | (EXPERTS if zoo_transformers.MODELS[name][2] is zoo_transformers.EXPERTS else {}) | OWN.get(name, {})
    unknown = zoo_transformers.UNKNOWN.get(name, ())
    model, _, kwargs = zoo_transformers.build(name, **{key: size for key, size in sizes.items() if key not in unknown})
    kwargs = {key: value[:, :4] if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    for module in model.modules():
        if getattr(module, "variance_epsilon", None):  # a tiny eps is almost a symmetry
            module.variance_epsilon = 0.3
    ids = kwargs.pop("input_ids")
    found = verdict(Block(model, kwargs).eval(), (ids,))
    assert found.residual < 1e-10, f"unsound: {found}"
    assert found.dimension == found.found == found.num_free == FOUND[name]
