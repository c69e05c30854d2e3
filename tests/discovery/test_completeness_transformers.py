"""Discovery against the oracle on one block of models from Hugging Face: every rescaling that derivatives find.

EQUINORM_ZOO=1 tests every family (ten minutes or more); the default is two.
"""

import importlib.util
import os

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torchvision") is None:
    pytest.skip("transformers and torchvision are not installed", allow_module_level=True)

from oracle import verdict

from zoo import __main__ as zoo, from_transformers as zoo_transformers

SMALL = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"head_dim": 4, "vocab_size": 6, "max_position_embeddings": 12}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 3}
EXPERTS |= {"shared_expert_intermediate_size": 3}
IMAGES = {"image_size": 8, "patch_size": 4}
OWN = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12},
    "opt": {"ffn_dim": 6, "word_embed_proj_dim": 8},
    "deepseek_v3": {"num_key_value_heads": 2, "n_routed_experts": 3, "moe_intermediate_size": 3, "first_k_dense_replace": 0}
    | {"q_lora_rank": 4, "kv_lora_rank": 4, "head_dim": 2, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 3},
    "mamba": {"state_size": 2},
    "mamba2": {"state_size": 2, "num_heads": 4, "chunk_size": 2},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 1, "num_heads": 2},
    "vit": IMAGES,
    "clip": {"text_config": {**SMALL, "eos_token_id": 2}, "vision_config": {**SMALL, **IMAGES}, "projection_dim": 4},
    "whisper": {"d_model": 8, "num_mel_bins": 2, "max_source_positions": 4, "max_target_positions": 4}
    | {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 6}
    | {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 6},
    "wav2vec2": {"conv_dim": (4, 4), "conv_stride": (2, 2), "conv_kernel": (3, 2)}
    | {"num_conv_pos_embeddings": 3, "num_conv_pos_embedding_groups": 2},
    "segformer": {"num_hidden_layers": 2, "depths": [1, 1], "hidden_sizes": [4, 6], "decoder_hidden_size": 4}
    | {"patch_sizes": [3, 3], "strides": [2, 2], "sr_ratios": [2, 1], "num_attention_heads": [1, 2], "mlp_ratios": [1, 1]},
}
"""Sizes that a family names in its own way."""

INPUTS = {"input_ids": (2, 4), "decoder_input_ids": (2, 4), "pixel_values": (2, 3, 8, 8)}
INPUTS |= {"input_features": (2, 2, 8), "input_values": (2, 24)}
"""Their shapes, by name."""

FOUND = {
    "llama": 36, "mistral": 36, "mixtral": 42, "qwen2": 36, "qwen2_moe": 39, "qwen3": 36, "qwen3_moe": 36, "gemma": 28,
    "gemma2": 28, "gemma3": 28, "phi3": 36, "olmo2": 20, "olmoe": 42, "gpt_neox": 38, "gpt2": 32, "falcon": 14, "opt": 38,
    "stablelm": 38, "starcoder2": 22, "nemotron": 37, "granite": 36, "granite_moe": 42, "cohere": 20, "gpt_oss": 30,
    "deepseek_v3": 55, "mamba": 18, "mamba2": 56, "bert": 24, "roberta": 24, "t5": 100, "vit": 40, "clip": 72, "whisper": 88,
    "wav2vec2": 31, "segformer": 76,
}  # fmt: skip
"""Dimension of the group of each, which the oracle confirms."""


class Block(nn.Module):
    """A model as a function of its tensors by these names; in float64 throughout where it is run."""

    def __init__(self, model: nn.Module, names: list[str], others: dict[str, object]) -> None:
        super().__init__()
        self.model, self.names, self.others = model, names, others

    def forward(self, *inputs: Tensor) -> object:
        inputs = dict(zip(self.names, inputs, strict=True))
        if torch.compiler.is_exporting():
            return self.model(**inputs, **self.others)
        with zoo.Double():
            return self.model(**inputs, **self.others)


@pytest.mark.parametrize("name", FOUND if os.environ.get("EQUINORM_ZOO") else ["llama", "mixtral"])
def test_every_symmetry_of_a_block_is_found(name):
    torch.manual_seed(0)
    sizes = SMALL | (EXPERTS if zoo_transformers.MODELS[name][2] is zoo_transformers.EXPERTS else {}) | OWN.get(name, {})
    unknown = zoo_transformers.UNKNOWN.get(name, ())
    model, _, kwargs = zoo_transformers.build(name, **{key: size for key, size in sizes.items() if key not in unknown})
    for module in model.modules():
        if getattr(module, "variance_epsilon", None):  # a tiny eps is almost a symmetry
            module.variance_epsilon = 0.3
    inputs = {key: kwargs.pop(key)[tuple(map(slice, shape))] for key, shape in INPUTS.items() if key in kwargs}
    found = verdict(Block(model, list(inputs), kwargs).eval(), tuple(inputs.values()))
    assert found.residual < 1e-10, f"unsound: {found}"
    assert found.dimension == found.found == found.num_free == FOUND[name]
