"""Tables of mappings that llm-compressor ships, beside scale groups: what each leaves out, and what its scaling changes.

    python benchmarks/mappings.py                            # every architecture of its tables that transformers has
    python benchmarks/mappings.py --only Qwen2MoeForCausalLM

Every model is tiny and computes in float64, with random weights. llm-compressor takes its experts apart, resolves its own
mapping, and scales by it as it would after calibration, but by s = exp(0.7·N), N normal, so that what is left out shows.
Needs transformers and llm-compressor (`pip install 'equinorm[llmcompressor]'`).
"""

import collections
import contextlib
import datetime
import importlib
import importlib.metadata
import io
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import equinorm
from common import options_of, report
from zoo import from_transformers as zoo

RESULTS = Path(__file__).parent / "results" / "mappings.jsonl"
SPREAD = 0.7
"""Standard deviation of log-scales."""

MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
MLA |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "qk_head_dim": 16} | MOE
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2, "full_attention_interval": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "depth": 2,
    "num_heads": 4,
}
VISION |= {"image_size": 28, "patch_size": 14, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "output_dim": 32}
THREE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
SHARED = {"shared_expert_intermediate_size": 24, "n_shared_experts": 1, "num_shared_experts": 1}

OPTIONS: dict[str, dict[str, Any]] = {
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "AfmoeForCausalLM": MOE | SHARED | {"num_dense_layers": 1, "n_group": 1, "topk_group": 1},
    "Cohere2ForCausalLM": {"sliding_window": 4},
    "Cohere2MoeForCausalLM": MOE | {"first_k_dense_replace": 1, "sliding_window": 4},
    "DeepseekV2ForCausalLM": MLA | SHARED,
    "DeepseekV3ForCausalLM": MLA | SHARED,
    "Ernie4_5_MoeForCausalLM": MOE
    | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "Gemma3ForCausalLM": {"sliding_window": 4},
    "Glm4MoeForCausalLM": MOE | SHARED | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "Glm4MoeLiteForCausalLM": MLA | SHARED | {"mlp_layer_types": ["dense", "sparse"]},
    "GlmMoeDsaForCausalLM": MLA
    | SHARED
    | {"mlp_layer_types": ["dense", "sparse"], "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2},
    "Llama4ForConditionalGeneration": MOE
    | {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 48, "no_rope_layers": [1, 1]},
    "MixtralForCausalLM": MOE,
    "Qwen2MoeForCausalLM": MOE | SHARED,
    "Qwen2_5_VLForConditionalGeneration": THREE,
    "Qwen2_5OmniThinkerForConditionalGeneration": THREE,
    "Qwen3MoeForCausalLM": MOE,
    "Qwen3NextForCausalLM": MOE | SHARED | LINEAR,
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5ForConditionalGeneration": LINEAR,
    "Qwen3_5MoeForCausalLM": MOE | SHARED | LINEAR,
    "Qwen3_5MoeForConditionalGeneration": MOE | SHARED | LINEAR,
}
"""What a tiny configuration has beside the common sizes."""


def architectures() -> list[str]:
    """Every name in llm-compressor's tables."""
    from llmcompressor.modifiers.transform.awq import dynamic_mappings as awq, mappings as awq_tables
    from llmcompressor.modifiers.transform.smoothquant import dynamic_mappings as smooth, utils as smooth_tables

    tables = [smooth_tables.MAPPINGS_REGISTRY, smooth.SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY]
    tables += [awq_tables.AWQ_MAPPING_REGISTRY, awq.AWQ_DYNAMIC_MAPPING_REGISTRY]
    return sorted({name for table in tables for name in table}, key=str.lower)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model with random weights, and what to call it with: text alone."""
    transformers = zoo.import_transformers()
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    sizes = zoo._DECODER | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | OPTIONS.get(name, {})
    if name.startswith("Whisper"):
        model, _, inputs = zoo.build("whisper")
    else:
        parts = getattr(config_class, "sub_configs", {})
        if any("text" in part for part in parts):
            default = config_class()
            kinds = {part: type(getattr(default, part)) for part in parts}
            options = {part: VISION if "vision" in part else AUDIO if "audio" in part else sizes for part in parts}
            config = config_class(**{part: kind(**known(kind, options[part])) for part, kind in kinds.items()})
        else:
            config = config_class(**known(config_class, sizes))
        config._experts_implementation = "batched_mm"
        model = model_class(config)
        inputs = {"input_ids": torch.randint(3, 60, (2, 9)), "use_cache": False}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter.size(-1) ** 0.5)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval(), inputs


def known(config_class: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes that a configuration has; others would be kept, and confuse those who read it."""
    default = config_class()
    return {name: value for name, value in sizes.items() if hasattr(default, name)}


def doubled(model: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Both in float64."""
    numbers = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return model.double(), inputs | {key: value.double() for key, value in numbers.items()}


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def scale(size: int) -> Tensor:
    return (SPREAD * torch.randn(size, dtype=torch.float64)).exp()


def smoothquant(model: nn.Module, mappings: Any) -> list[tuple[str, list[str]]]:
    """Resolve mappings and scale by them as SmoothQuantModifier does; returns names of what was scaled."""
    from llmcompressor.modifiers.transform.smoothquant import base

    names = {module: name for name, module in model.named_modules()}
    modifier = base.SmoothQuantModifier(mappings=mappings)
    modifier.resolved_mappings_ = modifier._resolve_mappings(model)
    zero = torch.zeros(1)
    modifier.scales_ = {one.smooth_name: base.SmoothQuantScale(zero, zero) for one in modifier.resolved_mappings_}

    def drawn(_: Any, layers: list[nn.Module], __: Tensor) -> Tensor:
        return scale(layers[0].weight.size(1))

    with patch.object(base.SmoothQuantModifier, "_calculate_smoothing_scales", drawn):
        modifier._apply_smoothing(model)
    return [(one.smooth_name, [names[layer] for layer in one.balance_layers]) for one in modifier.resolved_mappings_]


class _Any(dict):
    """Stands for what was recorded in front of every module."""

    def __getitem__(self, key: Any) -> Any:
        return ()

    def __delitem__(self, key: Any) -> None:
        pass


def awq(model: nn.Module, mappings: Any) -> list[tuple[str, list[str]]]:
    """Resolve mappings and scale by them as AWQModifier does; returns names of what was scaled."""
    from llmcompressor.modifiers.transform.awq import base

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.quantization_scheme = None  # as a layer that is to be quantized has
    modifier = base.AWQModifier(mappings=mappings)
    modifier._set_resolved_mappings(model)
    resolved = list(modifier._resolved_mappings)
    modifier._parent_args_cache = _Any()
    modifier._smooth_activation_stats = {one.smooth_name: [] for one in resolved}

    def drawn(_: Any, mapping: Any, __: Any, ___: Any) -> Tensor:
        return scale(mapping.balance_layers[0].weight.size(1))

    def ran(*_: Any) -> list[Tensor]:
        return [torch.ones(1)]

    with patch.multiple(base.AWQModifier, _compute_best_scale=drawn, _run_samples=ran):
        modifier._apply_smoothing(model)
    return [(one.smooth_name, list(one.balance_names)) for one in resolved]


def deviation(model: nn.Module, inputs: dict[str, Any], before: Tensor, apply: Any, mappings: Any) -> dict[str, Any]:
    """What scaling by a mapping changes, or what it raises; the model's weights are put back."""
    from llmcompressor.modeling.offset_norm import norm_calibration_context

    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    try:
        with norm_calibration_context(model):
            scaled = apply(model, mappings)
        after = outputs(model, inputs)
        return {"scaled": scaled, "deviation": float((after - before).abs().max() / before.abs().max())}
    except Exception as error:
        cause = error.__cause__ or error
        return {"error": f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"}
    finally:
        model.load_state_dict(kept)


def fused(name: str) -> str:
    """A module of one expert by the tensor that holds it in transformers."""
    name = re.sub(r"(\.experts)\.\d+\.(gate|up)_proj$", r"\1.gate_up_proj", name)
    return re.sub(r"(\.experts)\.\d+\.down_proj$", r"\1.down_proj", name)


def starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def wrong(symmetries: equinorm.Symmetries, scaled: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """What the groups say against mappings: for each kind, and for how many of them."""
    found: collections.Counter[str] = collections.Counter()
    for smooth, balance in scaled:
        if ".experts." in smooth:
            continue
        try:
            check = symmetries.check(smooth, [*dict.fromkeys(map(fused, balance))])
        except equinorm.EquinormError as error:
            found[f"{starred(smooth)}: {error}"] += 1
            continue
        parts = [f"misses {starred(str(axis))}" for axis in check.missing]
        parts += [f"{starred(text)}" for text in check.extra]
        parts += [f"{starred(check.smooth)} is pinned by {pin.reason.operation}" for pin in check.pinned]
        for part in dict.fromkeys(parts):
            found[f"{starred(smooth)}: {part}"] += 1
    return dict(found)


def audit(name: str) -> Iterator[dict[str, Any]]:
    """Records of one architecture: one for each of the two tables."""
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.transform.awq import dynamic_mappings as awq_tables
    from llmcompressor.modifiers.transform.smoothquant import dynamic_mappings as smooth_tables

    from equinorm.integrations.llmcompressor import mappings

    record = {"architecture": name, "versions": versions(), "date": datetime.date.today().isoformat()}
    try:
        model, inputs = build(name)
    except Exception as error:
        yield record | {"not built": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        return
    try:
        symmetries = equinorm.symmetries(model, (), inputs)
        own = mappings(symmetries)
        record["groups"] = [[smooth, list(balance)] for smooth, balance in symmetries.mappings().patterns()]
        record["left out"] = own.left_out
    except equinorm.EquinormError as error:
        symmetries = own = None
        record["not analysed"] = str(error).splitlines()[0]
    model, inputs = doubled(model, inputs)
    before = outputs(model, inputs)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            linearize_moe(model)
    except Exception as error:
        yield record | {"not taken apart": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        return
    model.double()
    record["taking experts apart changes"] = float((outputs(model, inputs) - before).abs().max() / before.abs().max())
    before = outputs(model, inputs)
    tables = (
        ("SmoothQuant", smoothquant, smooth_tables, "smoothquant"),
        ("AWQ", awq, awq_tables, "awq"),
    )
    for title, apply, module, attribute in tables:
        table = module.get_layer_mappings_from_model(model)
        theirs = deviation(model, inputs, before, apply, table)
        scaled = theirs.pop("scaled", [])
        made = {"table": title, "listed": name in _listed(title), **theirs, "scaled": len(scaled)}
        if symmetries is not None:
            made["wrong"] = wrong(symmetries, scaled)
            ours = deviation(model, inputs, before, apply, getattr(own, attribute)) if getattr(own, attribute) else {}
            made["from groups"] = {**ours, "scaled": len(ours.get("scaled", []))}
        yield record | made


def _listed(table: str) -> set[str]:
    from llmcompressor.modifiers.transform.awq import dynamic_mappings as awq_dynamic, mappings as awq_tables
    from llmcompressor.modifiers.transform.smoothquant import dynamic_mappings as smooth_dynamic, utils as smooth_tables

    if table == "AWQ":
        return {*awq_tables.AWQ_MAPPING_REGISTRY, *awq_dynamic.AWQ_DYNAMIC_MAPPING_REGISTRY}
    return {*smooth_tables.MAPPINGS_REGISTRY, *smooth_dynamic.SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}


def main() -> int:
    parser = options_of(__doc__, RESULTS)
    parser.add_argument("--only", nargs="*", help="architectures")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers = zoo.import_transformers()
    importlib.import_module("llmcompressor.modifiers.transform.awq")  # it sets its own logger
    importlib.import_module("loguru").logger.remove()
    for name in arguments.only or architectures():
        if hasattr(transformers, name):
            report(audit(name), arguments.output)
        else:
            report(
                [{"architecture": name, "versions": versions(), "not built": "transformers has no such class"}],
                arguments.output,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
