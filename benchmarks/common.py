"""What the benchmarks share: options, the machine, spreads, and JSON lines."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def options_of(description: str | None, output: Path | None = None) -> argparse.ArgumentParser:
    """A parser of a benchmark's options, of which `--output` is one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=output, help="file of JSON lines to append to; default: print only")
    return parser


def add_hooks(parser: argparse.ArgumentParser) -> None:
    """Which hooks of ENorm are measured."""
    parser.add_argument("--hooks", nargs="+", default=["plain", "compiled"], choices=["plain", "compiled"])


def machine(device: str = "cpu") -> dict[str, Any]:
    """What numbers were measured on."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
    found = {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | ({"device": torch.cuda.get_device_name()} if device != "cpu" else {})


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower quartile": low, "upper quartile": high}


def report(records: Iterable[dict[str, Any]], output: Path | None) -> None:
    """Print every record as it comes, and append it to a file of JSON lines."""
    for record in records:
        line = json.dumps(record)
        print(line, flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                file.write(line + "\n")


def read(results: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()]
