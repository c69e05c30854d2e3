"""What rounding to integers costs trained networks, by how they are rescaled before: signal to noise, agreement, accuracy.

    OMP_NUM_THREADS=1 python benchmarks/quantization.py --data FOLDER [--networks mobilenet_v2] [--methods none p=inf noise]
        [--settings w8a8-tensor onnxruntime-channel] [--draws 4] [--output benchmarks/results/quantization.jsonl]

Networks are trained ones that packages ship (benchmarks/quantizing/subjects.py says which, and what their inputs are); the
folder holds CIFAR-10 as `cifar-10-batches-py`. Each draw has a calibration batch and a test batch of its own. One line of
results for each network, setting and method: for each draw the signal to noise of the outputs in decibels against the float
network as it came, how many answers agree with it, how many are right, all without and with empirical bias correction, and
seconds, elapsed and of the processor. Draws that --output holds already are not repeated, so that a run can be stopped and go
on; those of `noise` are, once the source of equinorm.quantization has changed.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import math
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common
import equinorm
from quantizing import samples, subjects
from quantizing.methods import METHODS, equalized, folded
from quantizing.rounding import Setting
from quantizing.subjects import SUBJECTS, Subject, joined
from quantizing.tools import outputs

SETTINGS = {
    "w8-tensor": Setting(8, "tensor"),
    "w8a8-tensor": Setting(8, "tensor", 8),
    "w8a8-channel": Setting(8, "channel", 8),
    "onnxruntime-tensor": Setting(8, "tensor", 8, tool="onnxruntime"),
    "onnxruntime-channel": Setting(8, "channel", 8, tool="onnxruntime"),
    "pt2e-x86-tensor": Setting(8, "tensor", 8, tool="pt2e-x86"),
    "pt2e-x86-channel": Setting(8, "channel", 8, tool="pt2e-x86"),
    "pt2e-xnnpack-tensor": Setting(8, "tensor", 8, tool="pt2e-xnnpack"),
    "pt2e-xnnpack-channel": Setting(8, "channel", 8, tool="pt2e-xnnpack"),
    "w4-channel": Setting(4, "channel"),
    "w4-group": Setting(4, "group"),
    "w4-channel-clipped": Setting(4, "channel", clipped=True),
}

PACKAGES = ("torch", "torchao", "onnxruntime", "brevitas", "aimet-torch", "nvidia-modelopt")

Done = dict[tuple[str, str, str], dict[str, Any]]


class Bench:
    """One network: its moved copies are kept, as long as nothing that they depend on changes."""

    def __init__(self, name: str, count: int) -> None:
        self.subject: Subject = SUBJECTS[name]
        self.count = count
        self.model = self.subject.build()
        self.folded = folded(self.model)
        self.moved: dict[tuple, tuple[nn.Module, dict[str, float]]] = {}
        self.outputs: dict[int, Tensor] = {}
        self.compared: dict[tuple, dict[str, Any]] = {}

    def record(self, setting: Setting, method: str, draws: int, known: list[dict[str, Any]]) -> dict[str, Any]:
        """Measurements of every draw, of which some are known."""
        rows = known[:draws] + [self._draw(setting, method, draw) for draw in range(len(known), draws)]
        return {"images": self.count, "draws": rows, "source": self.subject.source}

    def _draw(self, setting: Setting, method: str, draw: int) -> dict[str, Any]:
        calibration = self.subject.draw(draw, self.count, False).args
        test = self.subject.draw(draw, self.count, True)
        wanted = self._wanted(draw, test.args)
        model, taken = self._move(setting, method, draw, calibration)
        with torch.no_grad():
            exactness = decibels(joined(model(*(a[:4] for a in test.args))), wanted[: 4 * len(wanted) // self.count])
        key = (id(model), setting, draw)  # methods may leave a network as it was
        if key not in self.compared:
            found = outputs(model, calibration, test.args, setting)
            kinds = {"plain": False, "corrected": True}
            self.compared[key] = {kind: self._compare(found[c], wanted, test.truth) for kind, c in kinds.items()}
        return {**self.compared[key], "float": exactness, **taken}

    def _wanted(self, draw: int, args: tuple[Tensor, ...]) -> Tensor:
        """What the float network, as it came, puts out."""
        if draw not in self.outputs:
            with torch.no_grad():
                self.outputs[draw] = joined(self.model(*args))
        return self.outputs[draw]

    def _move(
        self, setting: Setting, method: str, draw: int, calibration: tuple[Tensor, ...]
    ) -> tuple[nn.Module, dict[str, float]]:
        """The moved network, and the seconds that moving took, elapsed and of the processor."""
        how = METHODS[method]
        scheme = (setting.weight_bits, setting.granularity, setting.activation_bits, setting.clipped, setting.rounds_outputs)
        key = (method, draw if how.reads_data else None, scheme if how.reads_setting else None)
        if key not in self.moved:
            torch.manual_seed(draw)
            how.load()
            started, worked = time.perf_counter(), time.process_time()
            model = how.apply(self.model if how.prepares else self.folded, calibration, setting).eval()
            taken = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - worked}
            self.moved[key] = model, {name: round(value, 2) for name, value in taken.items()}
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


NOT_RUN = ("bias_correction.py", "smoothing.py")
"""Of equinorm.quantization, what this benchmark does not call: biases are corrected here in the same way for all methods."""


def algorithm() -> str:
    """A digest of what equalizes: results of another are not to be told as this one's."""
    files = sorted((Path(equinorm.__file__).parent / "quantization").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.name not in NOT_RUN)).hexdigest()[:12]


def rows(options: argparse.Namespace) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """Draw by draw, network by network, setting by setting, method by method: a run that is stopped has a bit of each."""
    for draws in range(1, options.draws + 1):
        yield from ((draws, row) for row in itertools.product(options.networks, options.settings, options.methods))


def sweep(options: argparse.Namespace, done: Done) -> Iterator[dict[str, Any]]:
    """Every row that is not known with enough draws; one that fails says why."""
    source, now = about(), algorithm()
    benches: dict[str, Bench] = {}
    for draws, (name, setting, method) in rows(options):
        digest = {"algorithm": now} if METHODS[method].reads_setting else {}
        held = done.get((name, setting, method), {})
        known = held.get("draws", []) if held.get("algorithm") == digest.get("algorithm") else []
        if len(known) >= draws or (draws > 1 and "error" in held):
            continue
        if name not in benches:
            benches[name] = Bench(name, options.images or SUBJECTS[name].count)
        try:
            found = benches[name].record(SETTINGS[setting], method, draws, known)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        done[name, setting, method] = {"network": name, "setting": setting, "method": method} | found | digest | source
        yield done[name, setting, method]


def timings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of equalizing one draw: elapsed, of the processor, and by part."""
    for name in options.networks:
        bench = Bench(name, options.images or SUBJECTS[name].count)
        calibration = bench.subject.draw(0, bench.count, False).args
        for setting in options.settings:
            METHODS["noise"].load()
            started, worked = time.perf_counter(), time.process_time()
            result = equalized(bench.model, calibration, SETTINGS[setting])
            spent = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - worked}
            load = {"load": os.getloadavg()[0], "parts": dict(result.seconds), "algorithm": algorithm()}
            yield {"network": name, "setting": setting, "images": bench.count, **spent, **load} | about()


def main() -> None:
    parser = common.options_of(__doc__)
    parser.add_argument("--data", type=Path, default=samples.DATA, help="folder of cifar-10-batches-py")
    parser.add_argument("--shared", type=Path, default=subjects.SHARED, help="folder with models/resnet20-cifar10.safetensors")
    parser.add_argument("--networks", nargs="+", default=[*SUBJECTS], choices=SUBJECTS)
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--images", type=int, help="in a calibration batch, and in a test batch; default: the network's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time", action="store_true", help="only how long equinorm.equalize takes")
    options = parser.parse_args()
    samples.DATA, subjects.SHARED = options.data, options.shared
    torch.set_num_threads(options.threads)
    if options.time:
        common.report(timings(options), options.output)
        return
    known = common.read(options.output) if options.output and options.output.exists() else []
    common.report(sweep(options, {(r["network"], r["setting"], r["method"]): r for r in known}), options.output)


if __name__ == "__main__":
    main()
