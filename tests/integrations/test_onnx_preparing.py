"""ONNX graphs prepared for quantization: folding and freeing are exact, what cannot be done is left, bounds go back."""
# ruff: noqa: E402 -- what is imported here depends on what is installed

import copy
import math

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import helper, numpy_helper
from onnx_graphs import info, model, normal, run, save

import equinorm
from equinorm.integrations.onnx import OnnxError, read, write, writing


def node(*arguments, **attributes):
    return helper.make_node(*arguments, **attributes)


def apart(path, other, *values):
    """Largest relative difference of two files in onnxruntime."""
    pairs = zip(run(path, *values), run(other, *values), strict=True)
    return max(np.abs(one - two).max() / np.abs(two).max() for one, two in pairs)


def statistics(name, count, dtype=np.float32, seed=0):
    parts = {part: normal(count, seed=seed + place, dtype=dtype) for place, part in enumerate(("gain", "shift", "mean", "var"))}
    parts |= {"gain": 1 + np.abs(parts["gain"]), "var": 0.5 + np.abs(parts["var"])}
    return {f"{name}.{part}": array for part, array in parts.items()}


def norm(name, given, made, **attributes):
    parts = [f"{name}.{part}" for part in ("gain", "shift", "mean", "var")]
    return node("BatchNormalization", [given, *parts], [made], name, **attributes)


def layers():
    """A convolution without and one with a bias, a transposed one in groups, and Gemm either way, each with a normalization."""
    nodes = [
        node("Conv", ["x", "a.weight"], ["a"], "a"), norm("n1", "a", "b"), node("Clip", ["b", "zero", "six"], ["c"], "c1"),
        node("Conv", ["c", "d.weight", "d.bias"], ["d"], "d"), norm("n2", "d", "e", epsilon=0.1),
        node("Clip", ["e", "zero", "six"], ["f"]),
        node("ConvTranspose", ["f", "g.weight"], ["g"], "g", group=2), norm("n3", "g", "h"),
        node("Clip", ["h", "", "six"], ["i"], "i"), node("GlobalAveragePool", ["i"], ["j"]), node("Flatten", ["j"], ["k"]),
        node("Gemm", ["k", "l.weight", "l.bias"], ["l"], "l"), norm("n4", "l", "m"),
        node("Clip", ["m", "low"], ["n"], "n"), node("Gemm", ["n", "o.weight"], ["o"], "o", transB=1), norm("n5", "o", "y"),
    ]  # fmt: skip
    stored = {
        "a.weight": normal(6, 3, 3, 3, seed=1), "d.weight": normal(4, 6, 1, 1, seed=2), "d.bias": normal(4, seed=3),
        "g.weight": normal(4, 3, 2, 2, seed=4), "l.weight": normal(6, 5, seed=5), "l.bias": normal(5, seed=6),
        "o.weight": normal(3, 5, seed=7), "zero": np.float32(0), "six": np.float32(2), "low": np.float32(-0.5),
        **statistics("n1", 6), **statistics("n2", 4, seed=9), **statistics("n3", 6, seed=19), **statistics("n4", 5, seed=29),
        **statistics("n5", 3, seed=39),
    }  # fmt: skip
    return model(nodes, [info("x", ["N", 3, 8, 8])], [info("y", ["N", 3])], stored)


@pytest.fixture
def images():
    return 2 * normal(5, 3, 8, 8, seed=9)


def test_every_layer_and_every_bound(tmp_path, images):
    path = save(layers(), tmp_path / "in.onnx")
    file = read(path, {"x": torch.from_numpy(images)}, fold=True, free=True)
    found = file.preparation
    assert dict(found.folded) == {"n1": "a", "n2": "d", "n3": "g", "n4": "l", "n5": "o"}
    assert dict(found.freed) == {"c1": 6, "f": 4, "i": 6, "n": 5}
    assert not found.left
    assert found.deviation <= 1e-6  # folded weights are stored in single precision
    symmetries = equinorm.symmetries(file.module, file.args)
    assert symmetries.num_free == 6 + 4 + 6 + 5
    assert equinorm.symmetries(read(path).module, read(path).args).num_free < 21
    wide = copy.deepcopy(file.module).double()
    moved = copy.deepcopy(wide)
    logs = torch.randn(21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    equinorm.symmetries(moved, (file.args[0].double(),)).rescale_(logs)
    assert equinorm.deviation(moved, wide, (file.args[0].double(),)) <= 1e-12
    symmetries.rescale_(logs)
    assert write(file.module, tmp_path / "out.onnx", file.args) <= 1e-5
    written = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert apart(tmp_path / "out.onnx", path, -images) <= 1e-5
    kinds = [part.op_type for part in written.graph.node]
    assert kinds[:8] == ["Conv", "Clip", "Min", "Conv", "Clip", "Min", "ConvTranspose", "Min"]
    numbers = {proto.name: numpy_helper.to_array(proto) for proto in written.graph.initializer}
    for clip, least in zip(written.graph.node[1:5:3], written.graph.node[2:6:3], strict=True):
        assert [numbers[name] for name in clip.input[1:]] == [0, numbers[least.input[1]].max()], "all that passes, no more"
    assert "Max" in kinds
    assert "BatchNormalization" not in kinds
    names = {proto.name for proto in written.graph.initializer}
    assert {"a.weight", "a.bias", "d.bias", "g.bias", "o.bias", "c1.upper", "n.lower"} <= names
    assert not {"six", "zero", "n1.gain", "n5.var"} & names
    made = {name for part in written.graph.node for name in part.output}
    assert {"b", "c", "e", "f", "h", "i", "m", "n", "y"} <= made, "values keep their names"
    assert [(entry.key, entry.value) for entry in written.metadata_props] == [("made for", "tests")]


def test_the_file_is_exact_in_double_precision_and_bitwise_for_powers_of_two(tmp_path):
    stored = {"w": normal(4, 5, dtype=np.float64), "v": normal(5, 3, seed=1, dtype=np.float64), "low": -0.5, "high": 0.75}
    nodes = [node("Gemm", ["x", "w"], ["a"]), norm("n", "a", "b"), node("Clip", ["b", "low", "high"], ["c"], "c"),
             node("Gemm", ["c", "v"], ["y"])]  # fmt: skip
    numbers = {**stored, **statistics("n", 5, np.float64)}
    path = save(model(nodes, [info("x", [7, 4], "d")], [info("y", [7, 3], "d")], numbers), tmp_path / "in.onnx")
    file = read(path, fold=True, free=True)
    assert file.preparation.deviation <= 1e-15
    equinorm.symmetries(file.module, file.args).rescale_(torch.randn(5, dtype=torch.float64))
    assert write(file.module, tmp_path / "out.onnx", file.args) <= 1e-12
    file = read(path, free=True)
    symmetries = equinorm.symmetries(file.module, file.args)
    symmetries.rescale_(torch.tensor([1.0, -2, 2, 0, -1], dtype=torch.float64) * math.log(2))
    assert symmetries.num_free == 5
    assert write(file.module, tmp_path / "twos.onnx", file.args) == 0.0
    assert [part.op_type for part in onnx.load(tmp_path / "twos.onnx").graph.node] == [
        "Gemm",
        "BatchNormalization",
        "Max",
        "Min",
        "Gemm",
    ]


def test_bounds_that_stay_equal_go_back(tmp_path, images):
    path = save(layers(), tmp_path / "in.onnx")
    file = read(path, {"x": torch.from_numpy(images)}, free=True)
    assert write(file.module, tmp_path / "same.onnx", file.args) == 0.0
    same, before = (onnx.load(place).graph for place in (tmp_path / "same.onnx", path))
    assert [part.SerializeToString() for part in same.node] == [part.SerializeToString() for part in before.node]
    assert {proto.name for proto in same.initializer} == {proto.name for proto in before.initializer}
    symmetries = equinorm.symmetries(file.module, file.args)
    scales = torch.zeros(symmetries.num_free)
    free = {scaling.name: scaling for scaling in symmetries.scalings if scaling.factors}
    scales[free["c1.upper"].factors[0][1].flatten() - 1] = math.log(4)  # all bounds of one Clip alike
    symmetries.rescale_(scales)
    assert write(file.module, tmp_path / "alike.onnx", file.args) == 0.0
    alike = onnx.load(tmp_path / "alike.onnx").graph
    (clip,) = [part for part in alike.node if part.name == "c1"]
    numbers = {proto.name: numpy_helper.to_array(proto) for proto in alike.initializer}
    assert [float(numbers[name]) if name else None for name in clip.input[1:]] == [0.0, 8.0]
    assert float(numbers["six"]) == 2.0, "others read it"


def test_bounds_that_are_attributes(tmp_path):
    nodes = [
        node("Gemm", ["x", "w", "b"], ["a"]),
        node("Clip", ["a"], ["c"], "c", min=0.0, max=0.5),
        node("Gemm", ["c", "v", "u"], ["y"]),
    ]
    stored = {"w": normal(4, 5), "b": normal(5, seed=3), "v": normal(5, 3, seed=1), "u": normal(3, seed=4)}
    for version, freed in ((9, {"c": 5}), (7, {})):
        made = model(nodes, [info("x", [7, 4])], [info("y", [7, 3])], stored, opset=version)
        file = read(save(made, tmp_path / f"{version}.onnx"), fold=True, free=True)
        assert dict(file.preparation.freed) == freed
        if not freed:
            assert file.preparation.left == {"c": "bounds by channel need version 8 of ONNX's operators"}
            continue
        equinorm.symmetries(file.module, file.args).rescale_(torch.full((5,), math.log(2)))
        assert write(file.module, tmp_path / "out.onnx", file.args) == 0.0
        (clip,) = [part for part in onnx.load(tmp_path / "out.onnx").graph.node if part.op_type == "Clip"]
        assert {attribute.name: attribute.f for attribute in clip.attribute} == {"min": 0.0, "max": 1.0}


def left(tmp_path, change):
    """What is left of a graph after a change."""
    made = layers()
    nodes, graph = {part.name: part for part in made.graph.node if part.name}, made.graph
    change(nodes, graph)
    (tmp_path / "in.onnx").unlink(missing_ok=True)
    file = read(save(made, tmp_path / "in.onnx"), {"x": torch.from_numpy(2 * normal(5, 3, 8, 8, seed=9))}, fold=True, free=True)
    symmetries = equinorm.symmetries(file.module, file.args)
    symmetries.rescale_(torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    (tmp_path / "out.onnx").unlink(missing_ok=True)
    assert write(file.module, tmp_path / "out.onnx", file.args) <= 1e-5
    return dict(file.preparation.left)


def test_what_is_left_and_why(tmp_path):
    def read_twice(nodes, graph):
        graph.output.append(info("a", ["N", 6, 6, 6]))

    def shared(nodes, graph):
        graph.node.append(node("Conv", ["x", "a.weight"], ["again"]))
        graph.output.append(info("again", ["N", 6, 6, 6]))

    def behind_a_sum(nodes, graph):
        graph.node.insert(1, node("Add", ["a", "a"], ["aa"]))
        nodes["n1"].input[0] = "aa"

    def times(nodes, graph):
        nodes["l"].attribute.append(helper.make_attribute("alpha", 2.0))

    def fed(nodes, graph):
        graph.input.append(info("n2.gain", [4]))
        graph.input.append(info("six", []))

    def gated(nodes, graph):
        graph.node.append(node("Sigmoid", ["c"], ["gate"]))
        graph.output.append(info("gate", ["N", 6, 6, 6]))

    def one_bias_for_all(nodes, graph):
        graph.initializer.append(numpy_helper.from_array(normal(1), "few"))
        nodes["l"].input[2] = "few"

    assert left(tmp_path, one_bias_for_all)["n4"] == "the bias of l is one number for several channels"
    assert left(tmp_path, read_twice)["n1"] == "more than one reads a, in front of it"
    assert left(tmp_path, shared)["n1"] == "a.weight of a is computed, shared, or an input of the model"
    assert left(tmp_path, behind_a_sum)["n1"] == "Add stands in front of it, not a layer"
    assert left(tmp_path, times)["n4"] == "the Gemm in front multiplies by further numbers"
    assert left(tmp_path, fed) == {"n2": "its numbers are computed, or inputs of the model"}
    assert left(tmp_path, gated) == {"c1": "nothing that it bounds can scale"}


def test_new_names_are_new_inside_of_branches_too(tmp_path):
    def branched(nodes, graph):
        bodies = {
            key: helper.make_graph([node("Identity", ["j"], [name]), node("Relu", [name], [key])], key, [], [info(key, None)])
            for key, name in (("then_branch", "a.bias"), ("else_branch", "o_bias"))
        }
        every = [*graph.node]
        place = next(number for number, part in enumerate(every) if part.op_type == "Flatten")
        every[place].input[0] = "branched"
        added = [
            node("Size", ["j"], ["size"]),
            node("Cast", ["size"], ["is"], to=9),
            node("If", ["is"], ["branched"], **bodies),
        ]
        del graph.node[:]
        graph.node.extend([*every[:place], *added, *every[place:]])

    assert left(tmp_path, branched) == {}
    assert "a.bias_1" in {proto.name for proto in onnx.load(str(tmp_path / "out.onnx")).graph.initializer}


def test_weights_outside_of_the_file(tmp_path, images):
    path = tmp_path / "in.onnx"
    onnx.save(layers(), str(path), save_as_external_data=True, location="numbers.bin", size_threshold=0)
    file = read(path, {"x": torch.from_numpy(images)}, fold=True, free=True)
    symmetries = equinorm.symmetries(file.module, file.args)
    symmetries.rescale_(torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(0)))
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "out.onnx"
    assert write(file.module, out, file.args) <= 1e-5
    assert apart(out, path, images) <= 1e-5
    held = {proto.name: proto.data_location for proto in onnx.load(str(out), load_external_data=False).graph.initializer}
    assert held["a.weight"] == held["l.weight"] == onnx.TensorProto.EXTERNAL, "folded weights stay outside"
    assert {entry.name for entry in out.parent.iterdir()} == {"out.onnx", "out.onnx.data"}


def test_equalized_files_gain_what_modules_gain(tmp_path):
    """The same network as a module and as a file."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU6(), torch.nn.Conv2d(6, 4, 1), torch.nn.Flatten(),
        torch.nn.Linear(144, 3),
    ).eval()  # fmt: skip
    sizes = torch.logspace(-2, 0.3, 6)
    for tensor in (net[1].weight, net[1].bias):
        tensor.data.mul_(sizes)
    net[3].weight.data.div_(sizes[:, None, None])
    x = 2 * torch.randn(32, 3, 8, 8)
    numbers = {name: tensor.numpy() for name, tensor in net.state_dict().items() if tensor.dim()}
    nodes = [
        node("Conv", ["x", "0.weight", "0.bias"], ["a"]),
        node("BatchNormalization", ["a", "1.weight", "1.bias", "1.running_mean", "1.running_var"], ["b"]),
        node("Clip", ["b", "zero", "six"], ["c"]), node("Conv", ["c", "3.weight", "3.bias"], ["d"]),
        node("Flatten", ["d"], ["e"]), node("Gemm", ["e", "5.weight", "5.bias"], ["y"], transB=1),
    ]  # fmt: skip
    stored = {**numbers, "zero": np.float32(0), "six": np.float32(6)}
    path = save(model(nodes, [info("x", ["N", 3, 8, 8])], [info("y", ["N", 3])], stored), tmp_path / "in.onnx")
    file = read(path, {"x": x}, fold=True, free=True)
    of_file = equinorm.equalize_(file.module, file.args, calibration=[(x,)], scheme="w8a8-tensor")
    of_module = equinorm.equalize(net, (x,), calibration=[(x,)], scheme="w8a8-tensor")
    assert of_file.measured_before == pytest.approx(of_module.measured_before, abs=0.5)
    assert of_file.measured_after == pytest.approx(of_module.measured_after, abs=0.5)
    assert of_file.measured_after > of_file.measured_before + 3
    assert write(file.module, tmp_path / "out.onnx", file.args) <= 1e-5


def test_only_clips_that_are_named_are_set_free(tmp_path, images):
    path = save(layers(), tmp_path / "in.onnx")
    file = read(path, {"x": torch.from_numpy(images)}, free=["c*", "n"])
    assert dict(file.preparation.freed) == {"c1": 6, "n": 5}
    assert file.preparation.left == {"f": "it is not among those that were named", "i": "it is not among those that were named"}
    assert dict(read(path, free=["nodes.c1"]).preparation.freed) == {"c1": 6}, "as inspect names them"
    with pytest.raises(OnnxError, match=r"free='six' is the name of no bounded activation\. These are c1, f, i, n"):
        read(path, free="six")


def test_products_with_weights_are_rounded_points(tmp_path):
    nodes = [node("Gemm", ["x", "w", "b"], ["a"]), node("Relu", ["a"], ["r"]), node("MatMul", ["r", "v"], ["y"])]
    stored = {"w": normal(6, 16), "b": normal(16, seed=1), "v": normal(16, 3, seed=2)}
    path = save(model(nodes, [info("x", ["N", 6])], [info("y", ["N", 3])], stored), tmp_path / "in.onnx")
    x = torch.from_numpy(normal(32, 6, seed=3))
    file = read(path, {"x": x})
    equinorm.symmetries(file.module, file.args).rescale_(1.5 * torch.randn(16, generator=torch.Generator().manual_seed(0)))
    found = equinorm.equalize_(file.module, file.args, calibration=[(x,)], scheme="w8a8-tensor")
    assert {point.weight for point in found.points} == {"w", "v"}
    assert found.measured_after > found.measured_before + 6


def test_what_would_be_too_large_is_not_written(tmp_path, monkeypatch):
    path = save(layers(), tmp_path / "in.onnx")
    file = read(path, fold=True)
    monkeypatch.setattr(writing, "LARGEST", 1000)
    with pytest.raises(OnnxError, match=r"has more than 1,000 bytes, which no ONNX file holds\. Nothing was written"):
        write(file.module, tmp_path / "out.onnx", file.args)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.onnx"]
