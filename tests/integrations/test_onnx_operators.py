"""Every operator of the table against onnxruntime, in each of its uses; what the table does not know is left unread."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import helper
from onnx_graphs import info, model, normal, run, save

from equinorm.integrations.onnx.files import stored
from equinorm.integrations.onnx.module import OnnxModule
from equinorm.integrations.onnx.nodes import Node
from equinorm.integrations.onnx.operators import TABLE

X = normal(2, 4, 5, 6)
SMALL = normal(3, 4)
POSITIVE = np.abs(normal(3, 4)) + 0.1
UNIT = np.clip(normal(3, 4), -0.9, 0.9)
WHOLE = np.array([[3, -7, 5, 9], [-2, 4, 8, -1]])
BOOLEAN = SMALL > 0
SAMPLES = []


def sample(operator, *inputs, opset=17, outputs=1, **attributes):
    SAMPLES.append(pytest.param(operator, inputs, opset, outputs, attributes, id=f"{operator}-{len(SAMPLES)}"))


def ints(*values):
    return np.array(values, dtype=np.int64)


for name in ("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Identity", "LeakyRelu", "Neg", "Relu", "Round", "Sigmoid"):
    sample(name, SMALL)
for name in (
    "Sign",
    "Sin",
    "Softplus",
    "Softsign",
    "Tan",
    "Tanh",
    "Atan",
    "Asinh",
    "Sinh",
    "Cosh",
    "HardSwish",
    "Selu",
    "Celu",
):
    sample(name, SMALL)
for name in ("Mish", "IsNaN", "HardSigmoid", "ThresholdedRelu"):
    sample(name, SMALL, opset=18)
for name in ("Acos", "Asin", "Atanh"):
    sample(name, UNIT)
for name in ("Log", "Sqrt", "Reciprocal"):
    sample(name, POSITIVE)
sample("Acosh", 1 + POSITIVE)
sample("Not", BOOLEAN)
for name in (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Max",
    "Min",
    "Sum",
    "Mean",
    "Greater",
    "Less",
    "GreaterOrEqual",
    "LessOrEqual",
    "Equal",
):
    sample(name, SMALL, normal(4, seed=1))
for name in ("And", "Or", "Xor"):
    sample(name, BOOLEAN, UNIT > 0)
sample("Max", SMALL, normal(3, 1, seed=1), normal(4, seed=2))
sample("Div", WHOLE, ints(2, -2, 3, 4))
sample("Mod", WHOLE, ints(2, -2, 3, 4))
sample("Mod", SMALL, normal(4, seed=1), fmod=1)
sample("Pow", POSITIVE, np.float32(1.5))
sample("Pow", SMALL, np.array([2.0], dtype=np.float32))
sample("Where", BOOLEAN, SMALL, normal(4, seed=1))
sample("LeakyRelu", SMALL, alpha=0.3)
sample("Elu", SMALL, alpha=0.3)
sample("Celu", SMALL, alpha=2.0)
sample("Selu", SMALL, alpha=1.5, gamma=2.0)
sample("ThresholdedRelu", SMALL, alpha=0.5)
sample("HardSigmoid", SMALL, alpha=0.3, beta=0.4)
sample("Gelu", SMALL, opset=20)
sample("Gelu", SMALL, opset=20, approximate="tanh")
sample("PRelu", X, normal(4, 1, 1, seed=1))
sample("PRelu", X, normal(1, seed=1))
sample("PRelu", X, normal(4, 5, 6, seed=1))
sample("Clip", SMALL, np.float32(-0.5), np.float32(0.5))
sample("Clip", SMALL, np.float32(-0.5))
sample("Clip", SMALL, None, np.float32(0.5))
sample("Clip", SMALL, opset=9, min=-0.5)
sample("Clip", SMALL, opset=9, min=-0.5, max=0.25)
sample("Dropout", SMALL)
sample("Dropout", SMALL, np.float32(0.5), np.array(False))
sample("Dropout", SMALL, opset=10, ratio=0.5)
sample("Cast", SMALL, to=6)
sample("Cast", WHOLE, to=1)
sample("CastLike", WHOLE, SMALL)
sample("Reshape", X, ints(0, -1, 3))
sample("Flatten", X)
sample("Flatten", X, axis=-1)
sample("Transpose", X)
sample("Transpose", X, perm=[0, 2, 3, 1])
sample("Squeeze", SMALL[None, :, None], ints(0))
sample("Squeeze", SMALL[None, :, None])
sample("Squeeze", SMALL[None, :, None], opset=11, axes=[0])
sample("Unsqueeze", SMALL, ints(0, -1))
sample("Unsqueeze", SMALL, opset=11, axes=[0, 3])
sample("Concat", SMALL, normal(3, 2, seed=1), axis=1)
sample("Split", X, ints(1, 3), outputs=2, axis=1)
sample("Split", X, outputs=2, axis=-1)
sample("Split", normal(2, 7), outputs=3, opset=18, axis=1, num_outputs=3)
sample("Split", X, outputs=2, opset=11, axis=1, split=[1, 3])
sample("Slice", X, ints(1, -3), ints(3, 100), ints(1, 3))
sample("Slice", X, ints(3, 5), ints(-100, -7), ints(1, 3), ints(-1, -2))
sample("Slice", X, ints(0), ints(6), ints(3), ints(2))
sample("Slice", X, opset=9, starts=[1, 0], ends=[2, -1], axes=[1, 2])
sample("Gather", X, ints(2, 0, -1), axis=1)
sample("Gather", X, np.array(1), axis=2)
sample("Gather", X, WHOLE[:1] % 4, axis=1)
sample("GatherElements", SMALL, np.array([[0, 1, 2, -1]]), axis=0)
sample("Expand", SMALL, ints(2, 3, 1))
sample("Tile", SMALL, ints(2, 3))
sample("Pad", X, ints(0, 0, 1, 2, 0, 0, 0, 1))
sample("Pad", X, ints(0, 0, 1, 2, 0, 0, 0, 1), np.float32(0.5))
sample("Pad", X, ints(0, 0, 1, 2, 0, 0, 3, 1), mode="reflect")
sample("Pad", X, ints(0, 0, 1, 2, 0, 0, 3, 1), mode="edge")
sample("Pad", X, ints(1, -2, 2, 1), np.float32(0), ints(2, 3), opset=18)
sample("Pad", X, opset=9, pads=[0, 0, 1, 2, 0, 0, 0, 1], value=0.5)
sample("DepthToSpace", normal(1, 8, 2, 3), blocksize=2)
sample("DepthToSpace", normal(1, 8, 2, 3), blocksize=2, mode="CRD")
sample("SpaceToDepth", normal(1, 2, 4, 6), blocksize=2)
sample("Trilu", normal(4, 4))
sample("Trilu", normal(4, 4), np.array(1), upper=0)
for name in (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceSumSquare",
    "ReduceProd",
):
    sample(name, SMALL, axes=[1])
    sample(name, SMALL, ints(-1), opset=18, keepdims=0)
sample("ReduceLogSum", POSITIVE, axes=[1])
sample("ReduceSum", X, ints(2, 3))
sample("ReduceSum", X)
sample("ReduceSum", X, noop_with_empty_axes=1)
sample("ReduceSum", X, opset=11, axes=[1], keepdims=0)
sample("ReduceMean", X)
sample("ArgMax", X, axis=1)
sample("ArgMin", X, axis=1, keepdims=0)
sample("TopK", SMALL, ints(2), outputs=2)
sample("TopK", SMALL, ints(2), outputs=2, axis=0, largest=0)
sample("TopK", np.array([[1, 3, 3, 1, 3]], dtype=np.float32), ints(4), outputs=2)
sample("CumSum", SMALL, np.array(1))
for opset in (11, 17):
    sample("Softmax", X, opset=opset)
    sample("Softmax", X, opset=opset, axis=1)
    sample("LogSoftmax", X, opset=opset, axis=-1)
sample("MatMul", X, normal(6, 3, seed=1))
sample("Gemm", SMALL, normal(4, 5, seed=1))
sample("Gemm", SMALL, normal(5, 4, seed=1), normal(5, seed=2), transB=1)
sample("Gemm", SMALL, normal(3, 5, seed=1), normal(4, 1, seed=2), transA=1, alpha=0.5, beta=2.0)
sample("Conv", X, normal(3, 4, 3, 3, seed=1), normal(3, seed=2))
sample("Conv", X, normal(4, 2, 3, 3, seed=1), group=2, pads=[1, 1, 1, 1], strides=[2, 1], dilations=[1, 2])
sample("Conv", X, normal(3, 4, 3, 3, seed=1), pads=[0, 1, 2, 0])
sample("Conv", X, normal(3, 4, 2, 3, seed=1), auto_pad="SAME_UPPER", strides=[2, 2])
sample("Conv", X, normal(3, 4, 2, 3, seed=1), auto_pad="SAME_LOWER")
sample("Conv", X[:, :, 0], normal(3, 4, 2, seed=1))
sample("Conv", normal(1, 2, 4, 4, 4), normal(3, 2, 2, 2, 2, seed=1))
sample("ConvTranspose", X, normal(4, 3, 3, 3, seed=1), normal(3, seed=2))
sample("ConvTranspose", X, normal(4, 2, 2, 2, seed=1), group=2, strides=[2, 2], pads=[1, 0, 1, 0], output_padding=[1, 1])
sample("ConvTranspose", X, normal(4, 3, 3, 3, seed=1), strides=[2, 2], pads=[1, 0, 0, 1])
sample("Einsum", SMALL, normal(4, 5, seed=1), equation="ij,jk->ki")
sample("MaxPool", X, kernel_shape=[2, 3])
sample("MaxPool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)
sample("MaxPool", X, kernel_shape=[2, 2], pads=[0, 1, 1, 0], dilations=[2, 1])
sample("MaxPool", X, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER")
sample("AveragePool", X, kernel_shape=[2, 3], strides=[2, 1])
sample("AveragePool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
sample("AveragePool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
sample("AveragePool", X, kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1)
sample("AveragePool", X[:, :, 0], kernel_shape=[2])
sample("GlobalAveragePool", X)
sample("GlobalMaxPool", X)
STATISTICS = normal(4, seed=1), normal(4, seed=2), normal(4, seed=3), np.abs(normal(4, seed=4))
sample("BatchNormalization", X, *STATISTICS, epsilon=1e-3)
sample("BatchNormalization", X, *STATISTICS, opset=8, spatial=1)
sample("InstanceNormalization", X, *STATISTICS[:2])
sample("LayerNormalization", X, normal(6, seed=1), normal(6, seed=2))
sample("LayerNormalization", X, normal(5, 6, seed=1), axis=2, epsilon=1e-2)
sample("GroupNormalization", X, *STATISTICS[:2], opset=21, num_groups=2)
for coordinates in ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"):
    for mode in ("nearest", "linear"):
        kind = {"coordinate_transformation_mode": coordinates, "mode": mode}
        sample("Resize", X, None, np.array([1, 1, 2, 1.5], dtype=np.float32), **kind)
        sample("Resize", X, None, None, ints(2, 4, 3, 8), **kind)
for rounding in ("floor", "ceil", "round_prefer_ceil"):
    sample("Resize", X, None, np.array([1, 1, 2, 0.5], dtype=np.float32), nearest_mode=rounding)
for rounding in ("floor", "round_prefer_floor"):  # with places that are halves and whole numbers in single precision only
    sample("Resize", normal(1, 2, 5, 7), None, np.array([1, 1, 0.6, 1.3], dtype=np.float32), nearest_mode=rounding)
sample("Resize", X, np.array([1, 1, 2, 2], dtype=np.float32), opset=10, mode="nearest")
sample("Resize", X, np.array([1, 1, 0.6, 1.3], dtype=np.float32), opset=10, mode="nearest")
sample("Upsample", X, np.array([1, 1, 2, 3], dtype=np.float32), opset=9, mode="linear")
sample("Upsample", X, opset=7, scales=[1.0, 1.0, 2.0, 2.0])


def recurrent(name, gates, directions, cells, biased=True, **attributes):
    width, weights = 3, [normal(directions, gates * 3, 4, seed=1), normal(directions, gates * 3, 3, seed=2)]
    states = [normal(directions, 2, width, seed=4 + place) for place in range(cells)]
    bias = normal(directions, 2 * gates * width, seed=3) if biased else None
    given = [normal(5, 2, 4), *weights, bias, None, *states]
    sample(name, *given, outputs=3 if name == "LSTM" else 2, hidden_size=width, **attributes)


recurrent("LSTM", 4, 1, 2)
recurrent("LSTM", 4, 1, 0, biased=False, direction="reverse")
recurrent("LSTM", 4, 2, 2, direction="bidirectional")
recurrent("GRU", 3, 1, 1, linear_before_reset=1)
recurrent("GRU", 3, 2, 0, biased=False, direction="bidirectional", linear_before_reset=1)
recurrent("RNN", 1, 1, 1)
recurrent("RNN", 1, 2, 1, direction="bidirectional", activations=["Relu", "Relu"])


def evaluated(folder, operator, inputs, opset, outputs, attributes):
    """What PyTorch and onnxruntime make of one node, and the node as it was read."""
    settings = TABLE[operator].settings if operator in TABLE else frozenset()
    named = {f"i{place}": value for place, value in enumerate(inputs) if value is not None}
    fed = {name: value for name, value in named.items() if int(name[1:]) not in settings}
    names = [f"i{place}" if value is not None else "" for place, value in enumerate(inputs)]
    results = [f"o{place}" for place in range(outputs)]
    node = helper.make_node(operator, names, results, **attributes)
    values = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in fed.items()]
    rest = {name: value for name, value in named.items() if name not in fed}
    made = model([node], values, [helper.make_empty_tensor_value_info(name) for name in results], rest, opset)
    if opset > 17:
        made.ir_version = 10
    path = save(made, folder / "node.onnx")
    module = OnnxModule(stored(path)).eval()
    found = module(*(torch.tensor(value) for value in fed.values()))
    found = found if isinstance(found, tuple) else (found,)
    (read,) = (part for part in module.modules() if isinstance(part, Node))
    return found, run(path, *fed.values()), read


@pytest.mark.parametrize(("operator", "inputs", "opset", "outputs", "attributes"), SAMPLES)
def test_against_onnxruntime(tmp_path, operator, inputs, opset, outputs, attributes):
    inputs = [np.asarray(value) if value is not None else None for value in inputs]
    found, wanted, node = evaluated(tmp_path, operator, inputs, opset, outputs, attributes)
    assert not node.unread
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert tuple(one.shape) == other.shape
        assert str(one.dtype).removeprefix("torch.") == str(other.dtype)
        np.testing.assert_allclose(one.numpy(), other, rtol=2e-5, atol=2e-6)  # one node in float32, summed in another order


def test_every_operator_has_a_sample():
    assert {parameter.values[0] for parameter in SAMPLES} == set(TABLE)


UNREAD = [
    ("Resize", (X, None, np.array([1, 1, 2, 2], dtype=np.float32)), 17, {"mode": "cubic"}),
    ("MaxPool", (X,), 17, {"kernel_shape": [2, 2], "outputs": 2}),
    ("GRU", (normal(5, 2, 4), normal(1, 9, 4, seed=1), normal(1, 9, 3, seed=2)), 17, {"hidden_size": 3, "outputs": 2}),
    ("LRN", (X,), 17, {"size": 3}),
    ("Resize", (X, None, np.array([1, 1, 0.7, 1], dtype=np.float32)), 17, {"coordinate_transformation_mode": "align_corners"}),
    ("ReduceMax", (np.zeros((2, 0), np.float32),), 17, {"axes": [1]}),
    ("CumSum", (SMALL, np.array(1)), 17, {"reverse": 1}),
    ("LpPool", (X,), 17, {"kernel_shape": [2, 2]}),
    ("TopK", (normal(2, 4), np.array([2])), 17, {"sorted": 0, "outputs": 2}),
]


@pytest.mark.parametrize(("operator", "inputs", "opset", "attributes"), UNREAD, ids=[entry[0] for entry in UNREAD])
def test_what_is_not_read_runs_as_a_whole(tmp_path, operator, inputs, opset, attributes):
    attributes = dict(attributes)
    found, wanted, node = evaluated(tmp_path, operator, inputs, opset, attributes.pop("outputs", 1), attributes)
    assert node.unread
    assert node.opaque.has_run
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


def test_sizes_are_numbers(tmp_path):
    nodes = [helper.make_node("Shape", ["x"], ["s"], start=1), helper.make_node("Size", ["x"], ["n"])]
    path = save(model(nodes, [info("x", [2, 3, 4])], [info("s", [2], "l"), info("n", [], "l")]), tmp_path / "sizes.onnx")
    shape, size = OnnxModule(stored(path))(torch.zeros(2, 3, 4))
    assert (shape.tolist(), size.item()) == ([3, 4], 24)
