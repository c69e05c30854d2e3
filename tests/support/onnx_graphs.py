"""Small ONNX graphs, built node by node, and what onnxruntime makes of them."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

DTYPES = {"f": TensorProto.FLOAT, "d": TensorProto.DOUBLE, "e": TensorProto.FLOAT16, "l": TensorProto.INT64}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def info(name, shape, dtype="f"):
    return helper.make_tensor_value_info(name, DTYPES[dtype], shape)


def model(nodes, inputs, outputs, stored=(), opset=17, **more):
    """A model of these nodes; `stored` are initializers by name, arrays or TensorProtos."""
    protos = [v if isinstance(v, TensorProto) else numpy_helper.from_array(np.asarray(v), k) for k, v in dict(stored).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, protos)
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="tests", **{"ir_version": 8, **more}
    )
    helper.set_model_props(made, {"made for": "tests"})
    return made


def save(made, path):
    Path(path).write_bytes(made.SerializeToString())
    return Path(path)


def run(path, *values):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([item.name for item in session.get_inputs()], values, strict=True)))


def without_numbers(path):
    """A file's bytes with all weights emptied: what must stay when only weights change."""
    made = onnx.load(str(path), load_external_data=False)
    _empty(made.graph)
    return made.SerializeToString()


def _empty(graph):
    protos = [attribute.t for node in graph.node if node.op_type == "Constant" for attribute in node.attribute]
    for proto in (*graph.initializer, *protos):
        if proto.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            for field in ("raw_data", "float_data", "double_data", "int32_data", "external_data"):
                proto.ClearField(field)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _empty(attribute.g)


def mobile(biased=True, opset=17):
    """Conv, batch normalization, ReLU, a depthwise convolution, ReLU6 by Clip, a gate, pooling, Gemm."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "stem.weight", "stem.bias"], ["a"], "stem", pads=[1] * 4, strides=[2, 2]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "next.weight"], ["c"], "/next/Conv"),
        node("BatchNormalization", ["c", "bn.gain", "bn.shift", "bn.mean", "bn.var"], ["d"], "bn"),
        node("LeakyRelu", ["d"], ["e"], alpha=0.1),
        node("Conv", ["e", "deep.weight"], ["f"], "deep", group=8, pads=[1] * 4),
        node("Relu", ["f"], ["g"]),
        node("GlobalAveragePool", ["g"], ["h"]),
        node("HardSigmoid", ["h"], ["i"]),
        node("Mul", ["g", "i"], ["j"]),
        node("Conv", ["j", "last.weight"], ["k"], "last"),
        node("Clip", ["k", "zero", "six"], ["l"]),
        node("Shape", ["l"], ["size"]),
        node("Slice", ["size", "start", "end"], ["batch"]),
        node("Concat", ["batch", "rest"], ["shape"], axis=0),
        node("Reshape", ["l", "shape"], ["m"]),
        node("Gemm", ["m", "fc.weight", "fc.bias"], ["n"], "fc", transB=1),
        node("Relu", ["n"], ["o"]),
        node("MatMul", ["o", "out.weight"], ["y"], "out"),
    ]
    stored = {
        "stem.weight": normal(6, 3, 3, 3, seed=1), "stem.bias": normal(6, seed=2), "next.weight": normal(8, 6, 1, 1, seed=3),
        "bn.gain": np.abs(normal(8, seed=4)), "bn.shift": normal(8, seed=5), "bn.mean": normal(8, seed=6),
        "bn.var": np.abs(normal(8, seed=7)) + 0.5, "deep.weight": normal(8, 1, 3, 3, seed=8),
        "last.weight": normal(4, 8, 1, 1, seed=9), "zero": np.float32(0), "six": np.float32(6), "start": np.array([0]),
        "end": np.array([1]), "rest": np.array([-1]), "fc.weight": normal(5, 64, seed=10), "fc.bias": normal(5, seed=11),
        "out.weight": normal(5, 2, seed=12),
    }  # fmt: skip
    return model(nodes, [info("x", ["N", 3, 8, 8])], [info("y", ["N", 2])], stored, opset)
