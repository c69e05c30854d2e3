"""What discovery finds in the models of timm, torchvision and transformers, one row for each library, one for each of its
families, and the models that cannot be exported, with the reason; and in ONNX files that packages ship.
"""

import json
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "zoo.jsonl"
ONNX = RESULTS.with_name("onnx-files.jsonl")

Record = dict[str, Any]

_OBVIOUS = re.compile(r" \((no rule: taken to fit no scale|[^()]* is not homogeneous)\)$")
"""Reasons that say no more than the name of the operation."""


def zoo(part: str) -> str:
    """The summary, the errors, or the families of one library."""
    records = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    return {"summary": summary, "errors": errors}.get(part, lambda found: families(found, part))(records)


def summary(records: list[Record]) -> str:
    """Names, families, exports, deviations and seconds of each library."""
    rows = [
        "| library | models | exported | families | models run | largest deviation | seconds | interpretation / export, most |",
        "| --- |" + " ---: |" * 7,
    ]
    for zoo in dict.fromkeys(record["zoo"] for record in records):
        looked = [r for r in records if r["zoo"] == zoo and not r["run"]]
        ran = [r for r in records if r["zoo"] == zoo and r["run"] and "error" not in r]
        found = [r for r in looked if "error" not in r]
        worst = f"{max(r['deviation'] for r in ran):.1e}" if ran else "–"
        seconds = statistics.median(r["export_seconds"] + r["interpretation_seconds"] for r in found)
        ratio = max(r["interpretation_seconds"] / r["export_seconds"] for r in found)
        count = len({r["family"] for r in looked})
        rows.append(f"| {zoo} | {len(looked)} | {len(found)} | {count} | {len(ran)} | {worst} | {seconds:.1f} | {ratio:.1f} |")
    return "\n".join(rows)


def families(records: list[Record], zoo: str) -> str:
    """One row for each family: its smallest model with free channels that was run, or else looked at."""
    members: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["zoo"] == zoo and "error" not in record:
            members[record["family"]].append(record)
    are_single = all(len({record["model"] for record in found}) == 1 for found in members.values())
    several = [" family | models | smallest |", " --- | ---: | --- |"] if not are_single else [" model |", " --- |"]
    rows = [
        f"|{several[0]} channels free | weights that move | deviation (powers of two) | pinned by |",
        f"|{several[1]} ---: | ---: | ---: | --- |",
    ]
    for family, found in sorted(members.items()):
        models = {record["model"] for record in found}
        chosen = min(found, key=lambda r: (not r["run"], not r["free"], r["parameters"]))
        share = chosen["free"] / max(chosen["free"] + chosen["pinned"], 1)
        deviation = f"{chosen['deviation']:.0e}" if "deviation" in chosen else "–"
        if "deviation_powers_of_two" in chosen:
            deviation += f" ({chosen['deviation_powers_of_two']:.0e})"
        cells = [family] if are_single else [family, str(len(models)), chosen["model"]]
        cells += [f"{chosen['free']} ({share:.0%})", f"{chosen['coverage']:.0%}"]
        rows.append(f"| {' | '.join([*cells, deviation, _pins(chosen)])} |")
    return "\n".join(rows)


def _pins(record: Record) -> str:
    """The three reasons that pin most channels."""
    total = sum(record["pins"].values())
    reasons: Counter[str] = Counter()
    for reason, channels in record["pins"].items():
        reasons[_OBVIOUS.sub("", reason).removeprefix("aten.")] += channels
    return ", ".join(f"{reason} {channels / total:.0%}" for reason, channels in reasons.most_common(3))


def errors(records: list[Record]) -> str:
    """Models that were refused or failed."""
    failed = {record["model"]: record for record in records if "error" in record}.values()
    if not failed:
        return "None."
    rows = ["| library | model | reason |", "| --- | --- | --- |"]
    for record in failed:
        reason = " ".join(record["error"].split("Check first that")[0].split()).replace("|", "\\|")
        rows.append(f"| {record['zoo']} | {record['model']} | {reason[:300]} |")
    return "\n".join(rows)


def onnx_files() -> str:
    """ONNX files that packages ship: what is found, and how far outputs are apart. Of several runs the last counts."""
    records = {r["file"]: r for r in map(json.loads, ONNX.read_text("utf-8").splitlines()) if "error" not in r}
    rows = [
        "| file | classes free | weights that move | unread | read | any member, float64 | balanced (powers of two) | ℓ2 norm "
        "| seconds: read, find, balance | pinned by |",
        "| --- |" + " ---: |" * 8 + " --- |",
    ]
    for name, record in records.items():
        cells = [f"{name} ({record['package'].split()[1]})", str(record["free"]), f"{record['coverage']:.0%}"]
        cells += [str(len(record["unread"])), f"{record['deviation_reading']:.0e}"]
        if record["free"]:
            cells += [f"{record['deviation_random_float64']:.0e}"]
            cells += [f"{record['deviation_balanced']:.0e} ({record['deviation_powers_of_two']:.0e})"]
            cells += [f"{record['norm_before']:.0f} → {record['norm_after']:.0f}"]
        else:
            cells += ["–"] * 3
        cells.append(
            ", ".join(f"{record['seconds'][key]:.1f}" for key in ("read", "find", "balance") if key in record["seconds"])
        )
        rows.append(f"| {' | '.join([*cells, _pins(record)])} |")
    return "\n".join(rows)


def onnx_quantization() -> str:
    """MobileNetV2's file, prepared and equalized in several ways, in onnxruntime."""
    rows = [
        "| steps | file | free scales | signal over noise | same answer as in float | `Min` in float |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for record in map(json.loads, ONNX.with_name("onnx-quantization.jsonl").read_text("utf-8").splitlines()):
        if record["freed"] == "module":
            continue
        freed = record["freed"]
        name = (
            str(freed)
            if isinstance(freed, str)
            else "no Clip freed"
            if not freed
            else f"{'all' if freed == record['clips'] else 'the first'} {freed} Clips freed"
        )
        cells = ["each tensor" if record["scheme"] == "onnxruntime-tensor" else "each channel", name]
        cells += [f"{record['free']:,}" if "free" in record else "–", f"{record['decibels']:.1f} dB"]
        cells += [f"{record['agreement']:.0%}", str(record["operations"]["Min"])]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


MARKERS = {"zoo": zoo, "onnx_files": onnx_files, "onnx_quantization": onnx_quantization}
