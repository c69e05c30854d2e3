"""Hugging Face transformers, from tiny configurations of every family that people run.

Needs transformers (`pip install transformers`).
"""

from typing import Any

import torch
from torch import nn

from zoo.from_torchvision import import_models

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS |= {"shared_expert_intermediate_size": 24}
_IMAGES = {"image_size": 16, "patch_size": 4, "num_channels": 3}
_ENCODER = {key: _DECODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", EXPERTS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", EXPERTS),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {}),
    "granite_moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", EXPERTS),
    "cohere": ("CohereForCausalLM", "CohereConfig", {}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", EXPERTS),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", {}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {"max_position_embeddings": 40}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGES),
    "clip": ("CLIPModel", "CLIPConfig", {}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 20,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 8}
        | {"num_conv_pos_embedding_groups": 4, "apply_spec_augment": False},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
        },
    ),
}
"""Classes of model and configuration, and what the configuration has beside the common sizes."""

UNKNOWN = {"falcon": ("head_dim",)}
"""Common sizes that a configuration does not take."""


def import_transformers() -> Any:
    """transformers, silent."""
    import_models()  # transformers imports torchvision where it is installed
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def names() -> list[str]:
    """Every family above."""
    return list(MODELS)


def family(name: str) -> str:
    """Each is one of its own."""
    return name


def build(name: str, **sizes: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model and inputs for it. Not on meta: masks and rotary tables are computed, and tiny as it is."""
    with torch.device("cpu"):
        return _build(name, sizes)


def _build(name: str, other: dict[str, int]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    transformers = import_transformers()
    model_class, config_class, options = MODELS[name]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    if name == "clip":
        sizes = {"text_config": {**_DECODER, **tokens}, "vision_config": _ENCODER | _IMAGES, "projection_dim": 16} | other
        config = transformers.CLIPConfig(**sizes)
    else:
        sizes = {key: value for key, value in _DECODER.items() if key not in UNKNOWN.get(name, ())}
        config = getattr(transformers, config_class)(**{**sizes, **tokens, **options, **other})
    if hasattr(config, "layer_types") and name == "gemma3":
        config.sliding_window = 4
    config._experts_implementation = "batched_mm"
    model = getattr(transformers, model_class)(config)
    ids = torch.randint(3, other.get("vocab_size", 64), (2, 9))
    image = torch.randn(2, 3, 64 if name == "segformer" else 16, 64 if name == "segformer" else 16)
    if name in ("vit", "segformer"):
        return model, (), {"pixel_values": image}
    if name == "clip":
        return model, (), {"input_ids": ids, "pixel_values": image}
    if name == "wav2vec2":
        return model, (), {"input_values": torch.randn(2, 400)}
    if name == "whisper":
        return model, (), {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids, "use_cache": False}
    if name == "t5":
        return model, (), {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    if name in ("bert", "roberta"):
        return model, (), {"input_ids": ids}
    return model, (), {"input_ids": ids, "use_cache": False}
