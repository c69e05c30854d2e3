"""`equinorm inspect`, `balance` and `compare` on ONNX files."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from cli_tools import folder, invoke, record, refusal
from onnx import helper
from onnx_graphs import info, mobile, model, normal, run, save, without_numbers

__all__ = ["folder"]


@pytest.fixture
def graph(folder):
    save(mobile(), folder / "net.onnx")
    return folder


def test_inspect(graph):
    found = record("inspect", "net.onnx", "--input", "x=2x3x8x8")
    assert found["num_free"] == 19
    assert {row["tensor"] for row in found["families"]} == {"stem.weight", "bn.gain", "fc.weight"}
    assert {pin["module"] for pin in found["pins"]} >= {"nodes.bn", "nodes.Clip_11"}
    assert not any(pin["source"] for pin in found["pins"])


def test_balance_and_compare(graph):
    found = record("balance", "net.onnx", "--p", "inf", "-o", "out.onnx", "--report", "report.html")
    assert found["norm_after"] < found["norm_before"]
    assert found["output"] == "out.onnx"
    assert any("onnxruntime" in note for note in found["notes"])
    assert without_numbers("out.onnx") == without_numbers("net.onnx")
    image = normal(3, 3, 8, 8, seed=9)
    (one,), (other,) = run("out.onnx", image), run("net.onnx", image)
    assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    compared = record("compare", "net.onnx", "out.onnx")
    assert compared["same_outputs"]
    assert compared["equivalent"]
    assert "exists. Use --force to replace it" in refusal("balance", "net.onnx", "-o", "out.onnx")
    said = invoke("balance", "net.onnx", "-o", "out.onnx", "--force", "--power-of-two").stdout
    assert "0 (bitwise equal)" in said


def test_inputs_by_name_in_order_from_files_and_fixed(graph):
    torch.save(torch.randn(1, 3, 8, 8), "image.pt")
    for given in ("1x3x8x8", "x=1x3x8x8", "x=image.pt", "image.pt"):
        assert record("inspect", "net.onnx", "--input", given)["num_free"] == 19
    node = helper.make_node("Add", ["x", "k"], ["y"])
    save(model([node], [info("x", [2]), info("k", [])], [info("y", [2])]), graph / "two.onnx")
    fixed = record("inspect", "two.onnx", "--input", "k=value:2", "--input", "2")
    assert fixed["inputs"] == "(float32[2])"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("balance", "net.onnx", "-o", "out.safetensors"), "must end in .onnx"),
        (("balance", "net.onnx", "-o", "out.onnx", "--weights", "w.pt"), "Leave out --weights"),
        (("balance", "net.onnx", "-o", "out.onnx", "--set", "a=1"), "Leave out --set"),
        (("balance", "net.onnx", "-o", "out.onnx", "--train"), "Leave out --train"),
        (("inspect", "net.onnx", "--device", "meta"), "Leave out --device meta"),
        (("inspect", "net.onnx", "--input", "z=1x3x8x8"), "no input 'z'"),
        (("inspect", "net.onnx", "--input", "x=value:big"), "names no number"),
        (("inspect", "net.onnx", "--input", "1x3x8x8", "--input", "1"), "takes 1 input"),
        (("inspect", "none.onnx"), "there is no file none.onnx"),
        (("balance", "relu.onnx", "-o", "out.onnx"), "nothing in relu.onnx can be rescaled, and nothing was written"),
    ],
)
def test_refusals(graph, arguments, expected):
    save(model([helper.make_node("Relu", ["x"], ["y"])], [info("x", [2])], [info("y", [2])]), graph / "relu.onnx")
    assert expected in " ".join(refusal(*arguments).split())
    assert sorted(os.listdir(graph)) == ["net.onnx", "relu.onnx"]


def test_without_onnx(graph, monkeypatch):
    from equinorm import _display

    def missing(name):
        raise ModuleNotFoundError("no", name="onnx")

    monkeypatch.setattr(_display.importlib, "import_module", missing)
    assert "pip install 'equinorm[onnx]'" in " ".join(refusal("inspect", "net.onnx").split())
