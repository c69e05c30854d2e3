"""Numbers outside of an ONNX file: read wherever onnxruntime reads them, or refused in a sentence."""
# ruff: noqa: E402 -- what is imported here depends on what is installed

import os

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import info, model, normal, run, save

import equinorm
from equinorm.integrations.onnx import OnnxError, read, write
from equinorm.reporting.files import OutputError

SIZES = {"one": ((), 1), "first": (1, 0)}
NUMBERS = {"w": normal(3, 4, seed=1), "v": normal(4, 2, seed=2)}


def outside(folder, places, gap=0):
    """A file whose tensors lie at these places, with bytes in front that belong to nothing."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["r"])]
    nodes.append(helper.make_node("MatMul", ["r", "v"], ["y"]))
    protos = {}
    for name, place in places.items():
        where = folder / place
        where.parent.mkdir(exist_ok=True)
        with open(where, "ab") as stream:
            stream.write(bytes(gap))
            entries = {"location": place, "offset": stream.tell(), "length": NUMBERS[name].nbytes}
            stream.write(NUMBERS[name].tobytes())
        proto = TensorProto(name=name, data_type=1, dims=NUMBERS[name].shape, data_location=TensorProto.EXTERNAL)
        for key, value in entries.items():
            entry = proto.external_data.add()
            entry.key, entry.value = key, str(value)
        protos[name] = proto
    made = model(nodes, [info("x", [2, 3])], [info("y", [2, 2])], NUMBERS | protos)
    return save(made, folder / "model.onnx")


def moved(path, out):
    """Move it by powers of two; what is written is bitwise the same."""
    file = read(path)
    symmetries = equinorm.symmetries(file.module, file.args)
    assert symmetries.num_free == 4
    symmetries.rescale_(torch.arange(4, dtype=torch.float64) * np.log(2))
    assert write(file.module, out, file.args) == 0.0
    assert np.array_equal(run(path, normal(2, 3, seed=3))[0], run(out, normal(2, 3, seed=3))[0])


@pytest.mark.parametrize("places", [{"w": "a.bin", "v": "b.bin"}, {"w": "in/a.bin", "v": "in/a.bin"}, {"v": "./a.bin"}])
@pytest.mark.parametrize("gap", [0, 7])
def test_several_files_and_offsets(tmp_path, places, gap):
    moved(outside(tmp_path, places, gap), tmp_path / "out.onnx")


@pytest.mark.parametrize("kind", ["Loop", "function"])
def test_numbers_within_nodes(tmp_path, kind):
    """Those of a body that runs as a whole, and those of a function, come along into another folder."""
    node = helper.make_node
    made = onnx.load(str(outside(tmp_path, {"w": "a.bin", "v": "a.bin"})), load_external_data=False)
    constant = node("Constant", [], ["k"], value=TensorProto(data_type=1, dims=[4, 2], data_location=TensorProto.EXTERNAL))
    (tmp_path / "more.bin").write_bytes(NUMBERS["v"].tobytes())
    entry = constant.attribute[0].t.external_data.add()
    entry.key, entry.value = "location", "more.bin"
    if kind == "function":
        body = [constant, node("MatMul", ["r", "k"], ["m"])]
        made.functions.append(helper.make_function("own", "F", ["r"], ["m"], body, [helper.make_opsetid("", 17)]))
        made.opset_import.append(helper.make_opsetid("own", 1))
        made.graph.node.insert(2, node("F", ["r"], ["m"], domain="own"))
    else:
        go = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "on")]
        nodes = [node("Identity", ["go"], ["on"]), constant, node("MatMul", ["r", "k"], ["made"])]
        body = helper.make_graph(nodes, "body", [info("i", [], "l"), go[0]], [go[1], info("made", [2, 2])])
        made.graph.node.insert(2, node("Loop", ["one", ""], ["ms"], body=body))
        made.graph.node.insert(3, node("Squeeze", ["ms", "first"], ["m"]))
        made.graph.initializer.extend(numpy_helper.from_array(np.full(*size), name) for name, size in SIZES.items())
    made.graph.node[-1].output[0] = "n"
    made.graph.node.append(node("Add", ["m", "n"], ["y"]))
    path = save(made, tmp_path / "model.onnx")
    (tmp_path / "there").mkdir()
    file = read(path)
    assert write(file.module, tmp_path / "there" / "out.onnx", file.args) == 0.0
    x = normal(2, 3, seed=3)
    assert np.array_equal(run(path, x)[0], run(tmp_path / "there" / "out.onnx", x)[0])


def test_a_cache_of_links(tmp_path):
    """As Hugging Face keeps files: content under one folder, names that lead to it under another."""
    blobs, names = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, names):
        folder.mkdir()
    outside(blobs, {"w": "model.onnx_data", "v": "model.onnx_data"})
    for number, name in enumerate(("model.onnx", "model.onnx_data")):
        (blobs / name).rename(blobs / f"{number}")
        (names / name).symlink_to(f"../blobs/{number}")
    moved(names / "model.onnx", tmp_path / "out.onnx")


def test_links_to_numbers(tmp_path):
    path = outside(tmp_path, {"w": "a.bin", "v": "b.bin"})
    (tmp_path / "real").mkdir()
    (tmp_path / "a.bin").rename(tmp_path / "real" / "a.bin")
    (tmp_path / "a.bin").symlink_to("real/a.bin")
    os.link(tmp_path / "b.bin", tmp_path / "same.bin")
    moved(path, tmp_path / "out.onnx")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "model.onnx").symlink_to("../model.onnx")
    with pytest.raises(OnnxError, match=r"no such file. Put it there, or name the file that this link leads to"):
        read(tmp_path / "link" / "model.onnx")


def test_numbers_that_are_not_where_they_should_be(tmp_path):
    def refusal(match, place="a.bin"):
        with pytest.raises(OnnxError, match=rf"cannot read the tensor 'w' of .*model.onnx: {match}"):
            read(path)

    path = outside(tmp_path, {"w": "a.bin", "v": "b.bin"})
    (tmp_path / "a.bin").write_bytes(bytes(47))
    refusal(r"its 48 bytes from 0 on are not in .*a.bin, which has 47. That file is cut off")
    (tmp_path / "a.bin").unlink()
    refusal(r"its numbers should lie in .*a.bin, and there is no such file. Put it there\.")
    (tmp_path / "a.bin").mkdir()
    refusal(r"its numbers should lie in .*a.bin, and there is no such file")
    made = onnx.load(str(path), load_external_data=False)
    for location in ("../a.bin", str(tmp_path / "b.bin")):
        made.graph.initializer[0].external_data[0].value = location
        save(made, path)
        refusal("its numbers lie in .*, outside of the model's folder, where onnxruntime reads none")
    del made.graph.initializer[0].external_data[:]
    save(made, path)
    refusal("its numbers are external, and no file is named")


def test_a_link_that_leads_nowhere_is_not_written_through(tmp_path):
    file = read(outside(tmp_path, {"w": "a.bin"}))
    for name in ("out.onnx", "new.onnx.data"):
        (tmp_path / name).symlink_to("elsewhere")
        with pytest.raises(OutputError, match=r"exists, and with external data nothing is replaced"):
            write(file.module, tmp_path / name.removesuffix(".data"), file.args)
    assert not (tmp_path / "elsewhere").exists()
