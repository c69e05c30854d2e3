"""What rounding to integers costs trained networks, by how they are rescaled before: signal to noise, agreement, accuracy.

    OMP_NUM_THREADS=1 python benchmarks/quantization.py --data FOLDER [--networks mobilenet_v2] [--methods none p=inf noise]
        [--settings w8a8-tensor onnxruntime-channel] [--draws 4] [--images 32] [--output benchmarks/results/quantization.jsonl]

Networks are trained ones that packages ship (benchmarks/quantizing/networks.py says which, and what their inputs are); the
folder holds CIFAR-10 as `cifar-10-batches-py`. Each draw has a calibration batch and a test batch of its own. One line of
results for each network, setting and method: for each draw the signal to noise of the outputs in decibels against the float
network as it came, how many answers agree with it, how many are right, all without and with empirical bias correction. What
--output holds already is not repeated, so that a run can be stopped and go on.
"""

import argparse
import importlib.metadata
import math
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common
import equinorm
from quantizing import networks
from quantizing.methods import METHODS, folded
from quantizing.networks import SUBJECTS, Subject, joined
from quantizing.rounding import Setting
from quantizing.tools import outputs

SETTINGS = {
    "w8-tensor": Setting(8, "tensor"),
    "w8a8-tensor": Setting(8, "tensor", 8),
    "w8a8-channel": Setting(8, "channel", 8),
    "onnxruntime-channel": Setting(8, "channel", 8, tool="onnxruntime"),
    "onnxruntime-tensor": Setting(8, "tensor", 8, tool="onnxruntime"),
    "pt2e-x86": Setting(8, "channel", 8, tool="pt2e-x86"),
    "pt2e-xnnpack": Setting(8, "channel", 8, tool="pt2e-xnnpack"),
    "w4-channel": Setting(4, "channel"),
    "w4-channel-clipped": Setting(4, "channel", clipped=True),
    "w4a8-channel": Setting(4, "channel", 8),
    "w4-group": Setting(4, "group"),
    "w8-channel": Setting(8, "channel"),
    "w8a8-group": Setting(8, "group", 8),
}

PACKAGES = ("torch", "torchao", "onnxruntime", "brevitas", "aimet-torch")


class Bench:
    """One network: its moved copies are kept, as long as nothing that they depend on changes."""

    def __init__(self, name: str, count: int) -> None:
        self.subject: Subject = SUBJECTS[name]
        self.count = count
        self.model = self.subject.build()
        self.folded = folded(self.model)
        self.moved: dict[tuple, tuple[nn.Module, float]] = {}
        self.outputs: dict[int, Tensor] = {}

    def record(self, setting: Setting, method: str, draws: int) -> dict[str, Any]:
        """Measurements of every draw."""
        rows = [self._draw(setting, method, draw) for draw in range(draws)]
        return {"images": self.count, "draws": rows, "source": self.subject.source}

    def _draw(self, setting: Setting, method: str, draw: int) -> dict[str, Any]:
        calibration = self.subject.draw(draw, self.count, False).args
        test = self.subject.draw(draw, self.count, True)
        wanted = self._wanted(draw, test.args)
        model, seconds = self._move(setting, method, draw, calibration)
        with torch.no_grad():
            exactness = decibels(joined(model(*(a[:4] for a in test.args))), wanted[: 4 * len(wanted) // self.count])
        found = outputs(model, calibration, test.args, setting)
        kinds = {
            key: self._compare(found[is_one], wanted, test.truth) for key, is_one in (("plain", False), ("corrected", True))
        }
        return {**kinds, "float": exactness, "seconds": round(seconds, 2)}

    def _wanted(self, draw: int, args: tuple[Tensor, ...]) -> Tensor:
        """What the float network, as it came, puts out."""
        if draw not in self.outputs:
            with torch.no_grad():
                self.outputs[draw] = joined(self.model(*args))
        return self.outputs[draw]

    def _move(self, setting: Setting, method: str, draw: int, calibration: tuple[Tensor, ...]) -> tuple[nn.Module, float]:
        """The moved network, and the seconds that moving took."""
        how = METHODS[method]
        scheme = (setting.weight_bits, setting.granularity, setting.activation_bits, setting.clipped)
        key = (method, draw if how.reads_data else None, scheme if how.reads_setting else None)
        if key not in self.moved:
            torch.manual_seed(draw)
            started = time.perf_counter()
            model = how.apply(self.model if how.prepares else self.folded, calibration, setting)
            self.moved[key] = model.eval(), time.perf_counter() - started
        return self.moved[key]

    def _compare(self, found: Tensor, wanted: Tensor, truth: Tensor | None) -> dict[str, float | None]:
        answers, right = self.subject.answers, self.subject.right
        return {
            "db": decibels(found, wanted),
            "agreement": None if answers is None else float((answers(found) == answers(wanted)).double().mean()),
            "accuracy": None if right is None or truth is None else float(right(found, truth).double().mean()),
            "float_accuracy": None if right is None or truth is None else float(right(wanted, truth).double().mean()),
        }


def decibels(found: Tensor, wanted: Tensor) -> float:
    """10 log₁₀ (Σ y² / Σ (y − ŷ)²); 300 where nothing differs."""
    noise = float((found.double() - wanted.double()).square().sum())
    signal = float(wanted.double().square().sum())
    return (
        round(10 * math.log10(signal / noise), 3) if noise > 0 and math.isfinite(noise) else (300.0 if noise == 0 else -300.0)
    )


def about() -> dict[str, Any]:
    """Machine, versions, commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return common.machine() | {"versions": versions, "equinorm": equinorm.__version__, "commit": commit}


def sweep(options: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Network by network, setting by setting, method by method; a row that fails says why."""
    done, source = {(r["network"], r["setting"], r["method"]) for r in known}, about()
    for name in options.networks:
        bench = None
        for setting in options.settings:
            for method in options.methods:
                if (name, setting, method) in done:
                    continue
                bench = bench or Bench(name, options.images)
                subject = {"network": name, "setting": setting, "method": method}
                try:
                    found = bench.record(SETTINGS[setting], method, options.draws)
                except Exception as error:
                    found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
                yield subject | found | source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=networks.DATA, help="folder of cifar-10-batches-py")
    parser.add_argument("--shared", type=Path, default=networks.SHARED, help="folder with models/resnet20-cifar10.safetensors")
    parser.add_argument("--networks", nargs="+", default=[*SUBJECTS], choices=SUBJECTS)
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--images", type=int, default=32, help="in a calibration batch, and in a test batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    networks.DATA, networks.SHARED = options.data, options.shared
    torch.set_num_threads(options.threads)
    known = common.read(options.output) if options.output and options.output.exists() else []
    common.report(sweep(options, known), options.output)


if __name__ == "__main__":
    main()
