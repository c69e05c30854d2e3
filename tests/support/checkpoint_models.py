"""Tiny checkpoints of the architectures that differ in how files hold them, with weights far from balanced."""

import pytest
import torch

from zoo.from_torchvision import declare_operators

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
DECODER |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "tie_word_embeddings": False, **TOKENS}

WHISPER = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "vocab_size": 64}
WHISPER |= {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1, **TOKENS}

MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"num_hidden_layers": 2}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 4}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", DECODER | {"head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, **TOKENS}),
}
"""Class, configuration and its arguments: plain; experts that files hold apart; 1 + w and tied; Conv1D and tied."""

SOUND = {"whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER)}


def save(name, path, size="1GB", dtype=torch.bfloat16):
    """Save a model with random weights, and gains that are no ones."""
    declare_operators()
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    kind, config, options = (MODELS | SOUND)[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 * torch.rand_like(parameter)).add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size=size)
    return path


def logits(path, length=12):
    """What the model of a folder puts out."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    torch.manual_seed(1)
    tokens = torch.randint(0, 64, (2, length))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
