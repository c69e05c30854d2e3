"""Large checkpoints, streamed: memory, bytes, seconds.

    python benchmarks/checkpoints.py --layers 8 --folder checkpoint --output benchmarks/results/checkpoints.jsonl
    python benchmarks/checkpoints.py --model mixtral --layers 4 --folder checkpoint
    python benchmarks/checkpoints.py --paper --output benchmarks/results/checkpoints.jsonl
    python benchmarks/checkpoints.py --analysis experts --layers 4 --output benchmarks/results/checkpoints.jsonl

Writes a synthetic folder (random bfloat16 shards of a Llama-like configuration, or of a Mixtral-like one with eight experts),
balances it with powers of two in a process of its own, compares every tensor with 2^k times the original, and deletes both.
`--paper` counts the components of large models from their configurations, without weights; `--analysis` does so with as many
layers as are asked for, since what finding symmetries takes grows with them.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common import machine, options_of, report
from zoo.from_torchvision import declare_operators

SHARD = 1 << 30
"""Bytes of a shard."""

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 32000}
LLAMA |= {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}

MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
MIXTRAL |= {"hidden_size": 2048, "intermediate_size": 7168}

SYNTHETIC = {"llama": LLAMA, "mixtral": MIXTRAL}
"""By name of the option."""

LLAMA_70B = LLAMA | {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
LLAMA_70B |= {"num_hidden_layers": 80}

DEEPSEEK = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16", "vocab_size": 129280}
DEEPSEEK |= {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61}
DEEPSEEK |= {"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1}
DEEPSEEK |= {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "q_lora_rank": 1536}
DEEPSEEK |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}

LARGE = {"Llama 3 70B": LLAMA_70B, "DeepSeek-V3 671B": DEEPSEEK}
"""From the configurations that their authors published."""

ANALYSED = {
    "llama": ("Llama-like", LLAMA),
    "70b": ("Llama 3 70B", LLAMA_70B),
    "experts": ("DeepSeek-V3, 256 experts in every layer", DEEPSEEK | {"first_k_dense_replace": 0}),
}
"""By name of the option: name and configuration."""


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of a Llama's tensors, or a Mixtral's, as its files hold them."""
    d, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = d // heads * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
        mlp = {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        if experts := config.get("num_local_experts"):
            mlp = {"block_sparse_moe.gate": (experts, d)}
            for expert in range(experts):
                own = f"block_sparse_moe.experts.{expert}"
                mlp |= {f"{own}.w1": (f, d), f"{own}.w3": (f, d), f"{own}.w2": (d, f)}
        start = f"model.layers.{layer}"
        yield f"{start}.input_layernorm.weight", (d,)
        yield from ((f"{start}.self_attn.{name}.weight", shape) for name, shape in attention.items())
        yield f"{start}.post_attention_layernorm.weight", (d,)
        yield from ((f"{start}.{name}.weight", shape) for name, shape in mlp.items())
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (config["vocab_size"], d)


def weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random numbers whose channels have random scales; gains near 1."""
    if len(shape) == 1:
        return (torch.randn(shape, generator=generator) * 0.3).exp().bfloat16()
    rows = (torch.randn(shape[0], 1, generator=generator) * 0.7).exp()
    base = torch.randn(min(shape[0], 512), shape[1], generator=generator) * shape[1] ** -0.5
    return (base.repeat(-(-shape[0] // len(base)), 1)[: shape[0]] * rows).bfloat16()


def write(folder: Path, config: dict[str, Any]) -> None:
    """The synthetic folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, index = 0, {}
    for key, shape in shapes(config):
        tensor = weight(shape, generator)
        if size + tensor.nbytes > SHARD and shards[-1]:
            save_file(shards[-1], folder / f"part-{len(shards)}.safetensors", {"format": "pt"})
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
        index[key] = len(shards)
    save_file(shards[-1], folder / f"part-{len(shards)}.safetensors", {"format": "pt"})
    names = {key: f"model-{number:05}-of-{len(shards):05}.safetensors" for key, number in index.items()}
    for number in range(1, len(shards) + 1):
        (folder / f"part-{number}.safetensors").rename(folder / f"model-{number:05}-of-{len(shards):05}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def forget(folder: Path) -> None:
    """Drop a folder's pages from the system's memory, so that reading reads."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def counters() -> dict[str, int]:
    """Bytes that this process has had read from and written to disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def peak() -> int:
    """Most bytes of memory that this process has had at once, pages of mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def balance(folder: Path, output: Path) -> dict[str, Any]:
    """Balance in this process; what it took."""
    declare_operators()
    from equinorm.balancing.options import BalanceOptions
    from equinorm.cli.folders import analysed
    from equinorm.cli.streamed_balance import Outputs, streamed_balance

    class Silent:
        def say(self, text: str) -> None:
            pass

        def count(self, done: float, total: float, text: str) -> None:
            pass

    Path("/proc/self/clear_refs").write_text("5")  # what getrusage says is the parent's where that was larger
    empty = peak()
    before, started = counters(), time.perf_counter()
    found = analysed(str(folder), Silent())  # pyright: ignore[reportArgumentType]
    analysis = time.perf_counter() - started
    record = streamed_balance(found, BalanceOptions(), True, Outputs(output, None, False), Silent())  # pyright: ignore
    after, usage = counters(), resource.getrusage(resource.RUSAGE_SELF)
    return {
        "bytes": found.checkpoint.size,
        "components": record.components,
        "largest component": record.bytes_largest,
        "peak bytes of memory": peak(),
        "of these before": empty,
        "reads": (after["read_bytes"] - before["read_bytes"]) / found.checkpoint.size,
        "passes asked for": record.bytes_read / found.checkpoint.size,
        "writes": (after["write_bytes"] - before["write_bytes"]) / found.checkpoint.size,
        "seconds": record.seconds + analysis,
        "seconds of analysis": analysis,
        "processor seconds": usage.ru_utime + usage.ru_stime,
        "norm before": record.norm_before,
        "norm after": record.norm_after,
        "residual": record.residuals[1],
        "cycles": record.cycles,
        "underflows": record.underflows,
    }


def check(folder: Path, output: Path) -> int:
    """How many entries are not 2^k times what they were."""
    from equinorm.checkpoints.folder import open_checkpoint

    a, b = open_checkpoint(folder), open_checkpoint(output)
    wrong = 0
    for key in a.entries:
        before, after = a.where[key].mapped(key), b.where[key].mapped(key)
        for first, second in zip(before.split(1024), after.split(1024), strict=True):
            mantissas = (torch.frexp(first.float())[0], torch.frexp(second.float())[0])
            wrong += int((mantissas[0] != mantissas[1]).sum())
    return wrong


def built(config: dict[str, Any]) -> tuple[Any, Any]:
    """A model without numbers, and its configuration."""
    import transformers

    found = transformers.AutoConfig.for_model(**config)
    found.use_cache = False
    with torch.device("meta"):
        return getattr(transformers, config["architectures"][0])._from_config(found).eval(), found


def paper(name: str, config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Components of a model from its configuration, in bfloat16; a few layers tell, since all are alike."""
    declare_operators()
    from transformers import core_model_loading

    from equinorm._symmetries import symmetries_of
    from equinorm.balancing.components import components
    from equinorm.checkpoints.conversion import stored_scalings
    from equinorm.checkpoints.stored import Entry
    from equinorm.cli.libraries import examples
    from equinorm.discovery.graph.of_model import graphs_of

    size = sum(2 * parameter.numel() for parameter in built(config)[0].parameters())
    started, working = time.perf_counter(), time.process_time()
    model, found = built(config | {"num_hidden_layers": layers})
    group = symmetries_of(graphs_of(model, (), examples(model, found)), inner=False)  # as for folders
    stored = core_model_loading.revert_weight_conversion(model, model.state_dict())  # as save_pretrained names them
    entries = {key: Entry(key, "BF16", tuple(tensor.shape), 0, 2 * tensor.numel()) for key, tensor in stored.items()}
    scalings = stored_scalings(model, group.scalings, entries).scalings
    held = torch.zeros(group.num_free + 1, dtype=torch.bool)
    parts = [*components(scalings, group.family_ranges, held)]
    sizes = [sum(2 * scaling.numel for scaling in part.scalings) for part in parts]
    matrices = [sum(2 * scaling.numel for scaling in part.scalings if two_sided(scaling)) for part in parts]
    return {
        "name": name,
        "bytes": size,
        "layers": config["num_hidden_layers"],
        "layers analysed": layers,
        "free scales": group.num_free,
        "components": len(sizes),
        "largest component": max(sizes),
        "most that is held on to": max(matrices),
        "seconds of analysis": time.perf_counter() - started,
        "processor seconds of analysis": time.process_time() - working,
        "peak bytes of memory": peak(),
    }


def two_sided(scaling: Any) -> bool:
    """Does a matrix move along both of its axes, so that vectors do not stand for it?"""
    return len({axis for _, ids in scaling.factors for axis in range(ids.dim()) if ids.size(axis) > 1}) > 1


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.paper:
        for name, config in LARGE.items():
            yield {"kind": "paper", **paper(name, config, 4), **machine()}
        return
    if options.analysis:
        name, config = ANALYSED[options.analysis]
        yield {"kind": "analysis", **paper(name, config | {"num_hidden_layers": options.layers}, options.layers), **machine()}
        return
    folder, output = options.folder, options.folder.with_name(options.folder.name + "-balanced")
    try:
        write(folder, SYNTHETIC[options.model] | {"num_hidden_layers": options.layers})
        forget(folder)
        command = [sys.executable, __file__, "--inside", "--folder", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        wrong = check(folder, output)
        yield {
            "kind": "streamed",
            "model": options.model,
            "layers": options.layers,
            **found,
            "entries that are not 2^k times": wrong,
            **machine(),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--model", choices=list(SYNTHETIC), default="llama")
    parser.add_argument("--layers", type=int, default=8, help="of the synthetic model; 0.36 GB each, and 0.52 GB beside them")
    parser.add_argument("--folder", type=Path, default=Path("synthetic-checkpoint"))
    parser.add_argument("--paper", action="store_true", help="count the components of large models")
    parser.add_argument("--analysis", choices=list(ANALYSED), help="count those of so many --layers of one")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(balance(options.folder, options.folder.with_name(options.folder.name + "-balanced"))))
    else:
        report(records(options), options.output)


if __name__ == "__main__":
    main()
