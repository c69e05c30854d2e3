"""Names that meet, functions, packed tensors, outputs that nothing reads: a file is read as it is, or refused in a sentence."""
# ruff: noqa: E402 -- what is imported here depends on what is installed

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

from onnx import helper, numpy_helper
from onnx_graphs import info, model, normal, run, save

import equinorm
from equinorm.integrations.onnx import OnnxError, read, write

node = helper.make_node
STORED = {"w": normal(3, 4, seed=1), "v": normal(4, 2, seed=2)}
X, Y = [info("x", [2, 3])], [info("y", [2, 2])]


def layers(weight="w", other="v"):
    return [node("Gemm", ["x", weight], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", other], ["y"])]


def moved_by_powers_of_two(path, out):
    """How many classes are free; what is written is bitwise the same."""
    file = read(path)
    symmetries = equinorm.symmetries(file.module, file.args)
    symmetries.rescale_(torch.arange(symmetries.num_free, dtype=torch.float64) * np.log(2))
    assert write(file.module, out, file.args) == 0.0
    x = normal(2, 3, seed=3)
    assert np.array_equal(run(path, x)[0], run(out, x)[0])
    return symmetries.num_free


@pytest.mark.parametrize("name", ["nodes.w", "nodes.Gemm_0.w", "nodes", "_single", "inputs", "forward", "a..b", ".w"])
def test_any_name_of_a_tensor(tmp_path, name):
    path = save(model(layers(name), X, Y, {name: STORED["w"], "v": STORED["v"]}), tmp_path / "in.onnx")
    assert moved_by_powers_of_two(path, tmp_path / "out.onnx") == 4


def branches(**stored):
    """A size decides which of two branches reads the second weight; it is the first."""
    bodies = {
        key: helper.make_graph([node("MatMul", ["r", "v"], [key])], key, [], [info(key, None)], [proto])
        for key, proto in (
            ("then_branch", numpy_helper.from_array(STORED["v"], "v")),
            ("else_branch", numpy_helper.from_array(normal(4, 2, seed=9), "v")),
        )
    }
    nodes = [node("Size", ["x"], ["size"]), node("Greater", ["size", "zero"], ["is"]), *layers()[:2]]
    nodes += [node("If", ["is"], ["b"], **bodies), node("Add", ["b", next(iter(stored))], ["y"])]
    return model(nodes, X, Y, {"w": STORED["w"], "zero": np.int64(0), **stored})


def test_a_tensor_named_as_one_of_a_branch_is_called(tmp_path):
    assert moved_by_powers_of_two(save(branches(shift=normal(2)), tmp_path / "in.onnx"), tmp_path / "out.onnx") == 4
    with pytest.raises(OnnxError, match=r"two tensors are called 'b.then_branch.v' here.*Rename one"):
        read(save(branches(**{"b.then_branch.v": normal(4, 2)[:1]}), tmp_path / "same.onnx"))


def own(body, version=17, inputs=("x",)):
    """A file that calls a function of its own in front of two layers."""
    function = helper.make_function("own", "First", list(inputs), ["y"], body, [helper.make_opsetid("", version)])
    nodes = [node("First", ["x"], ["first"], domain="own"), *layers()]
    nodes[1].input[0] = "first"
    made = model(nodes, X, Y, STORED, functions=[function])
    made.opset_import.append(helper.make_opsetid("own", 1))
    return made


def test_functions_that_are_quantized_or_of_another_version(tmp_path):
    assert moved_by_powers_of_two(save(own([node("Relu", ["x"], ["y"])]), tmp_path / "in.onnx"), tmp_path / "out.onnx") == 4
    with pytest.raises(OnnxError, match=r"calls its function own.First, which cannot be .*other versions \(ONNX 13\)"):
        read(save(own([node("Relu", ["x"], ["y"])], 13), tmp_path / "old.onnx"))
    rounding = [node("Constant", [], ["s"], value_float=0.1), node("QuantizeLinear", ["x", "s"], ["q"])]
    with pytest.raises(OnnxError, match=r"is quantized already \(2 nodes such as QuantizeLinear\)"):
        read(save(own([*rounding, node("DequantizeLinear", ["q", "s"], ["y"])]), tmp_path / "rounded.onnx"))


def sparse(name):
    values = numpy_helper.from_array(np.ones(2, np.float32), name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 5]), f"{name}_places"), [3, 4])


def test_sparse_tensors_are_refused_wherever_they_are(tmp_path):
    constant = model([node("Constant", [], ["w"], sparse_value=sparse("w")), *layers()], X, Y, {"v": STORED["v"]})
    within = branches(shift=normal(2))
    within.graph.node[4].attribute[1].g.sparse_initializer.append(sparse("s"))
    for made in (constant, within):
        with pytest.raises(OnnxError, match=r"holds sparse tensors .*, which are not read. Store them as dense"):
            read(save(made, tmp_path / "in.onnx"))


def test_numbers_of_four_bits_outside_of_the_file(tmp_path):
    stored = {"few": np.arange(-4, 8).reshape(3, 4).astype(ml_dtypes.int4), "u": normal(4, 4), **STORED}
    nodes = [node("Cast", ["few"], ["w"], to=1), node("Gemm", ["x", "w"], ["h0"]), *layers("u")]
    nodes[2].input[0] = "h0"
    del stored["w"]
    made = model(nodes, X, Y, stored, opset=21, ir_version=10)
    onnx.save(made, str(tmp_path / "in.onnx"), save_as_external_data=True, location="numbers.bin", size_threshold=0)
    assert moved_by_powers_of_two(tmp_path / "in.onnx", tmp_path / "out.onnx") == 4


def test_settings_that_an_operator_of_another_domain_makes(tmp_path):
    """onnx's own evaluator does not know them; onnxruntime does."""
    nodes = [node("Gelu", ["k"], ["g"], domain="com.microsoft"), node("Cast", ["g"], ["sizes"], to=7)]
    nodes += [node("Reshape", ["x", "sizes"], ["x0"]), *layers()]
    nodes[3].input[0] = "x0"
    made = model(nodes, X, Y, {**STORED, "k": np.array([2.3, 3.1], np.float32)})
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert moved_by_powers_of_two(save(made, tmp_path / "in.onnx"), tmp_path / "out.onnx") == 4


def between(*nodes, made="k", **more):
    """Two layers, and nodes in between that make this of `r`."""
    every = layers()
    every[2].input[0] = made
    return model([*every[:2], *nodes, every[2]], X, Y, STORED, **more)


@pytest.mark.parametrize("opset", [11, 17])
def test_outputs_that_nothing_reads(tmp_path, opset):
    """The mask of Dropout is listed by many exporters; parts of a Split count whether they are read or not."""
    dropout = between(node("Dropout", ["r"], ["k", "mask"]), opset=opset)
    assert moved_by_powers_of_two(save(dropout, tmp_path / "in.onnx"), tmp_path / "out.onnx") == 4
    split = between(node("Split", ["r"], ["a", "b"], axis=-1), node("Concat", ["a", "a"], ["k"], axis=-1), opset=opset)
    assert moved_by_powers_of_two(save(split, tmp_path / "in.onnx"), tmp_path / "parts.onnx") > 0
    dropout.graph.output.append(helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, [2, 4]))
    assert "returns its mask" in read(save(dropout, tmp_path / "in.onnx")).unread[0]


def test_double_precision_around_a_node_that_is_not_read(tmp_path):
    """onnxruntime runs it, as it does the file; float32 beside float64 stays what it is."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Add", ["d", "d"], ["e"]), node("Identity", ["s"], ["t"])],
        "body",
        [
            info("i", [], "l"),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            info("d", None, "d"),
            info("s", None),
        ],
        [helper.make_tensor_value_info("on", onnx.TensorProto.BOOL, []), info("e", None, "d"), info("t", None)],
    )
    loop = [node("Cast", ["r"], ["double"], to=11), node("Loop", ["two", "", "double", "r"], ["e", "k"], body=body)]
    made = between(*loop)
    made.graph.initializer.append(numpy_helper.from_array(np.array(2), "two"))
    assert [text.partition(":")[0] for text in read(save(made, tmp_path / "in.onnx")).unread] == ["'e' (Loop)"]
    shrink = between(node("Shrink", ["r"], ["k"], lambd=0.1))
    for value in (*shrink.graph.input, *shrink.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for proto in shrink.graph.initializer:
        proto.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(proto).astype(np.float64), proto.name))
    assert read(save(shrink, tmp_path / "in.onnx")).deviation < 1e-15


def test_inputs_and_outputs_that_say_little(tmp_path):
    made = model(layers(), X, Y, STORED)
    made.graph.input[0].type.tensor_type.ClearField("shape")
    path = save(made, tmp_path / "in.onnx")
    with pytest.raises(OnnxError, match=r"does not say how many axes its input 'x' has.*--input x=1x3x224x224"):
        read(path)
    assert read(path, [normal(2, 3)]).deviation < 1e-6
    for given in ("2x3", 5, (2, 3.5)):
        with pytest.raises(OnnxError, match=r"input 'x' of .* is given as .*: neither a tensor nor a shape"):
            read(path, {"x": given})
    with pytest.raises(OnnxError, match=r"input 'x' of .* cannot be fixed to 'one', which is no number"):
        read(path, fixed={"x": "one"})
    made.graph.input[0].CopyFrom(info("x", ["N", 3]))
    with pytest.raises(OnnxError, match=r"input 'x' of .* is Nx3, not -1x3"):
        read(save(made, path), [(-1, 3)])
    made.graph.node.append(node("Identity", ["name"], ["said"]))
    made.graph.initializer.append(helper.make_tensor("name", onnx.TensorProto.STRING, [1], [b"net"]))
    made.graph.output.append(helper.make_tensor_value_info("said", onnx.TensorProto.STRING, [1]))
    with pytest.raises(OnnxError, match=r"strings are no numbers"):
        read(save(made, path), [(2, 3)])


def test_what_onnxruntime_lacks_is_said_without_codes(tmp_path):
    made = model(layers(), X, Y, {key: value.astype(ml_dtypes.bfloat16) for key, value in STORED.items()})
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    with pytest.raises(OnnxError, match=r"in.onnx: Could not find an implementation for \w+\(13\)"):
        read(save(made, tmp_path / "in.onnx"))
