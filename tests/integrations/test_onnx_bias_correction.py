"""Bias correction of ONNX files: what rounding shifts goes into biases that are there, and the graph stays what it was."""
# ruff: noqa: E402 -- what is imported here depends on what is installed

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import helper
from onnx_graphs import info, model, normal, run, save, without_numbers

import equinorm
from equinorm.integrations.onnx import OnnxError, read, write


def node(*arguments, **attributes):
    return helper.make_node(*arguments, **attributes)


def graph():
    """Biases in Conv and Gemm, behind Conv and MatMul; one that is shared, one that is multiplied, and layers without any."""
    nodes = [
        node("Conv", ["x", "a.weight", "a.bias"], ["a"], "a"), node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "b.weight"], ["b"], "b"), node("Relu", ["b"], ["br"]),
        node("Conv", ["br", "c.weight"], ["c"], "c"), node("Add", ["c.bias", "c"], ["cb"]), node("Relu", ["cb"], ["cr"]),
        node("GlobalAveragePool", ["cr"], ["p"]), node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "d.weight", "d.bias"], ["d"], "d"), node("Relu", ["d"], ["dr"]),
        node("Gemm", ["dr", "e.weight", "e.bias"], ["e"], "e", transB=1), node("Relu", ["e"], ["er"]),
        node("MatMul", ["er", "g.weight"], ["g"], "g"), node("Add", ["g", "g.bias"], ["gb"]), node("Relu", ["gb"], ["gr"]),
        node("Gemm", ["gr", "h.weight", "shared"], ["h"], "h", transB=1), node("Relu", ["h"], ["hr"]),
        node("Gemm", ["hr", "i.weight", "shared"], ["i"], "i", transB=1), node("Relu", ["i"], ["ir"]),
        node("Gemm", ["ir", "j.weight", "j.bias"], ["j"], "j", transB=1, beta=2.0), node("Relu", ["j"], ["jr"]),
        node("MatMul", ["jr", "k.weight"], ["k"], "k"), node("Relu", ["k"], ["y"]),
    ]  # fmt: skip
    shapes = {
        "a.weight": (6, 3, 3, 3), "a.bias": (6,), "b.weight": (6, 6, 1, 1), "c.weight": (6, 6, 1, 1), "c.bias": (1, 6, 1, 1),
        "d.weight": (6, 5), "d.bias": (5,), "e.weight": (6, 5), "e.bias": (6,), "g.weight": (6, 6), "g.bias": (6,),
        "h.weight": (6, 6), "shared": (6,), "i.weight": (6, 6), "j.weight": (6, 6), "j.bias": (6,), "k.weight": (6, 3),
    }  # fmt: skip
    stored = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    return model(nodes, [info("x", ["N", 3, 8, 8])], [info("y", ["N", 3])], stored)


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    path = save(graph(), tmp_path_factory.mktemp("files") / "in.onnx")
    x = torch.from_numpy(2 * normal(64, 3, 8, 8, seed=99))
    file = read(path, {"x": x})
    return file, equinorm.equalize_(file.module, file.args, calibration=[x], scheme="w8a8-tensor", bias_correction=True)


def test_biases_are_corrected_where_a_layer_has_its_own(corrected):
    _, found = corrected
    assert set(found.corrections) == {f"{name}.weight" for name in "acdeg"}
    assert dict(found.biases) == {f"{name}.weight": f"{name}.bias" for name in "acdeg"}
    none, shared = ("it has no bias of its own", "bkj"), ("its bias is shared", "hi")
    assert found.left == {f"bias of {name}": why for why, names in (none, shared) for name in names}
    assert found.measured_after > found.measured_before + 1
    assert found.measured() == pytest.approx((found.measured_before, found.measured_after), abs=1e-3)  # single precision


def test_the_file_computes_what_the_module_does_and_changes_in_numbers_alone(corrected, tmp_path):
    file, _ = corrected
    out, (x,) = tmp_path / "out.onnx", file.args
    with pytest.raises(OnnxError, match="deviate by"):
        write(file.module, out, file.args)
    assert not out.exists()
    apart = write(file.module, out, file.args, corrected=True)
    assert apart > 1e-3  # from the old file, on purpose
    was, now = onnx.load(file.path), onnx.load(out)
    assert [proto.name for proto in now.graph.initializer] == [proto.name for proto in was.graph.initializer]
    assert without_numbers(out) == without_numbers(file.path)
    with torch.no_grad():
        wanted = file.module(x).numpy()
    assert np.abs(run(out, x.numpy())[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()
    file.module.get_parameter("c.bias").data += 0.1
    with torch.no_grad():  # what was written is what counted, not what the module says of itself
        assert np.abs(run(out, x.numpy())[0] - file.module(x).numpy()).max() > 1e-3
    file.module.get_parameter("c.bias").data -= 0.1
