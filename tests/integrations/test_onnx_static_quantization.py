"""What `equalize` measures of an ONNX file is what onnxruntime's own static quantizer loses, freed bounds included."""
# ruff: noqa: E402 -- what is imported here depends on what is installed

import logging

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import helper
from onnx_graphs import info, model, normal, run, save
from onnxruntime import quantization

import equinorm
from equinorm.integrations.onnx import read, write

SAMPLES = 2 * normal(64, 3, 8, 8, seed=99)


def bounded(least):
    """Three convolutions, one of each channel by itself, with bounds between, whose channels differ in size."""
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["a"], "a", pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["a", "least", "six"], ["ar"], "ar"),
        helper.make_node("Conv", ["ar", "b.weight", "b.bias"], ["b"], "b", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Clip", ["b", "least", "six"], ["br"], "br"),
        helper.make_node("Conv", ["br", "c.weight", "c.bias"], ["y"], "c"),
    ]
    shapes = {"a.weight": (8, 3, 3, 3), "a.bias": (8,), "b.weight": (8, 1, 3, 3), "b.bias": (8,)}
    shapes |= {"c.weight": (4, 8, 1, 1), "c.bias": (4,)}
    stored = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    uneven = np.exp(1.5 * normal(8, seed=7)).reshape(8, 1, 1, 1)
    stored |= {"a.weight": 0.3 * stored["a.weight"] * uneven, "b.weight": stored["b.weight"] / uneven}
    stored |= {"least": np.float32(least), "six": np.float32(6)}
    return model(nodes, [info("x", ["N", 3, 8, 8])], [info("y", ["N", 4, 8, 8])], stored)


def decibels(path, folder, reference, by_channel):
    """Signal over noise of a file that onnxruntime has rounded by its defaults, but for signed weights."""

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{"x": SAMPLES}])

        def get_next(self):
            return next(self.batches, None)

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises to prepare the model, by the root logger
    kinds = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    quantization.quantize_static(str(path), str(folder / "rounded.onnx"), Reader(), per_channel=by_channel, **kinds)
    logging.root.setLevel(level)
    (found,) = run(folder / "rounded.onnx", SAMPLES)
    return float(10 * np.log10(np.square(reference).sum() / np.square(found - reference).sum()))


def measured(folder, least, kind):
    """Signal over noise before and after: as `equalize` says, and in onnxruntime."""
    path, out, x = save(bounded(least), folder / "in.onnx"), folder / "out.onnx", torch.from_numpy(SAMPLES)
    (reference,) = run(path, SAMPLES)
    file = read(path, {"x": x}, fold=True, free=True)
    found = equinorm.equalize_(file.module, file.args, calibration=[x], scheme=f"onnxruntime-{kind}")
    write(file.module, out, file.args)
    rounded = [decibels(one, folder, reference, kind == "channel") for one in (path, out)]
    return (found.measured_before, found.measured_after), rounded, [one.op_type for one in onnx.load(str(out)).graph.node]


@pytest.mark.parametrize(("kind", "gain"), [("tensor", 12), ("channel", 0.1)])
def test_what_is_measured_is_what_onnxruntime_loses(tmp_path, kind, gain):
    said, found, operations = measured(tmp_path, 0.0, kind)
    assert operations.count("Min") == 2  # both have bounds that differ
    assert found == pytest.approx(said, abs=0.1)
    assert found[1] > found[0] + gain


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_lower_bounds_too(tmp_path, kind):
    """Of these onnxruntime rounds what the Max leaves too, which is not counted."""
    said, found, _ = measured(tmp_path, -1.0, kind)
    assert found[0] == pytest.approx(said[0], abs=0.1)
    assert found[1] == pytest.approx(said[1], abs=1.0)
    assert found[1] > found[0] - 0.5
