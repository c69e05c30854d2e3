"""The real quantizers: onnxruntime's static one and PyTorch's PT2E, with its backends' own choices of what to round."""

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantizing.networks import joined
from quantizing.rounding import Rounded, Setting

Args = tuple[Tensor, ...]


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
        exported, rounded = Path(folder) / "float.onnx", Path(folder) / "rounded.onnx"
        torch.onnx.export(model, calibration, str(exported), dynamo=True, verbose=False, external_data=False)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        names = [value.name for value in runtime.InferenceSession(str(exported), options).get_inputs()]
        quantization.quantize_static(
            str(exported),
            str(rounded),
            Reader(names),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=setting.granularity == "channel",
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        return runtime.InferenceSession(str(rounded), options, providers=["CPUExecutionProvider"])


def quantizer(backend: str, per_channel: bool) -> Any:
    """A backend's own choice of what is rounded: "x86", with steps for each channel, or the "xnnpack" of torchao's tests."""
    if backend == "x86":
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    return xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=per_channel))


@torch.no_grad()
def converted(chosen: Any, model: nn.Module, calibration: Args) -> nn.Module:
    """The network as PT2E converts it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(model, calibration).module(), chosen)
    prepared(*calibration)
    return convert_pt2e(prepared)


@torch.no_grad()
def pt2e(model: nn.Module, calibration: Args, inputs: Args, setting: Setting) -> Tensor:
    """PT2E, with the quantizer of a backend."""
    chosen = quantizer(setting.tool.removeprefix("pt2e-"), setting.granularity == "channel")
    return joined(converted(chosen, model, calibration)(*inputs))


TOOLS = {"onnxruntime": onnxruntime, "pt2e-x86": pt2e, "pt2e-xnnpack": pt2e}
