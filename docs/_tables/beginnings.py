"""How networks start: curvature and signal of the first steps, and cheap trials of recipes, each a row of a file of results."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from equinorm.experiments.config import METHODS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

NETWORKS = {"conv": "convolutional", "resnet18c": "type C", "resnet18": "identity skips"}

Record = dict[str, Any]


def _records(file: str) -> Iterator[Record]:
    if (RESULTS / file).exists():
        yield from (json.loads(line) for line in (RESULTS / file).read_text("utf-8").splitlines())


def _label(method: str) -> str:
    """The method's name and its options."""
    name, _, options = method.partition(":")
    return f"{METHODS[name].label} {options.replace(',', ', ')}".strip()


def _number(value: float) -> str:
    """Three digits, or a power of ten where these are too many."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.0e}"


def sharpness() -> str:
    """Signal, curvature and rates of each network and method at some step."""
    heads = ["Step", "Loss", "Logits", "Alike", "Eigenvalue", "First layer", "Median layer", "Last layer", "Rate", "Least rate"]
    rows = [f"| Network | Method | {' | '.join(heads)} |", f"|---|---|{'--:|' * len(heads)}"]
    for r in _records("sharpness.jsonl"):
        shares = [layer["gradient"] / layer["norm"] for layer in r["layers"].values()]
        cells = [NETWORKS[r["network"]], _label(r["method"]), str(r["step"]), f"{r['loss']:.2f}"]
        values = [r["logits"], r["alike"], abs(r["eigenvalue"]), shares[0], median(shares), shares[-1], r["rate"]]
        cells += [_number(value) for value in (*values, min(layer["rate"] for layer in r["layers"].values()))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def recipes() -> str:
    """Held-out accuracy and last training loss of each trial."""
    rows = ["| Network | Method | Learning rate | Held-out accuracy | Last training loss |", "|---|---|--:|--:|--:|"]
    for network in NETWORKS:
        for r in (r for r in _records("recipes.jsonl") if r["network"] == network):
            cells = [NETWORKS[network], _label(r["method"]), f"{r['lr']:g}", f"{r['accuracy']:.1%}", f"{r['losses'][-1]:.2f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def trial(network: str, method: str) -> str:
    """Held-out accuracy of a method at the best rate that was tried; several seeds are averaged."""
    found: dict[float, list[float]] = {}
    for r in _records("recipes.jsonl"):
        if (r["network"], r["method"]) == (network, method):
            found.setdefault(r["lr"], []).append(r["accuracy"])
    return f"{max(fmean(values) for values in found.values()):.1%}" if found else "*not measured yet*"


MARKERS = {"sharpness": sharpness, "recipes": recipes, "trial": trial}
