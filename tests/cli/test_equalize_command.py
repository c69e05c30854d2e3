"""`equinorm equalize`: of factories to weights or to an exported copy, of ONNX files to ONNX files; data from files."""

import numpy as np
import pytest
import torch
from checkpoint_models import logits, save
from cli_tools import folder, invoke, record, refusal

import equinorm

__all__ = ["folder"]


@pytest.fixture
def data(folder):
    torch.manual_seed(0)
    samples = torch.randn(40, 8)
    np.savez(folder / "x.npz", samples.numpy())
    return samples


def test_weights_fit_the_factory_and_compute_the_same(data):
    import cli_models

    found = record("equalize", "cli_models:mlp", "--calibration", "x.npz", "--scheme", "w8a8-tensor", "-o", "out.safetensors")
    assert found["equalization"]["measured_after"] >= found["equalization"]["measured_before"]
    assert found["equalization"]["samples"] == 40
    assert found["inputs"] == "(float32[16, 8])"
    compared = record("compare", "cli_models:mlp", "out.safetensors", "--input", "4x8")
    assert compared["same_outputs"]
    assert compared["equivalent"]
    assert "exists" in refusal("equalize", "cli_models:mlp", "--calibration", "x.npz", "-o", "out.safetensors")
    assert cli_models.mlp()(data).shape[0] == 40


def test_a_note_says_where_no_scale_moved(data):
    """Powers of two that are less than 1.5 are 1."""
    moved, still = (
        record("equalize", "cli_models:mlp", "--calibration", "x.npz", "-o", f"{name}.safetensors", *options)
        for name, options in (("moved", ()), ("still", ("--power-of-two", "--largest", "1.5")))
    )
    assert any(moved["equalization"]["log_scales"])
    assert not any(still["equalization"]["log_scales"])
    assert [any("no scale moved" in note for note in found["notes"]) for found in (moved, still)] == [False, True]


def test_exported_copy_has_its_normalization_folded(folder):
    torch.save(torch.randn(12, 3, 8, 8), "images.pt")
    arguments = ("--calibration", "images.pt", "--batch", "4", "--report", "report.html")
    said = invoke("equalize", "cli_models:convolutional", *arguments, "-o", "out.pt2").stdout
    assert "deviation" in said
    assert "random inputs" not in said
    assert (folder / "report.html").stat().st_size > 1000
    drawn, left = record("equalize", "cli_models:convolutional", "--input", "4x3x8x8", "-o", "out.safetensors")["notes"]
    assert "random inputs" in drawn
    assert "-o FILE.pt2 folds it" in left
    import cli_models

    program, images = torch.export.load("out.pt2").module(), torch.randn(4, 3, 8, 8)
    assert equinorm.deviation(program, cli_models.convolutional().eval(), images) < 1e-5
    assert not any("running_mean" in name for name in program.state_dict())


def test_onnx_in_onnx_out(folder):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx_graphs import mobile, normal, run, save, without_numbers

    save(mobile(), folder / "net.onnx")
    images = normal(40, 3, 8, 8, seed=9)
    np.savez("x.npz", x=images)
    arguments = "--calibration", "x.npz", "--batch", "8", "--scheme", "w8-tensor"
    found = record("equalize", "net.onnx", *arguments, "--no-fold", "--no-free", "-o", "out.onnx")
    assert found["equalization"]["noise_after"] >= found["equalization"]["noise_before"]
    assert [note.split(" deviate")[0] for note in found["notes"]] == ["in onnxruntime the new file's outputs"]
    assert without_numbers("out.onnx") == without_numbers("net.onnx")
    (one,), (other,) = run("out.onnx", images), run("net.onnx", images)
    assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    assert any(np.any(a != b) for a, b in zip(_numbers("out.onnx"), _numbers("net.onnx"), strict=True))
    prepared = record("equalize", "net.onnx", *arguments, "-o", "prepared.onnx")
    assert prepared["notes"][0] == "1 batch normalization folded into the layer in front"
    assert prepared["notes"][1] == "1 bounded activation may get one bound for each channel"
    (one,) = run("prepared.onnx", images)
    assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    named = record("equalize", "net.onnx", *arguments, "--free-only", "l", "-o", "named.onnx")
    assert named["notes"][1] == prepared["notes"][1]
    np.savez("integers.npz", x=np.zeros((40, 3, 8, 8), np.int64))
    np.savez("wide.npz", x=images.astype(np.float64))
    assert "holds int64 for input 'x', which takes float32" in refusal(
        "equalize", "net.onnx", "--calibration", "integers.npz", "-o", "new.onnx"
    )
    wide = record("equalize", "net.onnx", "--calibration", "wide.npz", *arguments[2:], "-o", "wide.onnx")
    assert wide["equalization"]["measured_after"] == prepared["equalization"]["measured_after"]
    np.savez("nan.npz", x=np.full_like(images, np.nan))
    assert "returns NaN or inf on calibration batch 0" in refusal(
        "equalize", "net.onnx", "--calibration", "nan.npz", "-o", "new.onnx"
    )
    assert not (folder / "new.onnx").exists()
    corrected = record("equalize", "net.onnx", *arguments[:-1], "w4-tensor", "--bias-correction", "-o", "corrected.onnx")
    assert corrected["equalization"]["corrected"] == ["fc.weight", "next.weight", "stem.weight"]
    left = corrected["equalization"]["left"]
    assert left == {f"bias of {name}": "it has no bias of its own" for name in ("deep", "last", "out")}
    assert corrected["deviation"] <= 1e-5  # what was added to biases taken off
    assert "biases of 3 layers corrected" in corrected["notes"][2]
    assert "by its corrected biases" in corrected["notes"][3]
    (one,) = run("corrected.onnx", images)
    assert np.abs(one - other).max() > 1e-3 * np.abs(other).max()
    np.savez("z.npz", z=images)
    assert "is no input" in refusal("equalize", "net.onnx", "--calibration", "z.npz", "-o", "new.onnx")


def test_onnx_of_integers_without_data(folder):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx import helper
    from onnx_graphs import info, model, normal, save

    nodes = [
        helper.make_node("Gather", ["table", "place"], ["a"]),
        helper.make_node("Add", ["a", "x"], ["b"]),
        helper.make_node("MatMul", ["b", "first"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "second"], ["y"]),
    ]
    stored = {"table": normal(9, 4), "first": normal(4, 4, seed=1), "second": normal(4, 4, seed=2)}
    inputs = [info("place", ["N"], "l"), info("x", ["N", 4])]
    save(model(nodes, inputs, [info("y", ["N", 4])], stored), folder / "net.onnx")
    notes = record("equalize", "net.onnx", "-o", "new.onnx")["notes"]
    said = "calibrated on random inputs, but for 1 input of integers, the same in all samples: --calibration"
    assert any(note.startswith(said) for note in notes)


def test_onnx_of_two_inputs_of_one_shape(folder):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx import helper
    from onnx_graphs import info, model, normal, save

    nodes = [
        helper.make_node("MatMul", ["b", "first"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "second"], ["e"]),
        helper.make_node("Add", ["e", "a"], ["y"]),
    ]
    stored = {"first": normal(4, 4), "second": normal(4, 4, seed=1)}
    inputs = [info("a", ["N", 4]), info("b", ["N", 4])]
    save(model(nodes, inputs, [info("y", ["N", 4])], stored), folder / "net.onnx")
    first, second = 3 + normal(8, 4), normal(8, 4, seed=2)
    np.savez("b.npz", b=second)
    np.savez("both.npz", b=second, a=first)
    np.savez("ordered.npz", first, second)
    np.savez("three.npz", first, second, second)
    named, placed = (
        record("equalize", "net.onnx", "--calibration", f"{n}.npz", "-o", f"{n}.onnx") for n in ("both", "ordered")
    )
    assert named["equalization"]["noise_before"] == placed["equalization"]["noise_before"]
    for name, words in (
        ("b", "holds no samples of a. It must hold those of every input: a, b."),
        ("three", "which is no input"),
    ):
        for further in ((), ("--input", "b=8x4")):
            said = refusal("equalize", "net.onnx", "--calibration", f"{name}.npz", *further, "-o", "new.onnx")
            assert words in " ".join(said.split())
    fixed = record("equalize", "net.onnx", "--calibration", "b.npz", "--input", "a=value:0", "-o", "fixed.onnx")
    assert fixed["equalization"]["samples"] == 8


def _numbers(path):
    import onnx

    return [onnx.numpy_helper.to_array(proto) for proto in onnx.load(path).graph.initializer]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--scheme", "int8"), "a scheme is written as"),
        (("--calibration", "none.npz"), "there is no file none.npz"),
        (("--calibration", "text.npz"), "Write it with numpy.savez"),
        (("--calibration", "uneven.npz"), "must count the same samples"),
        (("--calibration", "wide.npz"), "does not run on inputs"),
        (("--calibration", "nan.npz"), "returns NaN or inf on calibration batch 0"),
        ((), "needs inputs to run with"),
    ],
)
def test_refusals(data, folder, arguments, expected):
    (folder / "text.npz").write_text("no arrays")
    np.savez("uneven.npz", np.zeros((3, 8)), np.zeros((4, 8)))
    np.savez("wide.npz", np.zeros((3, 9), np.float32))
    np.savez("nan.npz", np.full((3, 8), np.nan, np.float32))
    assert expected in " ".join(refusal("equalize", "cli_models:mlp", *arguments, "-o", "out.safetensors").split())
    assert not (folder / "out.safetensors").exists()


def test_nothing_is_written_where_nothing_moves(data, folder):
    said = refusal("equalize", "torch.nn:Tanh", "--calibration", "x.npz", "-o", "out.safetensors")
    assert "nothing" in said
    assert not (folder / "out.safetensors").exists()


def test_exported_programs(folder):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU6(), torch.nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[1].weight.mul_((2 * torch.randn(16)).exp())
    torch.export.save(torch.export.export(net, (torch.randn(8, 8),)), "net.pt2")
    np.savez("x.npz", np.random.default_rng(0).standard_normal((43, 8)))
    found = record("equalize", "net.pt2", "--calibration", "x.npz", "--scheme", "w8a8-tensor", "-o", "out.pt2")
    assert found["inputs"] == "(float32[8, 8])"
    assert found["equalization"]["samples"] == 40  # it takes 8 at a time
    assert found["equalization"]["measured_after"] > found["equalization"]["measured_before"] + 1
    assert found["notes"] == [
        "1 batch normalization folded into the layer in front",
        "1 bounded activation may get one bound for each channel",
    ]
    written = torch.export.load("out.pt2").module()
    assert equinorm.deviation(written, net, torch.randn(8, 8)) <= 1e-5
    np.savez("few.npz", np.zeros((7, 8)))
    said = " ".join(refusal("equalize", "net.pt2", "--calibration", "few.npz", "-o", "new.pt2").split())
    assert "few.npz holds 7 samples, and the model was exported for 8 at a time" in said
    assert not (folder / "new.pt2").exists()


def test_folders_become_folders(folder):
    save("llama", "a", "60KB", torch.float32)
    (folder / "a" / "tokenizer.json").write_text("{}")
    (folder / "a" / "pytorch_model.bin").write_bytes(b"old")
    found = record("equalize", "a", "--power-of-two", "--report", "b.html", "-o", "b")
    assert found["equalization"]["noise_after"] > found["equalization"]["noise_before"]
    assert "pytorch_model.bin" in found["notes"][-1]
    assert torch.equal(logits("b"), logits("a"))
    assert (folder / "b.html").is_file()
    assert {path.name for path in (folder / "a").iterdir()} - {path.name for path in (folder / "b").iterdir()} == {
        "pytorch_model.bin"
    }
    assert "b exists, and folders are not replaced" in refusal("equalize", "a", "--force", "-o", "b")
    for name in ("b.safetensors", "b.pt2"):
        assert "hf:a is loaded as a whole, and goes to one file" in refusal("equalize", "a", "-o", name)
    assert record("equalize", "hf:a", "--power-of-two", "-o", "b.safetensors")["deviation"] == 0.0
