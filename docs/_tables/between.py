"""What lies between two networks, from the file of results: a row for each way to bring them together."""

import json
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "barriers.jsonl"

ALIGNMENTS = RESULTS.with_name("alignment.jsonl")

PERMUTATIONS = RESULTS.with_name("permutations.jsonl")

FEW = 100
"""Reasons that hold fewer channels in all share a row."""

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


def held() -> str:
    """What keeps channels in place beside inputs and outputs: by operation and reason, most channels first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for r in (json.loads(line) for line in PERMUTATIONS.read_text("utf-8").splitlines()):
        for reason, channels in r.get("pins", {}).items():
            if reason not in ("model input", "model output"):
                found.setdefault(reason, []).append((channels, r["model"]))
    rows = ["| Operation, and why | Channels | Models | Most of them in |", "|---|--:|--:|---|"]
    number = {reason: sum(channels for channels, _ in models) for reason, models in found.items()}
    many = sorted((reason for reason in number if number[reason] >= FEW), key=lambda reason: -number[reason])
    for reason in many:
        rows.append(f"| {reason} | {number[reason]:,} | {len(found[reason])} | {max(found[reason])[1]} |")
    rest = [reason for reason in number if number[reason] < FEW]
    models = {model for reason in rest for _, model in found[reason]}
    rows.append(
        f"| {len(rest)} others, of fewer than {FEW} each | {sum(number[reason] for reason in rest):,} | {len(models)} | |"
    )
    return "\n".join(rows)


def permutations() -> str:
    """Models that were permuted, by library: how many, what was found, deviations, seconds."""
    rows = [
        "| Library | Models | Nothing found | Families | Largest deviation | Seconds to export | To find, after the export "
        "| Of scales' time |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    records = [json.loads(line) for line in PERMUTATIONS.read_text("utf-8").splitlines()]
    for zoo in sorted({r["zoo"] for r in records}):
        own = [r for r in records if r["zoo"] == zoo and "error" not in r]
        empty = ", ".join(r["model"] for r in own if not r["families"]) or "none"
        seconds = (median(r[f"{part}_seconds"] for r in own) for part in ("export", "interpretation"))
        families, largest = sum(r["families"] for r in own), max(r["deviation"] for r in own)
        both = [r for r in own if "interpretation_seconds_of_scales" in r]
        share = median(r["interpretation_seconds"] / r["interpretation_seconds_of_scales"] for r in both)
        cells = [
            zoo,
            str(len(own)),
            empty,
            str(families),
            f"{largest:.0e}",
            *(f"{value:.2g}" for value in seconds),
            f"{share:.0%}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


MARKERS = {"barriers": barriers, "alignments": alignments, "permutations": permutations, "held": held}
