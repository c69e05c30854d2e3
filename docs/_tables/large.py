"""Checkpoints that were read in parts, and what that means for larger ones, from the file of results."""

from typing import Any

from speed import _machines, _records

Record = dict[str, Any]


def streamed() -> str:
    """What balancing took, by size of the folder."""
    records = [record for record in _records("checkpoints") if record["kind"] == "streamed"]
    heads = ("weights", "largest component", "most memory", "reads", "writes")
    rows = [f"| model | {' | '.join(heads)} | seconds | of these to find symmetries | processor |", "| --- |" + " ---: |" * 8]
    for record in sorted({record["bytes"]: record for record in records}.values(), key=lambda record: record["bytes"]):
        cells = [f"{record['model'].capitalize()}-like"]
        cells += [_size(record[key]) for key in ("bytes", "largest component", "peak bytes of memory")]
        cells += [f"{record[key]:.2f}" for key in ("reads", "writes")]
        cells += [f"{record[key]:.0f} s" for key in ("seconds", "seconds of analysis", "processor seconds")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", f"{_machines(records)}."])


def on_paper() -> str:
    """Components of large models, and how long they would take at the rate of the largest folder that was measured."""
    records = _records("checkpoints")
    known = max((record for record in records if record["kind"] == "streamed"), key=lambda record: record["bytes"])
    rate = (known["seconds"] - known["seconds of analysis"]) / known["bytes"]
    rows = ["| model | weights in bfloat16 | largest component | of it held on to | at that rate |", "| --- |" + " ---: |" * 4]
    for record in {record["name"]: record for record in records if record["kind"] == "paper"}.values():
        sizes = [_size(record[key]) for key in ("bytes", "largest component", "most that is held on to")]
        hours = rate * record["bytes"] / 3600
        rows.append(f"| {record['name']} | {' | '.join(sizes)} | {hours:.1f} h |")
    return "\n".join(rows)


def analysed() -> str:
    """What finding symmetries takes with several numbers of layers, and for each layer more."""
    rows = ["| model | layers | most memory | for each layer more | processor for each |", "| --- |" + " ---: |" * 4]
    records = {(r["name"], r["layers"]): r for r in _records("checkpoints") if r["kind"] == "analysis"}
    for name in dict.fromkeys(name for name, _ in records):
        few, *_, many = sorted((r for (other, _), r in records.items() if other == name), key=lambda r: r["layers"])
        more = many["layers"] - few["layers"]
        each = (many["peak bytes of memory"] - few["peak bytes of memory"]) / more
        seconds = (many["processor seconds of analysis"] - few["processor seconds of analysis"]) / more
        peaks = " → ".join(_size(record["peak bytes of memory"]) for record in (few, many))
        rows.append(f"| {name} | {few['layers']} → {many['layers']} | {peaks} | {each / 1e6:.1f} MB | {seconds:.2f} s |")
    return "\n".join(rows)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


MARKERS = {"streamed": streamed, "on_paper": on_paper, "analysed": analysed}
