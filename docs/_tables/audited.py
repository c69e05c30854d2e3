"""Tables of mappings beside scale groups, from the file of results."""

import json
import re
from typing import Any

from speed import RESULTS

Record = dict[str, Any]

AS_IT_WAS = 1e-4
"""Below this a deviation is rounding: norms, rotary embeddings and 1 + gain are computed in float32."""

ROUTER = {
    ("Cohere2MoeForCausalLM", "SmoothQuant"),
    ("Cohere2MoeForCausalLM", "AWQ"),
    ("DeepseekV2ForCausalLM", "AWQ"),
    ("Glm4MoeLiteForCausalLM", "AWQ"),
    ("GlmMoeDsaForCausalLM", "AWQ"),
    ("Qwen3NextForCausalLM", "AWQ"),
    ("Qwen3_5MoeForCausalLM", "AWQ"),
    ("Qwen3_5MoeForConditionalGeneration", "AWQ"),
}
"""Where a comment in llm-compressor's source speaks of the router: left out on purpose, or still to be added."""


def _records() -> list[Record]:
    lines = (RESULTS / "mappings.jsonl").read_text("utf-8").splitlines()
    return list({(record["architecture"], record.get("table")): record for record in map(json.loads, lines)}.values())


def audit_versions() -> str:
    """What was looked at, and when."""
    record = next(record for record in _records() if "table" in record)
    names = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{names}; run on {record['date']}"


def audited(kind: str) -> str:
    """One row for each table of mappings of a kind: "wrong", "raising" or "right"."""
    if kind == "right":
        return _right()
    rows = []
    for record in _records():
        if "table" not in record or _kind(record) != kind:
            continue
        name = f"{record['architecture']}, {record['table']}" + ("" if record["listed"] else " (default table)")
        ours = record.get("from groups", {})
        same = f"{_small(ours['deviation'])} ({ours['scaled']})" if "deviation" in ours else ours.get("error", "–")
        if kind == "wrong":
            rows.append(f"| {name} | {record['deviation']:.2g} ({record['scaled']}) | {same} | {_said(record)} |")
        else:
            rows.append(f"| {name} | {_error(record['error'])} | {same} |")
    head = "| architecture, table | deviation (mappings) | from groups (mappings) |"
    if kind == "wrong":
        return "\n".join([f"{head} what the groups say |", "| --- | ---: | ---: | --- |", *rows])
    return "\n".join(
        ["| architecture, table | llm-compressor raises | from groups (mappings) |", "| --- | --- | ---: |", *rows]
    )


def _right() -> str:
    """Every table that leaves the function as it is."""
    rows = [
        "| architecture | table | mappings | deviation | mappings from groups | deviation |",
        "| --- | --- |" + " ---: |" * 4,
    ]
    for record in _records():
        if "table" in record and _kind(record) == "right":
            ours = record.get("from groups", {})
            table = record["table"] + ("" if record["listed"] else " (default)")
            end = f"{ours['scaled']} | {_small(ours['deviation'])}" if "deviation" in ours else "0 | –"
            rows.append(f"| {record['architecture']} | {table} | {record['scaled']} | {_small(record['deviation'])} | {end} |")
    return "\n".join(rows)


def not_audited() -> str:
    """Architectures of the tables that could not be looked at, and why."""
    found: dict[str, list[str]] = {}
    for record in _records():
        why = record.get("not built") or record.get("not taken apart") or record.get("not analysed")
        if why and record["architecture"] not in found.get(why, ()):
            found.setdefault(why, []).append(record["architecture"])
    return "\n".join(f"- {', '.join(names)}: {why}." for why, names in found.items()) or "None."


def audit_counts() -> str:
    """How many tables are right, wrong, and raise."""
    kinds = [_kind(record) for record in _records() if "table" in record]
    counts = {kind: kinds.count(kind) for kind in ("right", "wrong", "raising", "empty")}
    empty = f", {counts['empty']} match nothing" if counts["empty"] else ""
    return (
        f"Of {len(kinds)} tables {counts['right']} leave the function as it is, {counts['wrong']} change it, "
        f"{counts['raising']} cannot be resolved or applied{empty}."
    )


def _kind(record: Record) -> str:
    if "error" in record:
        return "raising"
    if not record["scaled"]:
        return "empty"
    return "wrong" if record["deviation"] > AS_IT_WAS else "right"


def _said(record: Record) -> str:
    """What the groups say, in short: names without the parts that all have in common."""
    parts: dict[str, list[str]] = {}
    for text in record.get("wrong", {}):
        smooth, _, said = text.partition(": ")
        parts.setdefault(_short(smooth), []).append(_short(said))
    texts = [f"`{smooth}` {', '.join(_joined(said))}" for smooth, said in parts.items()]
    if (record["architecture"], record["table"]) in ROUTER:
        texts.append("a comment in the source speaks of the router")
    if record.get("not analysed"):
        texts.append(f"not analysed: {record['not analysed']}")
    return "; ".join(texts).replace("|", "\\|") or "nothing: see below"


def _joined(said: list[str]) -> list[str]:
    """Each kind of remark once, with all names that it is about."""
    misses = [text.removeprefix("misses ") for text in said if text.startswith("misses ")]
    vain = [text for text in said if " does not read what " in text]
    rest = [text for text in said if not text.startswith("misses ") and text not in vain]
    found = [f"misses {', '.join(f'`{name}`' for name in misses)}"] if misses else []
    if vain:
        found.append(f"names {', '.join(f'`{text.split()[0]}`' for text in vain)}, which do not read it")
    return found + [re.sub(r"^\S+ is pinned by (\S+)", r"and is pinned by `\1`", text) for text in rest]


def _short(text: str) -> str:
    text = re.sub(r"(model\.)?(language_model\.|decoder\.|encoder\.)*(layers|h)\.\*\.", "", text)
    return re.sub(r"\.weight\b(\[\d\])?|\[\d\]$", "", text)


def _small(deviation: float) -> str:
    return f"{deviation:.0e}" if deviation else "0"


def _error(text: str) -> str:
    kept = re.sub(r" for mapping: .*", "", text)
    kept = re.sub(r"\[('[^']*'), ('[^']*')(, '[^']*')+\]", r"[\1, \2, …]", kept)
    return f"`{kept.replace('|', chr(92) + '|')}`"


MARKERS = {
    "audited": audited,
    "not_audited": not_audited,
    "audit_versions": audit_versions,
    "audit_counts": audit_counts,
}
