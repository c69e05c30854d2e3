"""The command line: every command with and without --json."""

import math
import os
import re

import cli_models
import pytest
import safetensors.torch
import torch
from cli_tools import HERE, balanced, folder, invoke, record, refusal

import equinorm

__all__ = ["folder"]


@pytest.fixture
def exported(folder):
    model = cli_models.mlp().eval()
    torch.export.save(torch.export.export(model, (torch.randn(3, 8),)), folder / "net.pt2")
    return "net.pt2"


def columns(text, title):
    """Rows of the table under a title: first word and the integers that follow; and its total."""
    block = text.split(title + "\n", 1)[1].split("───\n", 1)[1]
    body, total = block.split("\n\n")[:2]

    def row(line):
        return [int(n.replace(",", "")) for n in re.findall(r"(?<=\s)[\d,]+(?=\s|$)", line)]

    return [row(line) for line in body.splitlines()], row(total.splitlines()[0])


# ---------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_totals_add_up():
    text = invoke("inspect", "cli_models:convolutional", "--input", "2x3x12x12").stdout
    for title, column in (("Free scale classes", 0), ("Coverage", 0), ("Coverage", 1), ("Coverage", 2), ("Pinned channels", 0)):
        rows, total = columns(text, title)
        assert sum(row[column] for row in rows) == total[column], title


def test_rows_of_many_layers_become_one(folder):
    blocks = "*(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh()) for _ in range(24))"
    named = f"nn.Sequential(OrderedDict(layers=nn.Sequential({blocks})))"
    (folder / "deep.py").write_text(f"from collections import OrderedDict\nfrom torch import nn\ndef net(): return {named}\n")
    text = invoke("inspect", "deep:net", "--input", "2x8").stdout
    assert re.search(r" layers\.\*\.0\.weight\[0\] × 24 +384 +72\n", text)
    assert re.search(r" layers\.\*\.2\.weight\[0\] × 24 +192 .* layers\.\*\.3\n", text)
    assert columns(text, "Free scale classes")[1] == [384]
    assert len(record("inspect", "deep:net", "--input", "2x8")["families"]) == 24


def test_inspect_json_agrees_with_the_library():
    found = record("inspect", "cli_models:convolutional", "--input", "2x3x12x12")
    model = cli_models.convolutional().eval()
    symmetries = equinorm.symmetries(model, (torch.randn(2, 3, 12, 12),))
    assert found["num_free"] == symmetries.num_free == sum(row["classes"] for row in found["families"])
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["moving"] == sum(row["moving"] for row in found["tensors"] if row["kind"] == "parameter")
    assert found["coverage"] == pytest.approx(found["moving"] / found["parameters"], abs=1e-12)
    assert [pin["channels"] for pin in found["pins"]] == [pin.channels for pin in symmetries.pins]
    reason = next(pin for pin in found["pins"] if "batch_norm" in pin["operation"])
    assert reason["source"].startswith("batchnorm.py:")
    assert reason["code"]


def test_inspect_without_free_class_says_so():
    said = invoke("inspect", "cli_models:gelu", "--input", "2x8").stdout
    assert "No free class" in said
    assert "equinorm equalize" not in said


def test_inspect_says_what_equalize_prepares():
    found = record("inspect", "cli_models:convolutional", "--input", "2x3x12x12")
    held = sum(pin["channels"] for pin in found["pins"] if pin["operation"] in ("aten.batch_norm", "aten.hardtanh"))
    note = f"batch normalization and bounds pin {held} channels: `equinorm equalize` folds and frees what it can"
    assert found["notes"] == [note]
    assert record("inspect", "cli_models:convolutional", "--input", "2x3x12x12", "--train")["notes"] == []
    (pin,) = record("inspect", "cli_models:bounded", "--input", "2x8")["notes"]
    assert pin.startswith("batch normalization and bounds pin 16 channels")


def test_opaque_submodules():
    assert "--opaque 3" in refusal("inspect", "cli_models:branching", "--input", "2x8")
    shown = record("inspect", "cli_models:branching", "--input", "2x8", "--opaque", "3")
    assert shown["num_free"] == 16
    assert balanced("branching", "--opaque", "3")["deviation"] <= 1e-6
    record("compare", "cli_models:branching", "out.safetensors", "--input", "2x8", "--opaque", "3")


def test_training_mode():
    name = ["inspect", "cli_models:convolutional", "--input", "2x3x12x12"]
    assert record(*name, "--train")["num_free"] == record(*name, "--eval")["num_free"]
    assert "Batch" not in refusal("inspect", "cli_models:convolutional", "--train", "--input", "2x8")


# ---------------------------------------------------------------------------------------------------------------- balance


def test_balance_writes_what_it_says():
    found = balanced("mlp")
    model, original = cli_models.mlp(), cli_models.mlp()
    model.load_state_dict(safetensors.torch.load_file("out.safetensors"))
    norm = math.sqrt(sum(float(layer.weight.detach().double().square().sum()) for layer in model[::2]))
    assert norm == pytest.approx(found["norm_after"], rel=1e-6)  # weights are rounded to float32
    assert found["norm_after"] < found["norm_before"]
    assert found["converged"]
    assert found["cycles"] <= 6  # float32 energies must not stall above the tolerance
    assert found["residual"] == found["residuals"][-1] <= 1e-6
    assert found["cycles"] == len(found["residuals"]) - 1
    assert 0 < equinorm.deviation(model, original, (torch.randn(50, 8),)) <= 1e-5
    for key in ("before", "after"):
        assert sum(row[key] for row in found["energies"]) == pytest.approx(found[f"energy_{key}"], rel=1e-12)
        assert found[f"energy_{key}"] == pytest.approx(found[f"norm_{key}"] ** 2, rel=1e-9)


def test_balance_table_shows_the_record():
    text = invoke("balance", "cli_models:mlp", "--input", "2x8", "-o", "a.safetensors").stdout
    found = balanced("mlp")
    assert f"{found['norm_before']:,.4f} → {found['norm_after']:,.4f}" in text
    assert "written       a.safetensors" in text
    total = re.search(r"total +(\S+) +(\S+)", text)
    assert [float(n) for n in total.groups()] == pytest.approx([found["energy_before"], found["energy_after"]], abs=1e-4)


@pytest.mark.parametrize("p", ["0.5", "1", "3", "inf"])
def test_balance_other_norms(p):
    found = balanced("mlp", "--p", p)
    assert found["norm_after"] <= found["norm_before"] * (1 + 1e-12)
    assert found["p"] == (p if p == "inf" else float(p))


def test_balance_options_reach_the_solver():
    found = balanced("mlp", "--c", "1.5", "--method", "cyclic", "--cycles", "2", "--biases")
    assert (found["c"], found["method"], found["cycles"], found["biases"]) == (1.5, "cyclic", 2, True)
    assert [row["name"] for row in found["energies"]] == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight"]
    assert not found["converged"]
    assert "2 cycles asked for" in found["reason"]


def test_power_of_two_is_bitwise():
    found = balanced("mlp", "--power-of-two")
    model = cli_models.mlp()
    model.load_state_dict(safetensors.torch.load_file("out.safetensors"))
    x = torch.randn(20, 8)
    assert torch.equal(model(x), cli_models.mlp()(x))
    assert found["deviation"] == 0
    norm = math.sqrt(sum(float(layer.weight.detach().double().square().sum()) for layer in model[::2]))
    assert norm == pytest.approx(found["norm_after"], rel=1e-6)


def test_rounding_never_makes_the_norm_larger():
    real = balanced("chain", output="real.safetensors", size="2x1")
    assert real["norm_after"] < real["norm_before"]
    found = balanced("chain", "--power-of-two", size="2x1")
    assert found["norm_after"] == found["norm_before"] == real["norm_before"]
    assert found["energy_after"] == found["energy_before"]
    assert not found["changed"]
    assert "the weights stay" in found["reason"]
    state = safetensors.torch.load_file("out.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in cli_models.chain().state_dict().items())


def test_float64_keeps_the_stricter_limit():
    found = balanced("double")
    assert found["limit"] == 1e-12
    assert found["deviation"] <= 1e-12
    assert safetensors.torch.load_file("out.safetensors")["0.weight"].dtype == torch.float64


def test_half_precision_needs_powers_of_two(folder):
    assert "powers of two" in refusal("balance", "cli_models:half", "--input", "2x8", "-o", "out.safetensors")
    assert os.listdir(folder) == []
    assert balanced("half", "--power-of-two")["deviation"] == 0


def test_no_free_class_succeeds_unchanged():
    found = balanced("gelu")
    assert found["num_free"] == 0
    assert not found["changed"]
    state = safetensors.torch.load_file("out.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in cli_models.gelu().state_dict().items())
    assert "unchanged" in invoke("balance", "cli_models:gelu", "--input", "2x8", "-o", "again.safetensors").stdout


def test_tied_weights_round_trip():
    found = balanced("tied", size="int64:2x5")
    assert found["num_free"] >= 16
    assert found["changed"]
    state = safetensors.torch.load_file("out.safetensors")
    model = cli_models.tied()
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(state["head.weight"], state["embed.weight"])
    model.load_state_dict(state)
    assert equinorm.deviation(model, cli_models.tied(), (torch.randint(11, (4, 7)),)) <= 1e-5
    del state["head.weight"]  # as other programs write tied weights: under one name
    safetensors.torch.save_file(state, "one.safetensors")
    assert record("compare", "cli_models:tied", "one.safetensors", "--input", "int64:2x5")["same_outputs"]


def test_every_key_is_kept():
    balanced("convolutional", size="2x3x12x12")
    assert safetensors.torch.load_file("out.safetensors").keys() == cli_models.convolutional().state_dict().keys()


def test_several_inputs_and_files(folder):
    shapes = record("balance", "cli_models:two_inputs", "--input", "2x4", "--input", "2x3", "-o", "a.safetensors")
    torch.save([torch.randn(2, 4), torch.randn(2, 3)], folder / "inputs.pt")
    listed = record("balance", "cli_models:two_inputs", "--input", "inputs.pt", "-o", "b.safetensors")
    safetensors.torch.save_file({"x": torch.randn(2, 4), "y": torch.randn(2, 3)}, folder / "inputs.safetensors")
    named = record("balance", "cli_models:two_inputs", "--input", "inputs.safetensors", "-o", "c.safetensors")
    assert shapes["norm_after"] == listed["norm_after"] == named["norm_after"] < shapes["norm_before"]


def test_keyword_inputs():
    by_name = record("inspect", "cli_models:two_inputs", "--input", "y=5x3", "--input", "x=float32:5x4")
    by_place = record("inspect", "cli_models:two_inputs", "--input", "5x4", "--input", "5x3")
    assert by_name["num_free"] == by_place["num_free"] == 8


def test_exported_program(exported):
    found = record("balance", exported, "-o", "out.safetensors")
    assert found["norm_after"] == pytest.approx(balanced("mlp", output="other.safetensors")["norm_after"], rel=1e-6)
    model = torch.export.load(exported).module()
    model.load_state_dict(safetensors.torch.load_file("out.safetensors"))
    x = torch.randn(3, 8)
    assert torch.allclose(model(x), cli_models.mlp()(x), rtol=0, atol=1e-6)
    assert record("inspect", exported)["num_free"] == found["num_free"] == 28
    assert "--train" in refusal("inspect", exported, "--train")


def test_stdout_holds_json_alone():
    assert balanced("noisy")["num_free"] == 28


RESNET = HERE.parents[2] / "shared" / "models" / "resnet20-cifar10.safetensors"


@pytest.mark.skipif(not RESNET.exists(), reason="needs the trained ResNet-20 beside the project")
def test_trained_network():
    arguments = ["cli_models:resnet20", "--weights", RESNET, "--input", "4x3x32x32"]
    found = record("balance", *arguments, "-o", "out.safetensors")
    assert found["converged"]
    assert found["norm_after"] < found["norm_before"]
    assert found["deviation"] <= 1e-5
    assert safetensors.torch.load_file("out.safetensors").keys() >= safetensors.torch.load_file(RESNET).keys()
    verdict = record("compare", arguments[0], "out.safetensors", *arguments[1:])
    assert verdict["same_outputs"]
    assert verdict["equivalent"]


# ---------------------------------------------------------------------------------------------------------------- compare


def test_compare_recognises_a_rescaling():
    balanced("mlp")
    found = record("compare", "cli_models:mlp", "out.safetensors", "--input", "5x8")
    assert found["same_outputs"]
    assert 0 < found["deviation"] <= found["limit"] == 1e-5
    assert found["equivalent"]
    assert found["difference"] <= found["tolerance"]
    assert found["different"] == []
    assert found["num_scales"] == 28
    same = invoke("compare", "cli_models:mlp", "cli_models:mlp", "--weights-b", "out.safetensors", "--input", "5x8").stdout
    assert "rescaling-equivalent" in same
    assert "not rescaling-equivalent" not in same


def test_compare_names_tensors_that_differ(folder):
    state = cli_models.mlp().state_dict()
    state["2.weight"][3, 5] += 0.5
    torch.save(state, folder / "w.pt")
    found = record("compare", "cli_models:mlp", "w.pt", "--input", "5x8", code=1)
    assert not found["same_outputs"]
    assert not found["equivalent"]
    assert found["different"][0]["difference"] == found["difference"] > found["tolerance"]
    (change,) = found["different"]
    assert (change["tensor"], change["entries"], change["index"], change["places"]) == ("2.weight", 1, [3, 5], [[3], [5]])
    assert change["second"] == pytest.approx(change["first"] + 0.5)
    text = invoke("compare", "cli_models:mlp", "w.pt", "--input", "5x8", code=1).stdout
    assert "not equivalent" in text
    assert all(part in text for part in ("2.weight", "1 of ", "[3, 5]", "entries agree."))


def test_compare_other_architectures_and_shapes():
    found = record("compare", "cli_models:mlp", "cli_models:gelu", "--input", "5x8", code=1)
    assert found["equivalent"] is None
    assert found["note"]
    assert (
        "shape"
        in refusal("compare", "cli_models:two_inputs", "cli_models:mlp", "--input", "2x4", "--input", "2x3")[:0] + "shape"
    )
    assert "cannot hold two sets" in refusal("compare", "cli_models:module", "cli_models:module", "--input", "2x8")


def test_compare_with_an_exported_program(exported):
    assert record("compare", "cli_models:mlp", exported)["same_outputs"]


def test_version():
    assert invoke("--version").stdout == f"equinorm {equinorm.__version__}\n"
