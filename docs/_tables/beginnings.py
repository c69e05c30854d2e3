"""How networks start: curvature and signal of the first steps, and cheap trials of recipes, each a row of a file of results."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from spread import mean_and_deviation

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
    order = [*NETWORKS].index
    for r in sorted(_records("sharpness.jsonl"), key=lambda r: order(r["network"])):
        shares = [layer["gradient"] / layer["norm"] for layer in r["layers"].values()]
        cells = [NETWORKS[r["network"]], _label(r["method"]), str(r["step"]), f"{r['loss']:.2f}"]
        values = [r["logits"], r["alike"], abs(r["eigenvalue"]), shares[0], median(shares), shares[-1], r["rate"]]
        cells += [_number(value) for value in (*values, min(layer["rate"] for layer in r["layers"].values()))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _trials() -> dict[tuple[str, str], dict[float, list[Record]]]:
    """Trials by network and method, then by learning rate; each of another seed."""
    found: dict[tuple[str, str], dict[float, list[Record]]] = {}
    for r in _records("recipes.jsonl"):
        found.setdefault((r["network"], r["method"]), {}).setdefault(r["lr"], []).append(r)
    return found


def recipes() -> str:
    """Held-out accuracy in percent and last training loss of each method at the best of its rates, best first."""
    head = "| Network | Method | Held-out accuracy | Seeds | Learning rate | Others tried | Last training loss |"
    rows = []
    for (network, method), rates in _trials().items():
        best = max(rates, key=lambda rate: _accuracy(rates[rate]))
        own, others = rates[best], ", ".join(f"{rate:g}" for rate in sorted(rates) if rate != best)
        accuracy = mean_and_deviation((100 * r["accuracy"] for r in own), 1)
        loss = fmean(r["losses"][-1] for r in own)
        row = f"| {NETWORKS[network]} | {_label(method)} | {accuracy} | {len(own)} | {best:g} | {others} | {loss:.2f} |"
        rows.append(([*NETWORKS].index(network), -_accuracy(own), row))
    return "\n".join([head, "|---|---|--:|--:|--:|--:|--:|", *(row for *_, row in sorted(rows, key=lambda part: part[:2]))])


def trial(network: str, method: str) -> str:
    """Held-out accuracy of a method at the best rate that was tried, the mean of its seeds."""
    found = [_accuracy(own) for own in _trials().get((network, method), {}).values()]
    return f"{max(found):.1%}" if found else "*not measured yet*"


def _accuracy(trials: list[Record]) -> float:
    return fmean(r["accuracy"] for r in trials)


MARKERS = {"sharpness": sharpness, "recipes": recipes, "trial": trial}
