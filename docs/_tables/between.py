"""What lies between two networks, from the file of results: a row for each way to bring them together."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "barriers.jsonl"

ALIGNMENTS = RESULTS.with_name("alignment.jsonl")

Record = dict[str, Any]


def _records() -> list[Record]:
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []


def barriers() -> str:
    """Loss barrier, and accuracy at the ends and at the worst point between."""
    rows = [
        "| Network | Trained | Brought together by | Statistics | Barrier | Ends | Worst |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for r in _records():
        ends = min(r["accuracies"][0], r["accuracies"][-1])
        statistics = "measured again" if r["repaired"] else "interpolated" if "ResNet" in r["network"] else "none"
        cells = [
            r["network"],
            r["trained"],
            r["way"],
            statistics,
            f"{r['loss_barrier']:.3f}",
            f"{ends:.1%}",
            f"{min(r['accuracies']):.1%}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def alignments() -> str:
    """CPU seconds and distances of weight matching."""
    rows = ["| Network | By | CPU seconds | Distance before | After |", "|---|---|--:|--:|--:|"]
    for r in (json.loads(line) for line in ALIGNMENTS.read_text("utf-8").splitlines()):
        cells = [r["model"], r["way"], f"{r['cpu_seconds']:.1f}", f"{r['distance_before']:.3f}", f"{r['distance_after']:.3f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


MARKERS = {"barriers": barriers, "alignments": alignments}
