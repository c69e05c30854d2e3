"""What bounds for each channel cost in quantized networks: two inverted residuals with ReLU6, and with each form of a clamp.

    OMP_NUM_THREADS=1 python benchmarks/bounded_activations.py [--repeats 100] [--output benchmarks/results/bounds.jsonl]

Needs onnx, onnxscript, onnxruntime and torchao. Weights are random; the channels' bounds differ. For each form: the operations
that onnxruntime runs after static quantization (QDQ, one step a channel), milliseconds (least decile of alternating runs), how
often a value is rounded there and by PT2E's quantizers, and signal to noise.
"""

import collections
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import common
import equinorm
from quantizing import tools
from quantizing.rounding import Setting

CHANNELS = 96


class Bounds(nn.Module):
    """Upper bounds that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("upper", 6 * torch.exp(torch.randn(CHANNELS, 1, 1) / 2))


class Minimum(Bounds):
    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), self.upper)


class Fused(Bounds):
    """As a settled `equinorm.quantization.Clamp`."""

    def __init__(self) -> None:
        super().__init__()
        self.most = float(self.upper.max())

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.clamp(torch.relu(x), 0.0, self.most), self.upper)


class MinimumFirst(Bounds):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.minimum(x, self.upper))


class Clamp(Bounds):
    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, torch.zeros_like(self.upper), self.upper)


class Reflected(Bounds):
    def forward(self, x: Tensor) -> Tensor:
        return self.upper - torch.relu(self.upper - torch.relu(x))


FORMS = {
    "ReLU6": nn.ReLU6,
    "min(relu(x), u)": Minimum,
    "min(clamp(relu(x), 0, max u), u)": Fused,
    "relu(min(x, u))": MinimumFirst,
    "clamp(x, 0, u)": Clamp,
    "u − relu(u − relu(x))": Reflected,
}


def network(form: Any) -> nn.Module:
    """Two inverted residuals without their sums, 64 × 64 pixels."""
    torch.manual_seed(0)
    block = [nn.Conv2d(24, CHANNELS, 1), form(), nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1, groups=CHANNELS), form()]
    layers = [nn.Conv2d(3, 24, 3, 2, 1), *block, nn.Conv2d(CHANNELS, 24, 1)]
    block = [nn.Conv2d(24, CHANNELS, 1), form(), nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1, groups=CHANNELS), form()]
    return nn.Sequential(*layers, *block, nn.Conv2d(CHANNELS, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def decibels(found: Tensor, wanted: Tensor) -> float:
    return round(float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum())), 2)


def measure(repeats: int) -> list[dict[str, Any]]:
    """One record for each form."""
    logging.disable(logging.WARNING)
    inputs = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sessions, records = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for form, kind in FORMS.items():
            model = network(kind).eval()
            with torch.no_grad():
                wanted = model(inputs)
            optimized = Path(folder) / "optimized.onnx"
            session = tools.session(model, (inputs,), Setting(8, "channel", 8), optimized)
            name = session.get_inputs()[0].name
            found = torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])
            operations = collections.Counter(node.op_type for node in onnx.load(str(optimized)).graph.node)
            sessions[form] = (session, name)
            records.append({"form": form, "operations": operations, "onnxruntime_db": decibels(found, wanted)})
            for quantizer in ("x86", "xnnpack"):
                converted = tools.converted(tools.quantizer(quantizer, True), model, (inputs,))
                calls = [str(node.target) for node in converted.graph.nodes if node.op == "call_function"]
                with torch.no_grad():
                    records[-1][f"{quantizer}_db"] = decibels(converted(inputs), wanted)
                records[-1][f"{quantizer}_roundings"] = sum(".quantize_per_tensor" in call for call in calls)
    taken: dict[str, list[float]] = {form: [] for form in sessions}
    for _ in range(repeats):
        for form, (session, name) in sessions.items():
            started = time.perf_counter()
            session.run(None, {name: inputs.numpy()})
            taken[form].append(time.perf_counter() - started)
    about = common.machine() | {"onnxruntime": onnxruntime.__version__, "equinorm": equinorm.__version__, "seed": 0}
    return [r | {"milliseconds": 1e3 * statistics.quantiles(taken[r["form"]], n=10)[0]} | about for r in records]


def main() -> None:
    parser = common.options_of(__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    common.report(measure(options.repeats), options.output)


if __name__ == "__main__":
    main()
