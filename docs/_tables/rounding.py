"""What rounding costs trained networks, from the file of results: a table for each network, and the aims row by row."""

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from spread import mean_and_deviation

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "quantization.jsonl"

Record = dict[str, Any]

METHODS = {
    "none": "none",
    "p=2": "p = 2",
    "p=inf": "p = ∞",
    "brevitas": "brevitas",
    "aimet": "AIMET",
    "smooth": "SmoothQuant",
    "modelopt": "ModelOpt",
    "noise": "noise",
}

PEERS = ("brevitas", "aimet", "smooth", "modelopt")
"""Methods of others."""

SETTINGS = {
    "w8-tensor": "W8, tensor",
    "w8a8-tensor": "W8A8, tensor",
    "w8a8-channel": "W8A8, channel",
    "onnxruntime-tensor": "onnxruntime, tensor",
    "onnxruntime-channel": "onnxruntime, channel",
    "pt2e-x86-tensor": "PT2E x86, tensor",
    "pt2e-x86-channel": "PT2E x86, channel",
    "pt2e-xnnpack-tensor": "PT2E XNNPACK, tensor",
    "pt2e-xnnpack-channel": "PT2E XNNPACK, channel",
    "w4-channel": "W4, channel",
    "w4-group": "W4, groups of 32",
    "w4-channel-clipped": "W4, channel, clipped",
}

DRAWS = 4
"""Of a full row."""

FLOATING = ("Min", "Max", "Sub", "Relu", "Clip")
"""Operations that onnxruntime runs in float between two roundings."""

NOTES = {
    "†": " †: made anew, with a newer algorithm than the other rows.",
    "<sup>": " A small number: over so many draws only. Bold: best over the draws that all have.",
}
"""What marks mean."""

LEVEL = 0.3
"""dB within which two methods are called level."""


def everything() -> list[Record]:
    """All records without errors."""
    found = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []
    return [record for record in found if "error" not in record]


def records(network: str) -> dict[tuple[str, str], Record]:
    """The last record of each setting and method."""
    return {(r["setting"], r["method"]): r for r in everything() if r["network"] == network}


def mark(record: Record) -> str:
    """What sets a record apart: fewer draws, or another algorithm than most have."""
    used = Counter(other["algorithm"] for other in everything() if other["method"] == "noise")
    is_apart = record["method"] == "noise" and record["algorithm"] != used.most_common(1)[0][0]
    few = len(record["draws"]) < DRAWS
    return "†" * is_apart + (f"<sup>{len(record['draws'])}</sup>" if few else "")


def mean(record: Record, kind: str, key: str = "db", draws: int = DRAWS) -> float:
    """Mean over the first draws."""
    return statistics.mean(draw[kind][key] for draw in record["draws"][:draws])


def network(name: str, kind: str) -> str:
    """Signal to noise by setting and method, with its spread over draws and the agreement with the float network."""
    found = records(name)
    methods = [method for method in METHODS if any(other == method for _, other in found)]
    if not methods:
        return "*Not measured yet.*"
    rows = [f"| | {' | '.join(METHODS[method] for method in methods)} |", "| --- |" + " ---: |" * len(methods)]
    for setting, title in SETTINGS.items():
        row = {method: found[setting, method] for method in methods if (setting, method) in found}
        if row:
            draws = min(len(record["draws"]) for record in row.values())
            means = {method: mean(record, kind, draws=draws) for method, record in row.items()}
            best = [method for method, value in means.items() if value > max(means.values()) - 0.05]
            cells = [_cell(row[method], kind, method in best) if method in row else "" for method in methods]
            rows.append(f"| {title} | {' | '.join(cells)} |")
    first = next(iter(found.values()))
    note = f"Decibels, mean ± standard deviation over {DRAWS} draws of {first['images']} samples to calibrate, as many to test"
    apart = "".join({text: None for symbol, text in NOTES.items() if any(symbol in row for row in rows)})
    return "\n".join([*rows, "", f"{note}.{apart} Weights from {first['source']}."])


def _cell(record: Record, kind: str, is_best: bool) -> str:
    said = mean_and_deviation((draw[kind]["db"] for draw in record["draws"]), 1)
    said = (f"**{said}**" if is_best else said) + mark(record)
    if record["draws"][0][kind]["agreement"] is None:
        return said
    return f"{said} <small>({mean(record, kind, 'agreement'):.0%})</small>"


def accuracy(*names: str) -> str:
    """How many answers are right, of the float network and of rounded ones, without bias correction."""
    rows = ["| | | float | none | p = ∞ | brevitas | noise | noise, bias corrected |", "| --- | --- |" + " ---: |" * 6]
    for name in names:
        found = records(name)
        for setting, title in SETTINGS.items():
            if (setting, "noise") not in found or found[setting, "noise"]["draws"][0]["plain"]["accuracy"] is None:
                continue
            kinds = [(method, "plain") for method in ("none", "p=inf", "brevitas", "noise")] + [("noise", "corrected")]
            shown = [_percent(found.get((setting, method)), kind, "accuracy") for method, kind in kinds]
            exact = _percent(found[setting, "noise"], "plain", "float_accuracy")
            rows.append(f"| {name} | {title} | {exact} | {' | '.join(shown)} |")
    return "\n".join(rows) if len(rows) > 2 else "*Not measured yet.*"


def _percent(record: Record | None, kind: str, key: str) -> str:
    return "" if record is None else f"{mean(record, kind, key):.0%}"


def aims(*names: str) -> str:
    """Noise against doing nothing and the best of others, over the draws that all in a row have."""
    rows = [
        "| | | noise − none | noise − best of others | … both with bias correction | best or level |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name in names:
        found = records(name)
        for setting, title in SETTINGS.items():
            row = {method: found[setting, method] for method in METHODS if (setting, method) in found}
            if "noise" not in row or "none" not in row:
                continue
            rest = [record for method, record in row.items() if method in PEERS]
            cells = [_gap(row["noise"], [row["none"]], "plain"), _gap(row["noise"], rest, "plain")]
            cells.append(_gap(row["noise"], rest, "corrected"))
            draws = min(len(record["draws"]) for record in row.values())
            others = [mean(record, "plain", draws=draws) for method, record in row.items() if method != "noise"]
            behind = max(others) - mean(row["noise"], "plain", draws=draws)
            verdict = "yes" if behind <= 0 else "level" if behind <= LEVEL else f"**no**, by {behind:.1f} dB"
            rows.append(f"| {name} | {title}{mark(row['noise'])} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(rows) if len(rows) > 2 else "*Not measured yet.*"


def _gap(record: Record, others: list[Record], kind: str) -> str:
    draws = min(len(other["draws"]) for other in [record, *others])
    means = [mean(other, kind, draws=draws) for other in [record, *others]]
    return f"{means[0] - max(means[1:]):+.1f} dB" if others else ""


def seconds(*names: str) -> str:
    """Seconds of the processor that each method takes."""
    rows = [f"| | {' | '.join(METHODS.values())} |", "| --- |" + " ---: |" * len(METHODS)]
    for name in names:
        found = records(name)
        cells = []
        for method in METHODS:
            known = [draw for (_, other), r in found.items() if other == method for draw in r["draws"]]
            taken = [draw["processor_seconds"] for draw in known if "processor_seconds" in draw]
            cells.append(f"{statistics.median(taken):.1f}" if taken else "")
        if any(cells):
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else "*Not measured yet.*"


def duration() -> str:
    """How long equalizing takes, by part."""
    path = RESULTS.with_name("quantization-seconds.jsonl")
    held = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    if not held:
        return "*Not measured yet.*"
    parts = [*held[-1]["parts"]]
    rows = [f"| | threads | elapsed | processor | {' | '.join(parts)} | load |", "| --- |" + " ---: |" * (len(parts) + 4)]
    for r in held:
        cells = [str(r["threads"]), *(f"{r[key]:.0f} s" for key in ("seconds", "processor_seconds"))]
        cells += [f"{r['parts'].get(part, 0):.0f} s" for part in parts] + [f"{r['load']:.0f}"]
        rows.append(f"| {r['network']}, {SETTINGS[r['setting']]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def bounds() -> str:
    """Forms of a bound for each channel: milliseconds, operations and roundings."""
    held = [json.loads(line) for line in RESULTS.with_name("bounds.jsonl").read_text("utf-8").splitlines()]
    found = {record["form"]: record for record in held}
    rows = [
        "| form | onnxruntime | × ReLU6 | operations between integers | roundings in onnxruntime | PT2E, x86 | PT2E, XNNPACK |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for form, record in found.items():
        operations = record["operations"]
        extra = ", ".join(f"{count} {name}" for name, count in operations.items() if name in FLOATING)
        ratio = record["milliseconds"] / found["ReLU6"]["milliseconds"]
        cells = [
            f"`{form}`",
            f"{record['milliseconds']:.2f} ms",
            f"{ratio:.1f}",
            extra or "none",
            str(operations["QuantizeLinear"]),
        ]
        rows.append(f"| {' | '.join([*cells, str(record['x86_roundings']), str(record['xnnpack_roundings'])])} |")
    return "\n".join(rows)


MARKERS = {
    "bounds": bounds,
    "quantization": network,
    "quantization_accuracy": accuracy,
    "quantization_aims": aims,
    "quantization_duration": duration,
    "quantization_seconds": seconds,
}
