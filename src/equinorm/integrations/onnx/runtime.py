"""What onnxruntime computes: the judge of what was read, and of what is written."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equinorm._deviation import difference
from equinorm._errors import first_line
from equinorm.integrations.onnx.errors import OnnxError, library
from equinorm.integrations.onnx.module import OnnxModule
from equinorm.integrations.onnx.numbers import to_array, to_tensor

READING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest deviation between PyTorch and onnxruntime, by the coarsest dtype of the weights: they sum in another order."""

FLOOR = 1e-3
"""Outputs that are below this throughout are measured by it: onnxruntime's sigmoid is good to 1e-7 absolute, not relative."""


def outputs(path: Path, module: OnnxModule, args: Sequence[Tensor]) -> list[np.ndarray]:
    """What a file computes in onnxruntime, on one thread and without rewriting its graph.

    Raises:
        OnnxError: if onnxruntime refuses it.
    """
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feed = {**module.fixed, **dict(zip(module.inputs, map(to_array, args), strict=True))}
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return session.run(None, {item.name: feed[item.name] for item in session.get_inputs() if item.name in feed})
    except Exception as error:
        raise OnnxError(f"onnxruntime cannot run {path}: {_sentence(error)}.") from error


def arrays(found: Any) -> list[np.ndarray]:
    """The outputs of a module, in the same form."""
    return [*map(to_array, found if isinstance(found, tuple) else (found,))]


def computed(module: OnnxModule, args: Sequence[Tensor]) -> list[np.ndarray]:
    """What a module computes, in the same form."""
    with torch.no_grad():
        return arrays(module(*args))


def apart(found: Sequence[Any], wanted: Sequence[Any], floor: float = 0.0) -> float:
    """Largest relative output difference: max over outputs of ‖a − b‖_∞ / ‖b‖_∞, inf where shapes or non-numbers differ.

    Outputs that are smaller than `floor` throughout are measured by it.
    """
    pairs = [(to_tensor(np.asarray(a)), to_tensor(np.asarray(b))) for a, b in zip(found, wanted, strict=True)]
    return max((difference(a, b, floor) if a.shape == b.shape else math.inf for a, b in pairs), default=0.0)


def _sentence(error: BaseException) -> str:
    """The first line of what it says, without its codes."""
    return re.sub(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )+", "", first_line(error))
