"""ONNX in, ONNX out: only weights change, by a rescaling that leaves outputs; what cannot be done is refused in a sentence."""
# ruff: noqa: E402 -- what is imported here depends on what is installed

import copy
import itertools

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import info, mobile, model, normal, run, save, without_numbers

import equinorm
from equinorm.integrations.onnx import OnnxError, read, writing
from equinorm.reporting.files import OutputError


def node(*arguments, **attributes):
    return helper.make_node(*arguments, **attributes)


def chain(middle="Relu", first=None, second=None, **more):
    """Gemm, something, Gemm."""
    nodes = [node("Gemm", ["x", "w"], ["a"]), node(middle, ["a"], ["b"]), node("Gemm", ["b", "v"], ["y"])]
    stored = {"w": normal(4, 5, seed=1) if first is None else first, "v": normal(5, 3, seed=2) if second is None else second}
    return model(nodes, [info("x", [2, 4])], [info("y", [2, 3])], stored, **more)


def recurrent():
    """Convolutions in front of an LSTM and a GRU, whose inputs' weights absorb what comes."""
    nodes = [
        node("Conv", ["x", "conv.weight", "conv.bias"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Transpose", ["b"], ["c"], perm=[2, 0, 1]),
        node("LSTM", ["c", "lstm.w", "lstm.r", "lstm.b"], ["d", "h"], hidden_size=3, direction="bidirectional"),
        node("Identity", ["h"], ["e"]),
        node("GRU", ["c", "gru.w", "gru.r"], ["", "g"], hidden_size=4, linear_before_reset=1),
        node("MatMul", ["g", "out"], ["y"]),
    ]
    stored = {
        "conv.weight": normal(6, 2, 3), "conv.bias": normal(6), "lstm.w": normal(2, 12, 6), "lstm.r": normal(2, 12, 3),
        "lstm.b": normal(2, 24), "gru.w": normal(1, 12, 6), "gru.r": normal(1, 12, 4), "out": normal(4, 2),
    }  # fmt: skip
    return model(nodes, [info("x", [1, 2, 9])], [info("y", [1, 1, 2]), info("e", [2, 1, 3]), info("d", [7, 2, 1, 3])], stored)


def attention():
    """One head of attention with layer normalization, a gate by Split, and a table of tokens."""
    nodes = [
        node("Gather", ["table", "x"], ["t"]),
        node("LayerNormalization", ["t", "ln.w", "ln.b"], ["n"]),
        node("MatMul", ["n", "qkv"], ["p"]),
        node("Split", ["p", "parts"], ["q", "k", "v"], axis=-1),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Mul", ["s", "scale"], ["ss"]),
        node("Softmax", ["ss"], ["a"]),
        node("MatMul", ["a", "v"], ["o"]),
        node("MatMul", ["o", "proj"], ["r"]),
        node("Add", ["t", "r"], ["u"]),
        node("MatMul", ["u", "up"], ["g"]),
        node("Split", ["g"], ["g1", "g2"], axis=2),
        node("Sigmoid", ["g1"], ["g3"]),
        node("Mul", ["g3", "g2"], ["g4"]),
        node("MatMul", ["g4", "down"], ["y"]),
    ]
    stored = {
        "table": normal(9, 4), "ln.w": normal(4, seed=1), "ln.b": normal(4, seed=2), "qkv": normal(4, 12, seed=3),
        "parts": np.array([4, 4, 4]), "scale": np.float32(0.5), "proj": normal(4, 4, seed=4), "up": normal(4, 10, seed=5),
        "down": normal(5, 3, seed=6),
    }  # fmt: skip
    return model(nodes, [info("x", [1, 6], "l")], [info("y", [1, 6, 3])], stored)


def decoder():
    """Weights in Constant nodes; upsampling, concatenation, a transposed convolution, PRelu, sums of streams."""
    stored = {"w1": normal(4, 2, 3, 3), "w2": normal(4, 4, 1, 1, seed=1), "slope": np.abs(normal(4, 1, 1, seed=2)),
              "w3": normal(8, 4, 2, 2, seed=3), "b3": normal(4, seed=4), "w4": normal(3, 4, 1, 1, seed=5)}  # fmt: skip
    nodes = [node("Constant", [], [key], value=numpy_helper.from_array(value)) for key, value in stored.items()]
    nodes += [
        node("Constant", [], ["scales"], value_floats=[1.0, 1.0, 2.0, 2.0]),
        node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        node("PRelu", ["a", "slope"], ["b"]),
        node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["c", "w2"], ["d"]),
        node("Relu", ["d"], ["e"]),
        node("Resize", ["e", "", "scales"], ["f"], mode="linear"),
        node("Concat", ["b", "f"], ["g"], axis=1),
        node("ConvTranspose", ["g", "w3", "b3"], ["h"], strides=[2, 2]),
        node("Relu", ["h"], ["i"]),
        node("Conv", ["i", "w4"], ["y"]),
    ]
    return model(nodes, [info("x", [1, 2, 8, 8])], [info("y", [1, 3, 16, 16])])


def branches():
    """An If by a size, whose branch reads weights in it and around it; what the other reads is pinned. And an If by data."""
    inner = [node("Gemm", ["a", "u"], ["z0"]), node("Gemm", ["z0", "out"], ["z"]), node("Relu", ["z"], ["t"])]
    then = helper.make_graph(inner, "then", [], [info("t", None)], [numpy_helper.from_array(normal(5, 5, seed=3), "u")])
    other = helper.make_graph([node("Gemm", ["a", "aside"], ["e"])], "else", [], [info("e", None)])
    one = helper.make_graph([node("Gemm", ["b", "keep"], ["p"])], "one", [], [info("p", None)])
    two = helper.make_graph([node("Relu", ["b"], ["r"])], "two", [], [info("r", None)])
    nodes = [
        node("Gemm", ["x", "w"], ["a0"]),
        node("Relu", ["a0"], ["a"]),
        node("Shape", ["a"], ["s"]),
        node("Gather", ["s", "place"], ["n"]),
        node("Equal", ["n", "two"], ["is"]),
        node("If", ["is"], ["b0"], "known", then_branch=then, else_branch=other),
        node("Gemm", ["b0", "m"], ["b1"]),
        node("Relu", ["b1"], ["b2"]),
        node("Gemm", ["b2", "aside"], ["b3"]),
        node("Relu", ["b3"], ["b"]),
        node("ReduceSum", ["b"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["c"], "unknown", then_branch=one, else_branch=two),
        node("Gemm", ["c", "v"], ["y"]),
    ]
    stored = {"w": normal(4, 5, seed=1), "m": normal(5, 5, seed=4), "keep": normal(5, 5, seed=5),
              "aside": normal(5, 5, seed=6), "v": normal(5, 3, seed=2),
              "out": normal(5, 5, seed=7), "place": np.array(0), "two": np.array(2), "zero": np.float32(0)}  # fmt: skip
    return model(nodes, [info("x", [2, 4])], [info("y", None)], stored)


FREE = {"mobile": 6 + 8 + 5, "recurrent": 6, "attention": 4 + 4 + 4 + 5, "decoder": 4 + 4 + 4, "branches": 5 + 5 + 5}
"""Counted by hand. mobile: the stem, gains of batch normalization, Gemm; a gate pins the depthwise convolution, Clip the last.
recurrent: what both layers read. attention: gains, queries and keys, values, the half that is gated. branches: up to a
weight that the other branch reads too."""

NETWORKS = {"mobile": mobile, "recurrent": recurrent, "attention": attention, "decoder": decoder, "branches": branches}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_member_of_the_group(tmp_path, name):
    file = read(save(NETWORKS[name](), tmp_path / "in.onnx"))
    assert file.deviation < 1e-5
    wide = copy.deepcopy(file.module).double()
    args = tuple(value.double() if value.is_floating_point() else value for value in file.args)
    symmetries = equinorm.symmetries(wide, args)
    original = copy.deepcopy(wide)
    generator = torch.Generator().manual_seed(0)
    for magnitude in (0.1, 1.0, 3.0):
        logs = magnitude * torch.randn(symmetries.num_free, generator=generator, dtype=torch.float64)
        symmetries.rescale_(logs)
        assert equinorm.deviation(wide, original, args) <= 1e-12
    assert symmetries.num_free == FREE[name]


# ------------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", NETWORKS)
def test_balanced_files_differ_in_weights_alone(tmp_path, name):
    path = save(NETWORKS[name](), tmp_path / "in.onnx")
    file = read(path)
    before = equinorm.balance_(file.module, file.args)
    assert before.norm_after < before.norm_before
    deviation = writing.write(file.module, tmp_path / "out.onnx", file.args)
    values = [value.numpy() for value in file.args]
    for one, other in zip(run(tmp_path / "out.onnx", *values), run(path, *values), strict=True):
        assert np.abs(one - other).max() <= deviation * np.abs(other).max() <= 1e-5 * np.abs(other).max()
    assert without_numbers(tmp_path / "out.onnx") == without_numbers(path)
    assert (tmp_path / "out.onnx").read_bytes() != path.read_bytes()
    again = read(tmp_path / "out.onnx")
    assert again.module.state_dict().keys() == file.module.state_dict().keys()
    for key, value in again.module.state_dict().items():
        assert torch.equal(value, file.module.state_dict()[key])


@pytest.mark.parametrize("name", ["mobile", "decoder", "recurrent"])
def test_powers_of_two_are_bitwise(tmp_path, name):
    path = save(NETWORKS[name](), tmp_path / "in.onnx")
    file = read(path)
    symmetries = equinorm.symmetries(file.module, file.args)
    exponents = torch.randint(-6, 7, (symmetries.num_free,), generator=torch.Generator().manual_seed(0))
    symmetries.rescale_(exponents.double() * np.log(2))
    assert writing.write(file.module, tmp_path / "out.onnx", file.args) == 0.0


def test_unchanged_weights_give_the_same_bytes(tmp_path):
    path = save(mobile(), tmp_path / "in.onnx")
    file = read(path)
    writing.write(file.module, tmp_path / "out.onnx", file.args)
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def encoded(kind, name, array):
    """A TensorProto in each of the ways to store numbers."""
    if kind == "raw":
        return numpy_helper.from_array(array, name)
    code = {"float": TensorProto.FLOAT, "double": TensorProto.DOUBLE, "half": TensorProto.FLOAT16}[kind]
    values = array.astype({"half": np.float16}.get(kind, array.dtype)).reshape(-1)
    return helper.make_tensor(name, code, array.shape, values)


@pytest.mark.parametrize("kind", ["raw", "float", "double", "half", "raw double", "raw half", "external"])
def test_every_way_to_store_numbers(tmp_path, kind):
    dtype = {"double": np.float64, "half": np.float16}.get(kind.split()[-1], np.float32)
    arrays = {"w": normal(4, 5, seed=1, dtype=dtype), "v": normal(5, 3, seed=2, dtype=dtype)}
    stored = {key: encoded(kind.split()[0] if kind != "external" else "raw", key, array) for key, array in arrays.items()}
    made = chain(first=stored["w"], second=stored["v"])
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    path = tmp_path / "in.onnx"
    if kind == "external":
        onnx.save(made, str(path), save_as_external_data=True, location="numbers.bin", size_threshold=0)
    else:
        save(made, path)
    file = read(path)
    symmetries = equinorm.symmetries(file.module, file.args)
    assert symmetries.num_free == 5
    symmetries.rescale_(torch.tensor([1.0, -2, 3, 0, -1], dtype=torch.float64) * np.log(2))
    out = tmp_path / "there" / "out.onnx"
    out.parent.mkdir()
    assert writing.write(file.module, out, file.args) == 0.0
    assert without_numbers(out) == without_numbers(path)
    written = onnx.load(str(out))
    factors = dtype(2) ** np.array([1, -2, 3, 0, -1], dtype=dtype)
    assert np.array_equal(numpy_helper.to_array(written.graph.initializer[0]), arrays["w"] * factors)
    assert {entry.name for entry in out.parent.iterdir()} == {"out.onnx"} | ({"out.onnx.data"} if kind == "external" else set())
    if kind == "external":
        with pytest.raises(OutputError, match="with external data nothing is replaced"):
            writing.write(file.module, out, file.args, force=True)


# --------------------------------------------------------------------------------------------------------- what stays as it is


def test_shared_initializers_satisfy_every_use(tmp_path):
    nodes = [node("Gemm", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("Gemm", ["b", "w"], ["c"]),
             node("Relu", ["c"], ["d"]), node("Gemm", ["d", "v"], ["y"])]  # fmt: skip
    stored = {"w": normal(4, 4), "v": normal(4, 2)}
    file = read(save(model(nodes, [info("x", [1, 4])], [info("y", [1, 2])], stored), tmp_path / "in.onnx"))
    assert equinorm.symmetries(file.module, file.args).num_free == 1  # w by one number, v by its square


def test_weights_of_one_entry_are_weights_where_layers_have_theirs(tmp_path):
    nodes = [node("Gemm", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("Gemm", ["b", "v"], ["c"]),
             node("Mul", ["c", "number"], ["y"])]  # fmt: skip
    stored = {name: normal(1, 1, seed=seed) for seed, name in enumerate(("w", "v", "number"))}
    file = read(save(model(nodes, [info("x", [2, 1])], [info("y", [2, 1])], stored), tmp_path / "in.onnx"))
    assert {*file.module.state_dict()} == {"w", "v"}
    assert equinorm.symmetries(file.module, file.args).num_free == 1


@pytest.mark.parametrize("shared", [{"mean": "shift"}, {"var": "gain"}, {"mean": "shift", "var": "gain"}])
def test_statistics_that_are_weights_too(tmp_path, shared):
    """As in files whose equal initializers were made one: those of an untrained batch normalization."""
    names = [shared.get(name, name) for name in ("gain", "shift", "mean", "var")]
    nodes = [node("Conv", ["x", "w"], ["a"]), node("BatchNormalization", ["a", *names], ["b"]), node("Relu", ["b"], ["c"]),
             node("Conv", ["c", "v"], ["d"]), node("Relu", ["d"], ["e"]), node("Conv", ["e", "u"], ["y"])]  # fmt: skip
    stored = {name: np.abs(normal(4, seed=number)) + 0.5 for number, name in enumerate(dict.fromkeys(names))}
    stored |= {"w": normal(4, 3, 1, 1), "v": normal(5, 4, 1, 1), "u": normal(2, 5, 1, 1)}
    path = save(model(nodes, [info("x", [1, 3, 4, 4])], [info("y", [1, 2, 4, 4])], stored), tmp_path / "in.onnx")
    file = read(path)
    symmetries = equinorm.symmetries(file.module, file.args)
    assert symmetries.num_free >= 5
    symmetries.rescale_(torch.randn(symmetries.num_free), power_of_two=True)
    assert writing.write(file.module, tmp_path / "out.onnx", file.args) == 0.0


def test_nodes_that_run_as_a_whole_have_no_gradients(tmp_path):
    file = read(save(chain("Shrink"), tmp_path / "in.onnx"))
    with pytest.raises(
        equinorm.EquinormError, match=r"no gradient passes the node .*onnxruntime.*equinorm balance FILE --p inf"
    ):
        equinorm.equalize_(file.module, file.args, scheme="w8a8")


@pytest.mark.parametrize(("version", "free"), [(3, 5), (8, 0)])
def test_initializers_that_a_caller_may_replace(tmp_path, version, free):
    made = chain(opset=8 if version == 3 else 17, ir_version=version)
    if version == 3:  # where every initializer had to be listed, and Gemm its bias
        for place, size in ((0, 5), (2, 3)):
            made.graph.node[place].input.append(f"bias{size}")
            made.graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.float32), f"bias{size}"))
    made.graph.input.extend(info(proto.name, list(proto.dims)) for proto in made.graph.initializer)
    file = read(save(made, tmp_path / "in.onnx"))
    assert len(file.args) == 1
    assert file.fed == (() if version == 3 else ("v", "w"))
    assert equinorm.symmetries(file.module, file.args).num_free == free


def test_bounds_and_shapes_are_no_weights(tmp_path):
    file = read(save(mobile(), tmp_path / "in.onnx"))
    assert {"zero", "six", "rest"}.isdisjoint(file.module.state_dict())
    assert {name for name, _ in file.module.named_buffers()} == {"bn.mean", "bn.var"}


def test_functions_of_the_file_are_put_in_their_places(tmp_path):
    body = [node("Constant", [], ["half"], value=numpy_helper.from_array(np.full((5,), 0.5, np.float32))),
            node("Mul", ["in", "half"], ["out"])]  # fmt: skip
    function = helper.make_function("own", "Halve", ["in"], ["out"], body, [helper.make_opsetid("", 17)])
    made = chain(functions=[function])
    made.graph.node.insert(2, node("Halve", ["b"], ["c"], domain="own"))
    made.graph.node[3].input[0] = "c"
    made.opset_import.append(helper.make_opsetid("own", 1))
    path = save(made, tmp_path / "in.onnx")
    file = read(path)
    assert equinorm.balance_(file.module, file.args).norm_after > 0
    assert set(file.module.state_dict()) == {"w", "v"}
    writing.write(file.module, tmp_path / "out.onnx", file.args)
    assert without_numbers(tmp_path / "out.onnx") == without_numbers(path)


def test_numbers_next_to_zero_count_as_zero(tmp_path):
    first = normal(4, 5)
    first[:, 0] = 1e-37
    file = read(save(chain(first=first), tmp_path / "in.onnx"))
    assert file.module.tiny == 4
    equinorm.balance_(file.module, file.args)
    writing.write(file.module, tmp_path / "out.onnx", file.args)


def test_a_fixed_input_chooses_a_branch(tmp_path):
    then = helper.make_graph([node("Gemm", ["x", "w"], ["t0"]), node("Relu", ["t0"], ["t"])], "then", [], [info("t", None)],
                             [numpy_helper.from_array(normal(4, 5), "w")])  # fmt: skip
    other = helper.make_graph([node("Identity", ["x"], ["e"])], "else", [], [info("e", None)])
    nodes = [node("Equal", ["rate", "wanted"], ["is"]), node("If", ["is"], ["b"], then_branch=then, else_branch=other),
             node("MatMul", ["b", "v"], ["y"])]  # fmt: skip
    stored = {"wanted": np.array(16), "v": normal(5, 2)}
    made = model(nodes, [info("x", [1, 4]), info("rate", [], "l")], [info("y", None)], stored)
    path = save(made, tmp_path / "in.onnx")
    assert equinorm.symmetries(*_parts(read(path, fixed={"rate": 16}))).num_free == 5
    unread = read(path, {"rate": torch.tensor(16)})
    assert equinorm.symmetries(*_parts(unread)).num_free == 0
    assert "If" in unread.unread[0]


def _parts(file):
    return file.module, file.args


# ------------------------------------------------------------------------------------------------------------------- refusals


def test_files_that_are_not_read(tmp_path):
    def refusal(made, match, **more):
        path = tmp_path / "in.onnx"
        path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
        with pytest.raises(OnnxError, match=match):
            read(path, **more)

    refusal(b"", "it holds no graph")
    refusal(b"not an ONNX file at all", "cannot read .* as an ONNX file")
    with pytest.raises(OnnxError, match="there is no file"):
        read(tmp_path / "missing.onnx")
    refusal(chain(opset=99), "uses version 99 of ONNX's operators, .* Install a newer onnx")
    refusal(chain(middle="NoSuchThing"), "onnxruntime cannot run")
    quantized = chain()
    quantized.graph.node.insert(0, node("QuantizeLinear", ["x", "one"], ["q"]))
    refusal(quantized, "quantized already .1 node such as QuantizeLinear")
    refusal(mobile(), "has no input 'z'. It takes x", inputs={"z": (1, 3, 8, 8)})
    refusal(mobile(), "is Nx3x8x8, not 1x3x9x8", inputs=[(1, 3, 9, 8)])
    refusal(mobile(), "takes 1 input", inputs=[(1, 3, 8, 8), (1,)])
    unsized = model([node("Relu", ["x"], ["y"])], [info("x", ["N", 3, "height", None])], [info("y", None)])
    refusal(unsized, r"axes without a size \(height, \?\).*--input x=1x3xNxN")
    lost = chain()
    proto = lost.graph.initializer[0]
    proto.ClearField("raw_data")
    proto.data_location = TensorProto.EXTERNAL
    entry = proto.external_data.add()
    entry.key, entry.value = "location", "missing.bin"
    refusal(lost, "cannot read the tensor 'w'")
    sequence = chain()
    sequence.graph.node.append(node("SequenceConstruct", ["b"], ["s"]))
    sequence.graph.node.append(node("SequenceLength", ["s"], ["n"]))
    sequence.graph.output.append(info("n", [], "l"))
    refusal(sequence, "returns a sequence")


def test_what_deviates_is_not_written(tmp_path):
    path = save(chain(), tmp_path / "in.onnx")
    file = read(path)
    with torch.no_grad():
        file.module.get_parameter("w").mul_(1.001)
    with pytest.raises(OnnxError, match=r"refused: in onnxruntime .* deviate by 1\.0e-03 .* Nothing was written"):
        writing.write(file.module, tmp_path / "out.onnx", file.args)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.onnx"]
    with pytest.raises(OutputError, match=r"exists\. Use force=True to replace it"):
        writing.write(file.module, path, file.args)
    with pytest.raises(OnnxError, match=r"not Linear: .*\. A network of PyTorch becomes a file by"):
        writing.write(torch.nn.Linear(2, 2), tmp_path / "out.onnx", file.args)
    save(chain(first=normal(4, 6), second=normal(6, 3)), path)
    with pytest.raises(OnnxError, match="Read it again"):
        writing.write(file.module, tmp_path / "out.onnx", file.args)
    with pytest.raises(OnnxError, match="takes 1 input"):
        file.module(*itertools.repeat(file.args[0], 2))


def test_outputs_next_to_zero_are_measured_by_their_difference(tmp_path):
    made = chain()
    made.graph.node[2].output[0] = "c"
    made.graph.node.extend([node("Add", ["c", "low"], ["d"]), node("Sigmoid", ["d"], ["y"])])
    made.graph.initializer.append(numpy_helper.from_array(np.full(3, -40, np.float32), "low"))
    file = read(save(made, tmp_path / "in.onnx"))
    assert equinorm.symmetries(file.module, file.args).num_free == 5
    equinorm.balance_(file.module, file.args)
    assert writing.write(file.module, tmp_path / "out.onnx", file.args) < 1e-5


def test_what_reads_wrongly_is_refused(tmp_path, monkeypatch):
    from equinorm.integrations.onnx.operators import TABLE, Operator

    known = TABLE["Relu"]
    wrong = Operator(lambda call, x: torch.abs(x), known.attributes, known.settings, known.weights, known.statistics)
    monkeypatch.setitem(TABLE, "Relu", wrong)
    with pytest.raises(OnnxError, match="deviates from onnxruntime"):
        read(save(chain(), tmp_path / "in.onnx"))


def test_another_branch_than_the_one_that_was_read(tmp_path):
    file = read(save(branches(), tmp_path / "in.onnx"))
    with pytest.raises(OnnxError, match=r"for inputs of these sizes 'known' .If. takes another branch"):
        file.module(torch.randn(3, 4))
