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
        session = runtime.InferenceSession(str(rounded), options, providers=["CPUExecutionProvider"])
        found = session.run(None, dict(zip(names, (a.numpy() for a in inputs), strict=True)))
        return joined([torch.from_numpy(value) for value in found])


def x86(model: nn.Module, calibration: Args, inputs: Args, setting: Setting) -> Tensor:
    """PT2E with the quantizer for x86: 8-bit weights, one step for each output channel."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    return _pt2e(quantizer, model, calibration, inputs)


def xnnpack(model: nn.Module, calibration: Args, inputs: Args, setting: Setting) -> Tensor:
    """PT2E with the quantizer for XNNPACK that torchao tests with."""
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    config = xnnpack.get_symmetric_quantization_config(is_per_channel=setting.granularity == "channel")
    return _pt2e(xnnpack.XNNPACKQuantizer().set_global(config), model, calibration, inputs)


@torch.no_grad()
def _pt2e(quantizer: Any, model: nn.Module, calibration: Args, inputs: Args) -> Tensor:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(model, calibration).module(), quantizer)
    prepared(*calibration)
    return joined(convert_pt2e(prepared)(*inputs))


TOOLS = {"onnxruntime": onnxruntime, "pt2e-x86": x86, "pt2e-xnnpack": xnnpack}
