"""Language models of 7 to 47 billion parameters, on the meta device only.

Needs transformers (`pip install transformers`).
"""

from typing import Any

import torch
from torch import nn

from zoo.from_transformers import import_transformers

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-7b": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
        | {"num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "mistral-7b": ("MistralForCausalLM", "MistralConfig", {}),
    "mixtral-8x7b": ("MixtralForCausalLM", "MixtralConfig", {}),
}
"""Classes of model and configuration; sizes where the configuration's own are others."""


def names() -> list[str]:
    """The smallest first."""
    return list(MODELS)


def family(name: str) -> str:
    """Each is one of its own."""
    return name


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model and eight tokens. The experts of a mixture run as grouped matrix products."""
    transformers = import_transformers()
    model_class, config_class, sizes = MODELS[name]
    config = getattr(transformers, config_class)(**sizes)
    if hasattr(config, "num_local_experts"):
        config._experts_implementation = "grouped_mm"
    return getattr(transformers, model_class)(config), (), {"input_ids": torch.randint(0, 100, (1, 8)), "use_cache": False}
