"""From a file to a module, verified against onnxruntime."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import EquinormError, first_line
from equinorm.integrations.onnx.errors import OnnxError
from equinorm.integrations.onnx.examples import Given, examples, fixed_numbers
from equinorm.integrations.onnx.files import Stored, stored
from equinorm.integrations.onnx.module import OnnxModule
from equinorm.integrations.onnx.nodes import Node
from equinorm.integrations.onnx.preparing import planned
from equinorm.integrations.onnx.runtime import FLOOR, READING, apart, arrays, outputs
from equinorm.quantization.prepare import Preparation, patterns


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile:
    """An ONNX file, read.

    Attributes:
        path: the file.
        module: computes what it does; an ordinary module, to be balanced like any other.
        args: example inputs.
        deviation: between the module and onnxruntime on these, largest relative output difference.
        unread: nodes that run as a whole and pin what they read, with the reason.
        fed: initializers that are also inputs: they stay as they are.
        preparation: what was folded and set free; None if nothing was to be.
    """

    path: Path
    module: OnnxModule
    args: tuple[Tensor, ...]
    deviation: float
    unread: tuple[str, ...]
    fed: tuple[str, ...]
    preparation: Preparation | None = None


def read(
    path: str | os.PathLike[str],
    inputs: Given = None,
    fixed: Mapping[str, Any] | None = None,
    *,
    fold: bool = False,
    free: bool | Sequence[str] = False,
) -> OnnxFile:
    """Read an ONNX file as a module, and verify that it computes what onnxruntime does.

    To quantize, prepare its graph as `equinorm.quantization.prepare` does a module; what is written is then prepared too.

    Args:
        path: the file; external data lie where it says.
        inputs: tensors, arrays or shapes to run it on, by name or in order. Axes without a size need one; the first has 1 by
            default.
        fixed: inputs that always have these numbers, by name: settings such as a sampling rate.
        fold: fold each BatchNormalization that alone reads a Conv, ConvTranspose or Gemm into it.
        free: give each Clip one bound for each channel, which scales with it, where what it bounds can scale: Relu and Min.
            Or names of Clips, as patterns.

    Returns:
        The module, example inputs, and what was not read.

    Raises:
        OnnxError: if the file is damaged, quantized or unknown, if sizes are missing, or if the module and onnxruntime differ
            by more than 1e-3 relative in single precision.
    """
    path = Path(path)
    file = stored(path)
    numbers = fixed_numbers(file.graph, fixed or {}, path)
    module = OnnxModule(file, numbers).eval()
    args = examples(file.graph, module.inputs, inputs, path)
    wanted = outputs(path, module, args)
    preparation = None
    try:
        with torch.no_grad():
            found = module(*args)
            taken = module.branches()  # now that it is known, weights of branches that are not taken are set apart
            if taken:
                module = OnnxModule(file, numbers, taken).eval()
            if fold or free:
                module, preparation = _prepared(path, numbers, taken, args, (fold, patterns(free)), found)
            found = module(*args) if taken or fold or free else found
    except EquinormError as error:
        raise OnnxError(f"cannot read {path}: {error}") from error
    except Exception as error:
        raise OnnxError(f"cannot read {path}: {type(error).__name__}: {first_line(error)}.") from error
    module.rounding = apart(arrays(found), wanted, FLOOR)
    _check_rounding(module)
    nodes = [node for node in module.modules() if isinstance(node, Node) and node.unread]
    unread = tuple(f"{node.opaque.name}: {node.unread}" for node in nodes if node.opaque.has_run)
    return OnnxFile(path, module, args, module.rounding, unread, tuple(module.fed), preparation)


def _check_rounding(module: OnnxModule) -> None:
    """Refuse a module that computes something else than onnxruntime."""
    limit = max((READING[tensor.dtype] for tensor in module.state_dict().values()), default=READING[torch.float32])
    if not module.rounding <= limit:
        raise OnnxError(
            f"cannot read {module.path}: what was read deviates from onnxruntime by {module.rounding:.1e}, more than "
            f"{limit:g}. The file may read its inputs otherwise than as numbers drawn at random: give inputs that it is meant "
            "for."
        )


def _prepared(
    path: Path,
    numbers: Mapping[str, Any],
    taken: Mapping[str, str],
    args: tuple[Tensor, ...],
    asked: tuple[bool, Sequence[str]],
    wanted: Any,
) -> tuple[OnnxModule, Preparation]:
    """The module of a prepared graph.

    Args:
        path: the file.
        numbers: inputs that are fixed.
        taken: the branch that each If takes.
        args: example inputs.
        asked: fold? And patterns of names of what to set free.
        wanted: what the graph as it is computes.
    """

    def module_of(file: Stored) -> OnnxModule:
        module = OnnxModule(file, numbers, taken).eval()
        module(*args)  # nodes that run as a whole tell their shapes
        return module

    plan = planned(stored(path), *asked, module_of, args)
    module = module_of(plan.apply(stored(path)))
    module.preparing = plan
    deviation = apart(arrays(module(*args)), arrays(wanted), FLOOR)
    return module, Preparation(path.name, plan.folded, plan.freed, plan.left, deviation)


def input_names(path: str | os.PathLike[str]) -> list[str]:
    """Names of a file's inputs, in order.

    Raises:
        OnnxError: if it is no ONNX file.
    """
    graph = stored(Path(path)).graph
    return [value.name for value in graph.input if value.name not in {proto.name for proto in graph.initializer}]
