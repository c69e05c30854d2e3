"""`equinorm` on folders of checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_models import logits, save
from cli_tools import folder, invoke, record, refusal
from safetensors.torch import load_file, save_file

import equinorm
from equinorm.checkpoints.comparing import check_same
from equinorm.checkpoints.folder import open_checkpoint
from equinorm.checkpoints.stored import CheckpointError
from equinorm.cli import memory

__all__ = ["folder"]


def test_inspect_balance_compare_and_apply(folder, monkeypatch):
    save("llama", "model", "15KB")
    (folder / "model" / "tokenizer.json").write_text("{}")
    (folder / "model" / "pytorch_model.bin").write_bytes(b"old")
    found = record("inspect", "model")
    assert found["num_free"] == 304
    assert any("5 components" in note for note in found["notes"])
    text = invoke("balance", "model", "-o", "out", "--plan", "plan.safetensors", "--power-of-two").stdout
    assert "every weight is 2^k times what it was" in text
    assert "pytorch_model.bin" in text
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(
        path.name for path in (folder / "model").iterdir() if path.name != "pytorch_model.bin"
    )
    assert torch.equal(logits("model"), logits("out"))
    compared = record("compare", "model", "out")
    assert compared["equivalent"]
    assert compared["difference"] == 0
    assert not compared["same_weights"]
    assert compared["largest_scale"] >= 2
    assert record("apply", "plan.safetensors", "model", "-o", "again")["underflows"] == 0
    for path in (folder / "out").glob("*.safetensors"):
        assert path.read_bytes() == (folder / "again" / path.name).read_bytes()
    shard = sorted((folder / "out").glob("*.safetensors"))[0]
    changed = load_file(shard)
    key = next(key for key, tensor in changed.items() if tensor.dim() == 2)
    changed[key][1, 2] += 7
    save_file(changed, shard, {"format": "pt"})
    monkeypatch.setattr(memory, "_free_memory", lambda: 1_000_000)
    said = invoke("compare", "model", "out", code=1).stdout
    assert "not rescaling-equivalent: once rescaled they differ by" in said
    assert "orders of channels and flips of sign were not looked for, and outputs not compared: that takes 0.5 GB" in said
    assert "0.0 are free. Repeat this on a larger machine, or name hf:model and hf:out" in said
    assert said.split()[-2] == key


def test_compare_loads_folders_that_no_rescaling_joins(folder):
    transformers = pytest.importorskip("transformers")
    save("gpt2", "model")
    twin = transformers.AutoModelForCausalLM.from_pretrained("model", dtype="auto").eval()
    equinorm.canonical_(twin, (), {"input_ids": torch.arange(8)[None]}, power_of_two=True)
    twin.save_pretrained("twin")
    found = record("compare", "model", "twin")
    assert found["joined_by"] == ["flips of sign", "permutation", "rescaling"]
    assert found["same_outputs"]
    held = load_file("model/model.safetensors")
    save_file({key.removeprefix("transformer."): value for key, value in held.items()}, "twin/model.safetensors")
    with pytest.raises(CheckpointError, match="name hf:model and hf:twin to compare what their models load"):
        check_same(open_checkpoint(Path("model")), open_checkpoint(Path("twin")))


def test_the_same_weights_with_other_settings_are_told(folder, monkeypatch):
    monkeypatch.setattr(memory, "_free_memory", lambda: None)
    for name, width in (("model", 32), ("twin", 64)):
        save("gpt2", name)
        described = json.loads(Path(name, "config.json").read_text())
        Path(name, "config.json").write_text(json.dumps(described | {"n_ctx": width, "use_cache": width == 32}))
    said = refusal("compare", "model", "twin")
    assert "a rescaling joins the weights, but config.json differs in n_ctx, and whether outputs agree was not computed" in said
    assert "how much is free is not known without psutil" in said


def test_what_is_refused_says_why(folder):
    save("llama", "model")
    assert "nothing would be written" in refusal("balance", "model")
    assert "--report does not go with a checkpoint's folder" in refusal("balance", "model", "-o", "out", "--report", "a.html")
    planned = refusal("balance", "cli_models:mlp", "-o", "a.safetensors", "--plan", "p.safetensors")
    assert "--plan goes with a checkpoint's folder only, and cli_models:mlp is none" in planned
    assert "--output" not in planned
    assert "needs --output" in refusal("balance", "cli_models:mlp")
    assert "Use powers of two (--power-of-two)" in refusal("balance", "model", "-o", "out")
    assert not (folder / "out").exists()
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert "quantized (method fp8)" in refusal("inspect", "model")
    (folder / "model" / "config.json").write_text(json.dumps(config))
    path = sorted((folder / "model").glob("*.safetensors"))[0]
    held = load_file(path)
    key = next(key for key in held if key.endswith("_proj.weight"))
    save_file(held | {key: held[key].to(torch.float8_e4m3fn), f"{key}_scale_inv": torch.ones(1, 1)}, path, {"format": "pt"})
    told = refusal("balance", "model", "-o", "out")
    assert f"{key} holds F8_E4M3 numbers, which {key}_scale_inv scales" in told
    assert "multiply them out into bfloat16" in told
    save_file(held | {f"{key}_scale": torch.ones(1)}, path, {"format": "pt"})
    told = refusal("inspect", "model")  # scales beside wide numbers are something else
    assert f"1 key of the files belongs to no part of LlamaForCausalLM: {key}_scale." in told
    (folder / "model" / "config.json").unlink()
    assert "no config.json" in refusal("inspect", "model")


@pytest.mark.parametrize("command", ["inspect", "balance"])
def test_folders_that_do_not_exist_are_told(command, folder):
    (folder / "empty" / "snapshots" / "1").mkdir(parents=True)
    more = ["-o", "out"] if command == "balance" else []
    assert "holds no config.json. Write it with save_pretrained" in refusal(command, "empty", *more)
    (folder / "empty" / "snapshots" / "1" / "config.json").write_text("{}")
    assert "name the snapshot in it, empty/snapshots/1." in refusal(command, "empty", *more)
    (folder / "empty" / "adapter_config.json").write_text("{}")
    assert "merge it into its model" in refusal(command, "empty", *more)


def test_sound_needs_no_inputs(folder):
    save("whisper", "model")
    found = record("inspect", "model")
    assert "input_features=bfloat16[1, 8, 32]" in found["inputs"]
    assert found["num_free"] == 352
