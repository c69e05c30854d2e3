"""ONNX files that packages ship, read, rescaled and balanced: what is found, and what onnxruntime then computes.

    python benchmarks/onnx_files.py [--files nudenet] [--output benchmarks/results/onnx-files.jsonl]

Needs onnx and onnxruntime, and the packages that hold the files; without dependencies they stay small:
`pip install --no-deps nudenet rapidocr-onnxruntime silero-vad magika basic-pitch`. Nothing of them is copied. Inputs are made
here, of the kind that each network is meant for. A random member of the group has log-scales of standard deviation 1. The
deviation of the module is in float64; those of files are in onnxruntime, in the file's float32.
"""

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import equinorm
from common import machine, options_of, report
from equinorm.integrations.onnx import OnnxError, OnnxFile, Written, read


@dataclass(frozen=True)
class Shipped:
    """A file of a package.

    Attributes:
        package: its name on PyPI.
        module: the package to import.
        path: of the file, in the package's folder.
        inputs: makes what it is run on.
        fixed: inputs that always have these numbers.
    """

    package: str
    module: str
    path: str
    inputs: Callable[[], dict[str, Any]]
    fixed: dict[str, Any] = field(default_factory=dict)


def picture(height: int, width: int, low: float = 0.0) -> Tensor:
    """Dark strokes on a bright ground that fades, of numbers from `low` to 1."""
    generator = np.random.default_rng(0)
    image = np.linspace(0.8, 1.0, width)[None, None] * np.ones((3, height, 1))
    for _ in range(height * width // 400):
        row, column = generator.integers(0, height - 8), generator.integers(0, width - 8)
        image[:, row : row + generator.integers(2, 8), column : column + generator.integers(1, 4)] = generator.uniform(0, 0.3)
    return torch.from_numpy(low + (1 - low) * image)[None].float()


def tone(samples: int, rate: int) -> Tensor:
    """A voice-like sound: harmonics of 220 Hz that swell, and some noise."""
    times = np.arange(samples) / rate
    sound = sum(np.sin(2 * np.pi * 220 * k * times) / k for k in range(1, 8)) * np.hanning(samples)
    return torch.from_numpy(0.2 * sound + 0.01 * np.random.default_rng(0).standard_normal(samples)).float()


def text() -> Tensor:
    """Bytes that are half of this file, half drawn at random: what no class is certain of."""
    known = np.frombuffer(Path(__file__).read_bytes()[:2048], dtype=np.uint8).astype(np.int32)
    generator = np.random.default_rng(0)
    return torch.from_numpy(np.where(generator.random(2048) < 0.5, known, generator.integers(0, 256, 2048))).int()[None]


def speech() -> dict[str, Any]:
    """What a voice detector reads at a time, and its state."""
    return {"input": tone(576, 16000)[None], "state": (2, 1, 128)}


OCR = "rapidocr-onnxruntime", "rapidocr_onnxruntime"
VAD = "silero-vad", "silero_vad"
FILES = {
    "nudenet": Shipped("nudenet", "nudenet", "320n.onnx", lambda: {"images": picture(320, 320)}),
    "rapidocr detector": Shipped(*OCR, "models/ch_PP-OCRv4_det_infer.onnx", lambda: {"x": picture(160, 320, -1)}),
    "rapidocr recogniser": Shipped(*OCR, "models/ch_PP-OCRv4_rec_infer.onnx", lambda: {"x": picture(48, 320, -1)}),
    "rapidocr classifier": Shipped(*OCR, "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", lambda: {"x": picture(48, 192, -1)}),
    "silero-vad": Shipped(*VAD, "data/silero_vad.onnx", speech, {"sr": 16000}),
    "silero-vad, opset 15": Shipped(*VAD, "data/silero_vad_16k_op15.onnx", speech, {"sr": 16000}),
    "magika": Shipped("magika", "magika", "models/standard_v3_3/model.onnx", lambda: {"bytes": text()}),
    "basic-pitch": Shipped(
        "basic-pitch",
        "basic_pitch",
        "saved_models/icassp_2022/nmp.onnx",
        lambda: {"serving_default_input_2:0": tone(43844, 22050)[None, :, None]},
    ),
}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the function returns."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def measured(name: str) -> dict[str, Any]:
    """The record of one file."""
    shipped = FILES[name]
    spec = util.find_spec(shipped.module)
    if spec is None or not spec.submodule_search_locations:
        return {"file": name, "error": f"{shipped.package} is not installed"}
    path = Path(next(iter(spec.submodule_search_locations))) / shipped.path
    origin = {"file": name, "package": f"{shipped.package} {metadata.version(shipped.package)}", "path": shipped.path}
    reading, file = timed(lambda: read(path, shipped.inputs(), shipped.fixed))
    finding, symmetries = timed(lambda: equinorm.symmetries(file.module, file.args))
    pins: Counter[str] = Counter()
    for pin in symmetries.pins:
        pins[f"{pin.reason.operation} ({pin.reason.detail})" if pin.reason.detail else pin.reason.operation] += pin.channels
    found = {
        "megabytes": path.stat().st_size / 1e6,
        "deviation_reading": file.deviation,
        "parameters": sum(parameter.numel() for parameter in file.module.parameters()),
        "free": symmetries.num_free,
        "coverage": symmetries.coverage,
        "pins": dict(pins.most_common(6)),
        "unread": list(file.unread),
        "tiny": file.module.tiny,
        "seconds": {"read": reading, "find": finding},
    }
    more = rescaled(file, symmetries.num_free) | balanced(file) if symmetries.num_free else {}
    found["seconds"] |= more.pop("seconds", {})
    return origin | found | more


def rescaled(file: OnnxFile, count: int) -> dict[str, Any]:
    """Deviations of a random member: of the module in float64, of the file in onnxruntime."""
    logs = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide, args = copy.deepcopy(file.module).double(), tuple(a.double() if a.is_floating_point() else a for a in file.args)
    moved = copy.deepcopy(wide)
    equinorm.symmetries(moved, args).rescale_(logs)
    single = copy.deepcopy(file.module)
    equinorm.symmetries(single, file.args).rescale_(logs)
    return {"deviation_random_float64": equinorm.deviation(moved, wide, args), "deviation_random": in_runtime(single, file)}


def balanced(file: OnnxFile) -> dict[str, Any]:
    """Norms, deviations and seconds of a balance, p = 2; and of the same with powers of two."""
    module, rounded = copy.deepcopy(file.module), copy.deepcopy(file.module)
    symmetries = equinorm.symmetries(module, file.args)
    balancing, balance = timed(symmetries.balance)
    balance.apply_()
    equinorm.symmetries(rounded, file.args).balance().apply_(power_of_two=True)
    writing, apart = timed(lambda: in_runtime(module, file))
    return {
        "norm_before": balance.norm_before,
        "norm_after": balance.norm_after,
        "deviation_balanced": apart,
        "deviation_powers_of_two": in_runtime(rounded, file),
        "seconds": {"balance": balancing, "write": writing},
    }


def in_runtime(module: Any, file: OnnxFile) -> float:
    """How far the outputs of the file that would be written are from those of the one that was read."""
    written = Written(module, file.args)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for path, write in written.files(Path(folder) / "out.onnx"):
                write(path)
        except OnnxError:
            if written.deviation == float("inf"):
                raise
    return written.deviation


def main() -> None:
    """Measure the chosen files."""
    parser = options_of(__doc__)
    parser.add_argument("--files", nargs="*", choices=[*FILES], default=[*FILES])
    options = parser.parse_args()
    report((measured(name) | machine() for name in options.files), options.output)


if __name__ == "__main__":
    main()
