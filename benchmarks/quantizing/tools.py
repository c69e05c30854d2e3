"""The real quantizers: onnxruntime's static one and PyTorch's PT2E, with its backends' own choices of what to round.

Copies of one network are exported once; then only their numbers are put into the file.
"""

import copy
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from quantizing.rounding import Rounded, Setting, exported, likeness, rounds_sums
from quantizing.subjects import joined

Args = tuple[Tensor, ...]

PRODUCTS = ["MatMul", "Gemm"]
"""What onnxruntime rounds in networks that read tokens, as its guide for transformers has it: masks are not for 8 bits."""


@torch.no_grad()
def shifted(model: nn.Module, corrections: dict[str, Tensor]) -> nn.Module:
    """A copy whose biases have been corrected."""
    copied = copy.deepcopy(model)
    for name, correction in corrections.items():
        copied.get_parameter(name).add_(correction)
    return copied


def outputs(model: nn.Module, calibration: Args, inputs: Args, setting: Setting) -> dict[bool, Tensor]:
    """Outputs of the rounded network, without and with bias correction."""
    simulated = Rounded(model, calibration, setting)
    if setting.tool == "simulated":
        return {corrected: joined(simulated.run(inputs, corrected)) for corrected in (False, True)}
    corrected = shifted(model, simulated.bias_corrections())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            is_one: TOOLS[setting.tool](corrected if is_one else model, calibration, inputs, setting)
            for is_one in (False, True)
        }


def onnxruntime(model: nn.Module, calibration: Args, inputs: Args, setting: Setting) -> Tensor:
    """Static quantization into QuantizeLinear and DequantizeLinear, 8-bit weights and activations, ranges by MinMax."""
    found = session(model, calibration, setting)
    names = [value.name for value in found.get_inputs()]
    results = found.run(None, dict(zip(names, (a.numpy() for a in inputs), strict=True)))
    return joined([torch.from_numpy(value) for value in results])


@dataclasses.dataclass(frozen=True)
class File:
    """A network as a file, and which initializers hold which of its tensors: as they are, or transposed."""

    content: bytes
    same: dict[str, str]
    transposed: dict[str, str]


_FILES: dict[str, File] = {}


def written(model: nn.Module, args: Args) -> bytes:
    """The network as torch.onnx.export writes it, whose initializers may be those of a copy."""
    import onnx
    from onnx import numpy_helper

    key = likeness(model, args)
    tensors = (*model.named_parameters(), *model.named_buffers())
    values = {name: value.detach().numpy() for name, value in tensors if value.is_floating_point()}
    known = _FILES.get(key)
    if known is None or len(known.same) + len(known.transposed) < len(values):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float.onnx"
            torch.onnx.export(copy.deepcopy(model), args, str(path), dynamo=True, verbose=False, external_data=False)
            _FILES[key] = _located(path.read_bytes(), values)
        return _FILES[key].content
    held = onnx.load_from_string(known.content)
    for tensor in held.graph.initializer:
        if tensor.name in known.same:
            tensor.CopyFrom(numpy_helper.from_array(values[known.same[tensor.name]], tensor.name))
        elif tensor.name in known.transposed:
            turned = numpy.ascontiguousarray(values[known.transposed[tensor.name]].T)
            tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
    return held.SerializeToString()


def _located(content: bytes, values: dict[str, numpy.ndarray]) -> File:
    """Where a file holds these tensors."""
    import onnx
    from onnx import numpy_helper

    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(content).graph.initializer}
    same = {name: name for name in held.keys() & values.keys() if numpy.array_equal(held[name], values[name])}
    rest = [name for name in values if name not in same and values[name].ndim == 2]
    pairs = ((found, name) for found, tensor in held.items() for name in rest if found not in same and tensor.ndim == 2)
    return File(content, same, {found: name for found, name in pairs if numpy.array_equal(held[found], values[name].T)})


def session(model: nn.Module, calibration: Args, setting: Setting, optimized: Path | None = None) -> Any:
    """The quantized network in onnxruntime; what it makes of the graph is also written to a file, if one is named."""
    import onnxruntime as runtime
    from onnxruntime import quantization

    for name in ("torch.onnx", "onnxscript", "onnx_ir", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, names: list[str]) -> None:
            self.batches: Iterator[dict[str, Any]] = iter([dict(zip(names, (a.numpy() for a in calibration), strict=True))])

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        exact, rounded = Path(folder) / "float.onnx", Path(folder) / "rounded.onnx"
        exact.write_bytes(written(model, calibration))
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        names = [value.name for value in runtime.InferenceSession(str(exact), options).get_inputs()]
        quantization.quantize_static(
            str(exact),
            str(rounded),
            Reader(names),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=None if rounds_sums(calibration) else PRODUCTS,
            per_channel=setting.granularity == "channel",
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        return runtime.InferenceSession(str(rounded), options, providers=["CPUExecutionProvider"])


def quantizer(backend: str, per_channel: bool) -> Any:
    """A backend's own choice of what is rounded: "x86", or the "xnnpack" of torchao's tests."""
    if backend == "x86":
        from torchao.quantization.pt2e import MinMaxObserver
        from torchao.quantization.pt2e.quantizer import QuantizationSpec, x86_inductor_quantizer as x86

        chosen = x86.get_default_x86_inductor_quantization_config()
        if not per_channel:
            observer = MinMaxObserver.with_args(eps=2**-12)
            weight = QuantizationSpec(torch.int8, observer, -128, 127, torch.per_tensor_symmetric)
            chosen = dataclasses.replace(chosen, weight=weight)
        return x86.X86InductorQuantizer().set_global(chosen)
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    return xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=per_channel))


@torch.no_grad()
def converted(chosen: Any, model: nn.Module, calibration: Args) -> nn.Module:
    """The network as PT2E converts it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(exported(model, calibration), chosen)
    prepared(*calibration)
    return convert_pt2e(prepared)


@torch.no_grad()
def pt2e(model: nn.Module, calibration: Args, inputs: Args, setting: Setting) -> Tensor:
    """PT2E, with the quantizer of a backend."""
    chosen = quantizer(setting.tool.removeprefix("pt2e-"), setting.granularity == "channel")
    return joined(converted(chosen, model, calibration)(*inputs))


TOOLS = {"onnxruntime": onnxruntime, "pt2e-x86": pt2e, "pt2e-xnnpack": pt2e}
