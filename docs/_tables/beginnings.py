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
    order = [*NETWORKS].index
    for r in sorted(_records("sharpness.jsonl"), key=lambda r: order(r["network"])):
        shares = [layer["gradient"] / layer["norm"] for layer in r["layers"].values()]
        cells = [NETWORKS[r["network"]], _label(r["method"]), str(r["step"]), f"{r['loss']:.2f}"]
        values = [r["logits"], r["alike"], abs(r["eigenvalue"]), shares[0], median(shares), shares[-1], r["rate"]]
        cells += [_number(value) for value in (*values, min(layer["rate"] for layer in r["layers"].values()))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _trials() -> dict[tuple[str, str, float], list[Record]]:
    """Trials by network, method and learning rate; each of another seed."""
    found: dict[tuple[str, str, float], list[Record]] = {}
    for r in _records("recipes.jsonl"):
        found.setdefault((r["network"], r["method"], r["lr"]), []).append(r)
    return found


def recipes() -> str:
    """Held-out accuracy and last training loss of each method at the best of its rates, best first."""
    rows = [
        "| Network | Method | Held-out accuracy | Learning rate | Others tried | Last training loss |",
        "|---|---|--:|--:|--:|--:|",
    ]
    trials, best = _trials(), {}
    for network, method, rate in sorted(trials, key=_accuracy):
        best[network, method] = rate
    for network, method in sorted(best, key=lambda key: ([*NETWORKS].index(key[0]), -_accuracy((*key, best[key])))):
        own = trials[network, method, best[network, method]]
        others = sorted(rate for *key, rate in trials if key == [network, method] and rate != best[network, method])
        seeds = " and ".join(f"{r['accuracy']:.1%}" for r in own)
        cells = [
            NETWORKS[network],
            _label(method),
            seeds,
            f"{best[network, method]:g}",
            ", ".join(f"{rate:g}" for rate in others),
        ]
        rows.append(f"| {' | '.join(cells)} | {fmean(r['losses'][-1] for r in own):.2f} |")
    return "\n".join(rows)


def _accuracy(key: tuple[str, str, float]) -> float:
    return fmean(r["accuracy"] for r in _trials()[key])


def trial(network: str, method: str) -> str:
    """Held-out accuracy of a method at the best rate that was tried, the mean of its seeds."""
    found = [fmean(r["accuracy"] for r in own) for key, own in _trials().items() if key[:2] == (network, method)]
    return f"{max(found):.1%}" if found else "*not measured yet*"


MARKERS = {"sharpness": sharpness, "recipes": recipes, "trial": trial}
