"""Folders of checkpoints: rescaled bitwise in bfloat16, whatever their architecture, shards and ties."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors
import torch
from checkpoint_models import MODELS, logits, save
from safetensors.torch import load_file, save_file

from equinorm._scaling import Scaling
from equinorm.balancing.options import BalanceOptions
from equinorm.checkpoints import rewriting, solving, staging
from equinorm.checkpoints.comparing import CANONICAL, difference
from equinorm.checkpoints.conversion import Conversion, stored_scalings
from equinorm.checkpoints.folder import open_checkpoint, quantized
from equinorm.checkpoints.stored import CheckpointError
from equinorm.cli.folders import Meter, analysed
from equinorm.cli.streamed_balance import Outputs, streamed_balance
from equinorm.reporting.files import OutputError
from equinorm.rescaling.plan import Plan


class Quiet:
    """Steps that say nothing."""

    def say(self, text):
        pass

    def count(self, done, total, text):
        assert 0 <= done <= total


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every model as a folder, analysed once; one file but for mixtral, whose shards hold a few tensors each."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: analysed(str(save(name, root / name, "15KB" if name == "mixtral" else "1GB")), Quiet()) for name in MODELS}


def balance(folder, output, options=None, power_of_two=True, plan=None):
    return streamed_balance(folder, options or BalanceOptions(), power_of_two, Outputs(output, plan, False), Quiet())


def tensors(folder):
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def headers(folder):
    """File, keys in order, dtypes and metadata of every shard."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            found[path.name] = [[(k, file.get_slice(k).get_dtype()) for k in file.keys()], file.metadata()]  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", MODELS)
def test_powers_of_two_in_bfloat16_are_bitwise_the_same(folders, name, tmp_path):
    source, output, plan = folders[name].checkpoint.folder, tmp_path / "out", tmp_path / "plan.safetensors"
    record = balance(folders[name], output, plan=plan)
    assert record.converged
    assert record.norm_after < record.norm_before
    assert record.underflows == 0
    assert torch.equal(logits(source), logits(output))
    assert headers(source) == headers(output)
    assert {p.name for p in source.iterdir()} == {p.name for p in output.iterdir()}
    before, after = tensors(source), tensors(output)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) >= min(6, len(before) / 3)
    for key in before:  # every entry is 2^k times what it was
        ratio = (after[key].double() / before[key].double()).log2()
        assert torch.equal(ratio[before[key] != 0], ratio[before[key] != 0].round()), key
    made = Plan.load(plan)
    assert bool(made.stored) == (name == "mixtral")
    assert made.rewrite(source, tmp_path / "again") == 0
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors(tmp_path / "again").items())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_scales_are_those_of_the_whole_model(folders, tmp_path):
    import transformers

    known = folders["llama"]
    checkpoint = open_checkpoint(save("llama", tmp_path / "model", dtype=torch.float32))
    conversion = stored_scalings(known.loaded.model, known.symmetries.scalings, checkpoint.entries)
    folder = replace(known, checkpoint=checkpoint, conversion=conversion)
    record = balance(folder, tmp_path / "out", power_of_two=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    whole = replace(known.symmetries, model=model).balance()
    assert record.norm_before == pytest.approx(whole.norm_before, rel=1e-6)
    assert record.norm_after == pytest.approx(whole.norm_after, rel=1e-6)
    a, b = logits(tmp_path / "model"), logits(tmp_path / "out")
    assert 0 < float((a - b).abs().max() / a.abs().max()) < 1e-5
    held = torch.zeros(known.symmetries.num_free + 1, dtype=torch.bool)
    found = difference(folder.task(CANONICAL), open_checkpoint(tmp_path / "out"), held)
    assert found.largest < 1e-5
    assert not found.different
    assert float((found.log_scales - whole.log_scales).abs().max()) < 1e-3
    plan = whole.plan()
    assert not plan.stored
    plan.rewrite(tmp_path / "model", tmp_path / "planned")
    plan.apply_(model)
    for key, tensor in tensors(tmp_path / "planned").items():
        torch.testing.assert_close(tensor, model.get_parameter(key).detach(), rtol=1e-6, atol=0)
    shard = tmp_path / "shard.safetensors"
    assert plan.rewrite(tmp_path / "model" / "model.safetensors", shard) == 0
    assert shard.read_bytes() == (tmp_path / "planned" / "model.safetensors").read_bytes()


def test_one_weight_that_differs_is_named(folders, tmp_path):
    folder, key = folders["gpt2"], "transformer.h.0.mlp.c_fc.weight"
    balance(folder, tmp_path / "out")
    changed = load_file(tmp_path / "out" / "model.safetensors")
    other = open_checkpoint(tmp_path / "out")
    task, held = folder.task(CANONICAL), torch.zeros(folder.symmetries.num_free + 1, dtype=torch.bool)
    assert difference(task, other, held).largest == 0.0  # powers of two are recognized
    changed[key][3, 5] += 10
    save_file(changed, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    found = difference(task, open_checkpoint(tmp_path / "out"), held)
    assert found.different[0].tensor == key


def test_a_little_training_is_told_from_rounding(folders, tmp_path):
    """No channel moves by more than the tolerance of bfloat16 either way; small weights move far in training alone."""
    folder = folders["llama"]
    source, task = folder.checkpoint, folder.task(CANONICAL)
    none = torch.zeros(folder.symmetries.num_free + 1, dtype=torch.bool)
    torch.manual_seed(0)
    rounded, trained = tensors(source.folder), tensors(source.folder)
    for _ in range(4):
        scales = torch.randn(48, 1).exp()
        for key, by in (("up", scales), ("down", 1 / scales.T)):
            rounded[f"model.layers.0.mlp.{key}_proj.weight"] *= by.bfloat16()
    for tensor in trained.values():
        tensor += 1e-3 * tensor.std() * torch.randn_like(tensor)
    for name, held in (("rounded", rounded), ("trained", trained)):
        (tmp_path / name).mkdir()
        save_file(held, tmp_path / name / "model.safetensors")
        found = difference(task, open_checkpoint(tmp_path / name), none)
        assert 1e-3 < found.largest < found.tolerance
        assert bool(found.different) == (name == "trained")
    assert sum(part.entries for part in found.different) > 100
    assert all(part.difference < found.tolerance for part in found.different)


def test_gains_that_half_precision_would_round_stay_and_say_why(folders):
    folder = folders["llama"]
    scalings = [
        replace(s, offset=1.0) if s.name.endswith("0.input_layernorm.weight") else s for s in folder.conversion.scalings
    ]
    task = replace(folder, conversion=replace(folder.conversion, scalings=tuple(scalings))).task(BalanceOptions())
    held, notes = task.held()
    assert int(held.sum()) == 32
    assert notes == [
        f"32 of {folder.symmetries.num_free} scales stay at 1: they move gains that are stored as w in half precision and "
        "used as 1 + w, which rounds"
    ]
    assert len([*solving.components_of(task, held)]) == 6  # queries with keys, and values with outputs, are parted
    assert not folder.task(BalanceOptions()).held()[1]


def test_components_are_blocks_of_the_decoder(folders):
    task = folders["llama"].task(BalanceOptions())
    held, _ = task.held()
    found = [{scaling.name for scaling in part.scalings} for part in solving.components_of(task, held)]
    mlp = {
        f"model.layers.0.{part}.weight"
        for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    }
    assert mlp in found
    assert len(found) == 5  # two of each layer, and the last norm with the head


@pytest.fixture
def entries(folders):
    folder = folders["mixtral"]
    return lambda change: stored_scalings(
        folder.loaded.model, folder.symmetries.scalings, change(dict(folder.checkpoint.entries))
    )


W1 = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


def without(*keys):
    return lambda found: {key: entry for key, entry in found.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("model.norm.weight"), "lack 1 tensor.*model.norm.weight"),
        (without(W1), "(cannot tell how|lack 1 tensor|shape)"),
        (lambda found: found | {"model.extra": found["model.norm.weight"]}, "1 key .* no part of Mixtral.*model.extra"),
        (lambda found: found | {"lm_head.weight": found["model.norm.weight"]}, "lm_head.weight has the shape 32"),
        (lambda found: found | {W1: found["model.norm.weight"]}, "experts.2.w1.weight has the shape 32"),
    ],
)
def test_keys_and_shapes_are_checked_before_anything_is_read(entries, change, said):
    entries(lambda found: found)
    with pytest.raises(CheckpointError, match=said):
        entries(change)


def test_names_of_older_files_are_followed(folders, tmp_path):
    known = folders["gpt2"]
    source = known.checkpoint.folder / "model.safetensors"
    old = {key.removeprefix("transformer."): tensor for key, tensor in load_file(source).items()}
    old["h.0.attn.masked_bias"] = torch.tensor(-10000.0)
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # what the model makes for itself today
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((source.parent / "config.json").read_bytes())
    save_file(old, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "old")
    conversion = stored_scalings(known.loaded.model, known.symmetries.scalings, checkpoint.entries)
    assert {*conversion.ignored} == {"h.0.attn.bias", "h.0.attn.masked_bias"}
    folder = replace(known, checkpoint=checkpoint, conversion=conversion)
    balance(folder, tmp_path / "out", plan=tmp_path / "plan.safetensors")
    balance(known, tmp_path / "new")
    after = {f"transformer.{key}": tensor for key, tensor in tensors(tmp_path / "out").items()}
    assert float(after.pop("transformer.h.0.attn.masked_bias")) == -10000
    assert bool((after.pop("transformer.h.0.attn.bias") == 1).all())
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors(tmp_path / "new").items())
    assert torch.equal(logits(tmp_path / "old"), logits(tmp_path / "out"))
    assert Plan.load(tmp_path / "plan.safetensors").rewrite(tmp_path / "old", tmp_path / "again") == 0


def test_overflow_is_refused_and_nothing_is_left(folders, tmp_path):
    source = folders["gpt2"].checkpoint
    plan = folders["gpt2"].symmetries
    huge = Plan(torch.full((plan.num_free,), 150 * math.log(2), dtype=torch.float64), plan.scalings)
    with pytest.raises(Exception, match="overflow BF16"):
        huge.rewrite(source.folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_underflows_are_counted(tmp_path):
    weight = torch.tensor([[1.0, 2.0**-126, 0.0], [2.0**-120, 3.0, -(2.0**-124)]], dtype=torch.bfloat16)
    save_file({"a": weight}, tmp_path / "a.safetensors")
    ids = torch.tensor([[1], [2]])
    scaling = Scaling(("a",), (2, 3), torch.bfloat16, "parameter", "weight", 1, ((1.0, ids),))
    plan = Plan(torch.tensor([-10.0, -9.0], dtype=torch.float64) * math.log(2), (scaling,))
    with pytest.raises(OutputError, match=r"a\.safetensors is one file and goes to one: .*b must end in \.safetensors\."):
        plan.rewrite(tmp_path / "a.safetensors", tmp_path / "b")
    assert plan.rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 1  # 2⁻¹³³ is the smallest number
    wanted = torch.tensor([[2.0**-10, 0.0, 0.0], [2.0**-129, 3 * 2.0**-9, -(2.0**-133)]], dtype=torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], wanted)


def test_progress_tells_bytes_and_the_time_that_is_left(monkeypatch):
    """At the pace so far: a quarter in 30 seconds leaves 90."""
    now, said = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = Meter(SimpleNamespace(count=lambda done, total, text: said.append((done, total, text))), "balancing", 20 * 10**9)
    now[0] += 30
    meter.tick(5 * 10**9)
    assert said == [(5 * 10**9, 20 * 10**9, "balancing: 5.00 of 20.00 GB, 1:30 left")]
    now[0] += 90
    meter.tick(15 * 10**9)
    assert said[-1][2] == "balancing: 20.00 of 20.00 GB, 0:00 left"


def test_a_run_that_was_interrupted_goes_on_where_it_was(folders, tmp_path, monkeypatch):
    folder, solve, seen = folders["llama"], solving.balanced, []

    def interrupted(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr(solving, "_OFTEN", 0.0)
    monkeypatch.setattr(solving, "balanced", interrupted)
    with pytest.raises(KeyboardInterrupt):
        balance(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="was begun from other files or with other options"):
        balance(folder, tmp_path / "out", BalanceOptions(p=1.0))
    record = balance(folder, tmp_path / "out")
    assert len(seen) == 3 + 3  # the first two of five components were not solved again
    monkeypatch.undo()
    assert record.norm_after == balance(folder, tmp_path / "whole").norm_after
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


KILLED = """
import os, sys, signal
from equinorm.checkpoints import staging
from equinorm.rescaling.plan import Plan
write, count = staging.rewrite_file, []
def killed(stored, work, output):
    count.append(output)
    if len(count) == 3:  # in the middle of the third
        output.with_name(".half.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(stored, work, output)
staging.rewrite_file = killed
Plan.load(sys.argv[1]).rewrite(sys.argv[2], sys.argv[3])
"""


def test_a_run_that_was_killed_between_files_goes_on(folders, tmp_path):
    folder, plan = folders["mixtral"], tmp_path / "plan.safetensors"
    balance(folder, None, plan=plan)
    source = folder.checkpoint
    assert len(source.files) > 3
    command = [sys.executable, "-c", KILLED, str(plan), str(source.folder), str(tmp_path / "out")]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    made = Plan.load(plan)
    done = staging.rewrite_folder(
        source, rewriting.Rewriting(made, rewriting.moves_of(made, source.entries, True)), tmp_path / "out"
    )
    assert done.resumed == 2
    made.rewrite(source.folder, tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.safetensors", "whole"]


def test_a_full_disk_leaves_no_output_and_the_next_run_goes_on(folders, tmp_path, monkeypatch):
    folder, write = folders["mixtral"], staging.rewrite_file
    names = [file.path.name for file in folder.checkpoint.files]

    def full(stored, work, output):
        if output.name == names[2]:
            raise OutputError(f"cannot write {output}: No space left on device. Nothing was written.")
        return write(stored, work, output)

    monkeypatch.setattr(staging, "rewrite_file", full)
    with pytest.raises(OutputError, match=r"No space left on device.*2 finished files are kept in .* run again to go on"):
        balance(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert balance(folder, tmp_path / "out").resumed == 2
    assert torch.equal(logits(folder.checkpoint.folder), logits(tmp_path / "out"))


def test_a_disk_that_is_full_while_components_are_solved_is_told(tmp_path, monkeypatch):
    """What is solved is written by safetensors, which has an error of its own; what it left damaged is solved anew."""

    def full(*arguments, **more):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    z = torch.ones(3, dtype=torch.float64)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        solving._write_down(tmp_path, z, solving.Record(2))
    monkeypatch.undo()
    solving._write_down(tmp_path, z, solving.Record(2))
    assert torch.equal(solving._begun(tmp_path, 3)[0], z)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert solving._begun(tmp_path, 3)[1].done == 0


def test_nothing_is_written_over_or_without_room(folders, tmp_path, monkeypatch):
    folder = folders["llama"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(OutputError, match="exists"):
        balance(folder, tmp_path / "out")
    with pytest.raises(OutputError, match="there is no folder"):
        balance(folder, tmp_path / "no" / "out")
    with pytest.raises(OutputError, match="lies in the folder that is read"):
        balance(folder, folder.checkpoint.folder / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OutputError, match=r"it takes 0.[0-9]*[1-9][0-9]* MB, and 0.00 MB are free"):
        balance(folder, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def one_tensor(folder, **more):
    """A folder of one tensor, and a plan that moves it."""
    folder.mkdir()
    save_file({"a": torch.ones(2, 3), **more}, folder / "model.safetensors")
    scaling = Scaling(("a",), (2, 3), torch.float32, "parameter", "weight", 1, ((1.0, torch.tensor([[1], [2]])),))
    return Plan(torch.tensor([1.0, -1.0], dtype=torch.float64) * math.log(2), (scaling,))


def test_files_that_hold_other_weights_do_not_come_along(tmp_path):
    source, plan = tmp_path / "model", one_tensor(tmp_path / "model")
    weights = ["rust_model.ot", "model.onnx_data", "model.onnx.data", "variables.data-00000-of-00001", "bert_model.ckpt.index"]
    weights += ["model.safetensors.index.json", "sub/model.safetensors.index.json", "sub/pytorch_model.bin"]
    others = ["sub/config.json", "tokenizer.model", "voices.npz", "data.json"]
    (source / "sub").mkdir()
    for name in (*weights, *others):
        (source / name).write_text("{}")
    (source / "link").symlink_to(tmp_path / "link")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "vocab.txt").write_text("a")
    plan.rewrite(source, tmp_path / "out")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"model.safetensors", "link/vocab.txt", *others}
    left = open_checkpoint(source).others()[1]
    assert {path.as_posix() for path in left} == {*weights}


@pytest.mark.parametrize(("place", "said"), [("nowhere", "leads to none"), (".", "link to a folder around it")])
def test_links_that_cannot_come_along_are_told_before_anything_is_written(place, said, tmp_path):
    plan = one_tensor(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").symlink_to(place)
    with pytest.raises(CheckpointError, match=f"tokenizer.json .*{said}"):
        plan.rewrite(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_goes_on_over_files_that_may_not_be_written_to(tmp_path, monkeypatch):
    plan, copy = one_tensor(tmp_path / "model"), staging.shutil.copy2

    def strict(source, target):
        if target.exists():
            raise PermissionError(13, "Permission denied")
        copy(source, target)
        if len([*target.parent.iterdir()]) == 3 and not (tmp_path / "again").exists():
            raise OSError(28, "No space left on device")

    for name in ("a.json", "b.json"):
        (tmp_path / "model" / name).write_text("{}")
    monkeypatch.setattr(staging.shutil, "copy2", strict)
    with pytest.raises(OutputError, match=r"No space left on device.*run again to go on"):
        plan.rewrite(tmp_path / "model", tmp_path / "out")
    (tmp_path / "again").touch()
    plan.rewrite(tmp_path / "model", tmp_path / "out")
    assert len([*(tmp_path / "out").iterdir()]) == 3


def test_a_disk_is_not_replaced_by_a_folder(tmp_path, monkeypatch):
    plan = one_tensor(tmp_path / "model")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(staging.os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(OutputError, match="out is where a disk is mounted"):
        plan.rewrite(tmp_path / "model", tmp_path / "out")


def test_a_plan_replaces_no_weights_and_stands_in_no_output(tmp_path):
    one_tensor(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    (tmp_path / "out").mkdir()
    (tmp_path / "link.safetensors").symlink_to(weights)
    for path in (weights, tmp_path / "link.safetensors"):
        with pytest.raises(OutputError, match=r"holds weights of .*model, which are read"):
            Outputs(tmp_path / "out", path, True).check(str(tmp_path / "model"))
    with pytest.raises(OutputError, match=r"plan\.safetensors lies in .*out, which appears when it is whole"):
        Outputs(tmp_path / "out", tmp_path / "out" / "plan.safetensors", False).check(str(tmp_path / "model"))
    Outputs(tmp_path / "out", tmp_path / "model" / "plan.safetensors", False).check(str(tmp_path / "model"))


def test_whole_numbers_are_compared(tmp_path):
    names = ("table", "norm.num_batches_tracked", "unread")
    for folder, number in (("a", 1000), ("b", 1001), ("c", 1000)):
        one_tensor(tmp_path / folder, **{name: torch.tensor([number, 7]) for name in names})
    a, b, c = (open_checkpoint(tmp_path / name) for name in "abc")
    still = Scaling(("a",), (2, 3), torch.float32, "parameter", "weight", 1, ())
    orbit = SimpleNamespace(num_free=0, family_ranges=[])
    task = solving.Task(a, orbit, Conversion((still,), (), ("unread",), 0), CANONICAL, False)
    assert difference(task, c, torch.zeros(1, dtype=torch.bool)).different == ()
    (found,) = difference(task, b, torch.zeros(1, dtype=torch.bool)).different
    assert (found.tensor, found.difference, found.entries, found.size) == ("table", math.inf, 1, 2)


def test_damaged_files_are_refused(folders, tmp_path):
    save("llama", tmp_path / "model", "20KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    shard = next((tmp_path / "model").glob("model-00002*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(CheckpointError, match="bytes where its header needs"):
        open_checkpoint(tmp_path / "model")
    shard.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        open_checkpoint(tmp_path / "model")
    shard.write_bytes(whole)
    named = json.loads(index.read_text())
    named["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(named))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight|lacks"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("narrow", "dtype", "beside", "is_one"),
    [
        ("a.weight", torch.float8_e4m3fn, "a.weight_scale_inv", True),
        ("a.weight", torch.int8, "a.weight_scale", True),
        ("a.weight", torch.int8, "a.SCB", True),
        ("a.weight", torch.uint8, "a.weight.absmax", True),
        ("a.qweight", torch.int32, "a.scales", True),
        ("model.proj", torch.float64, "model.logit_scale", False),
        ("attn.relative_position_index", torch.int32, "attn.logit_scale", False),
        ("attn.bias", torch.uint8, "attn.attn_scale", False),
        ("a.weight", torch.bfloat16, "a.weight_scale", False),
    ],
)
def test_quantized_numbers_are_told_by_the_scales_of_their_own(narrow, dtype, beside, is_one, tmp_path):
    save_file({narrow: torch.ones(2, 2).to(dtype), beside: torch.ones(2)}, tmp_path / "model.safetensors")
    found = quantized(open_checkpoint(tmp_path))
    assert (found is not None) == is_one
    if found is not None:
        assert (found[0].key, found[1]) == (narrow, beside)
