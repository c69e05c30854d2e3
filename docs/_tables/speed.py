"""What steps and balancing cost, from the files of results. Of several runs on one machine the last counts."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

Record = dict[str, Any]


def _records(name: str) -> list[Record]:
    """What a benchmark wrote."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines()]


HOOKS = {
    "cyclic": "plain",
    "cyclic, compiled": "compiled",
    "cyclic, without gradients": "gradients zeroed",
    "cyclic, compiled, without gradients": "gradients zeroed, compiled",
}
"""Columns of the short table."""


def step() -> str:
    """One cycle by network, in steps of SGD."""
    records = _with_gradients()
    rows = [f"| network | weights | SGD's step | {' | '.join(HOOKS.values())} |", "| --- |" + " ---: |" * (len(HOOKS) + 2)]
    for record in records:
        cost = [f"{record['hook / SGD'][hook]['median']:.1f}" for hook in HOOKS]
        size, time = f"{record['parameters'] / 1e6:.1f} M", f"{record['seconds']['SGD']['median'] * 1e3:.1f} ms"
        rows.append(f"| {' | '.join([record['network'], size, time, *cost])} |")
    return "\n".join([*rows, "", f"Steps of SGD that one cycle adds. Float32, no weight decay; {_machines(records)}."])


def in_full() -> str:
    """Floor, SGD and hooks by network, as hooks are made by default: gradients are there, and move along."""
    return _steps(_with_gradients())


def zeroed() -> str:
    """The same of hooks that are told that gradients are zeroed."""
    return _steps([record for record in _records("step") if not record.get("gradients")])


def _with_gradients() -> list[Record]:
    return [record for record in _records("step") if record.get("gradients")]


def _steps(records: list[Record]) -> str:
    """The hooks as multiples of the floor and of SGD's step."""
    hooks = list(records[0]["hook / floor"])
    head = ["network", "weights", "decay", "floor", "SGD", *hooks]
    rows = [f"| {' | '.join(head)} |", "| --- | ---: | ---: |" + " ---: |" * (len(head) - 3)]
    latest = {(_machine(r), r["network"], r["dtype"], r["weight_decay"]): r for r in records}
    for (_, name, dtype, decay), record in latest.items():
        times = [f"{record['seconds'][key]['median'] * 1e3:.2f} ms" for key in ("floor", "SGD")]
        cost = [_cost(record, hook) for hook in hooks]
        millions = f"{record['parameters'] / 1e6:.1f} M {dtype}"
        rows.append(f"| {' | '.join([name, millions, f'{decay:g}', *times, *cost])} |")
    return "\n".join([*rows, "", f"{_machines(records)}."])


def _cost(record: Record, hook: str) -> str:
    floors, steps = record["hook / floor"][hook], record["hook / SGD"][hook]
    return _quartiles(floors, f"; {steps['median']:.1f} SGD")


def norms() -> str:
    """Cost of normalization and of the hook in one training iteration."""
    records = _records("norms")
    rows = ["| network | batch | iteration | BN | GN | ENorm | BN / ENorm | GN / ENorm |", "| --- |" + " ---: |" * 7]
    latest = {(_machine(r), r["network"], r["batch"]): r for r in records}
    for (_, name, batch), record in latest.items():
        costs = [_milliseconds(record["cost"][key]) for key in ("bn", "gn", "enorm")]
        ratios = [f"{record[f'{key} / ENorm']:.0f}" for key in ("BN", "GN")]
        rows.append(f"| {' | '.join([name, str(batch), _milliseconds(record['seconds']['baseline']), *costs, *ratios])} |")
    return "\n".join([*rows, "", f"{_machines(records)}."])


def convergence() -> str:
    """Reads and memory of balancing, by network, size, dtype and norm; plain and compiled."""
    records = _records("convergence")
    rows = [
        "| network | weights | p | one read | to 10⁻⁶ | to 10⁻¹⁰ | compiled, to 10⁻⁶ | to 10⁻¹⁰ | writing back | memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found: dict[tuple, dict[tuple[bool, float], Record]] = {}
    for record in records:
        key = (_machine(record), record["network"], record["parameters"], record["dtype"], record["p"])
        found.setdefault(key, {})[record["compile"], record["tol"]] = record
    for (_, name, parameters, dtype, p), runs in found.items():
        any_run = next(iter(runs.values()))
        reads = [_reads(runs.get((compile, tol))) for compile in (False, True) for tol in (1e-6, 1e-10)]
        size, memory = f"{parameters / 1e6:.0f} M {dtype}", max(run["memory"] for run in runs.values())
        back = f"{any_run['rescale_reads']:.0f}"
        cells = [name, size, f"{p:g}", f"{any_run['read_s'] * 1e3:.1f} ms", *reads, back, f"{memory:.0%}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", f"{_machines(records)}."])


def _reads(record: Record | None) -> str:
    if record is None:
        return ""
    low, high = record["spread"]
    return f"{record['balance_reads']:.0f} <small>({low:.0f}–{high:.0f})</small>"


def equalization() -> str:
    """Seconds of our solver and of others, and their ratios."""
    records = _records("equalization")
    head = "network | threads | p = 2 | p = ∞ | brevitas | L-BFGS, p = 2 | brevitas / p = 2 | brevitas / p = ∞ | L-BFGS / p = 2"
    rows = [f"| {head} |", "| --- |" + " ---: |" * 8]
    latest = {r["model"]: r for r in records if "processor" in r and not r.get("again")}
    if not latest:
        return "*Not measured yet.*"
    for name, record in latest.items():
        ways = ("p=2", "p=inf", "brevitas", "L-BFGS")
        seconds = [f"{record[key]['solve_apply_s']:.3f} s" if key in record else "–" for key in ways]
        ratios = [
            f"{record[key]:.1f}" if key in record else "–" for key in ("brevitas / p=2", "brevitas / p=inf", "L-BFGS / p=2")
        ]
        rows.append(f"| {' | '.join([name, str(record['threads']), *seconds, *ratios])} |")
    return "\n".join([*rows, "", f"{_machines([*latest.values()])}."])


def traffic() -> str:
    """Ways to find energies: what each moves beyond the update, in floors, predicted and measured."""
    records = _records("traffic")
    latest = {(_machine(r), r["network"]): r for r in records}
    head = ["energies", "predicted", *(f"{name}, {r['parameters'] / 1e6:.0f} M" for (_, name), r in latest.items())]
    rows = [f"| {' | '.join(head)} |", "| --- | ---: |" + " ---: |" * len(latest)]
    for way, moved in records[0]["bytes"].items():
        predicted = f"{moved / (16 * records[0]['parameters']):.1f}"
        cells = [_quartiles(record["floors"][way]) for record in latest.values()]
        rows.append(f"| {' | '.join([way, predicted, *cells])} |")
    return "\n".join([*rows, "", f"{_machines(records)}."])


def _quartiles(value: dict[str, float], more: str = "") -> str:
    return f"{value['median']:.1f} <small>({value['lower quartile']:.1f}–{value['upper quartile']:.1f}){more}</small>"


def _milliseconds(value: dict[str, float]) -> str:
    low, high = value["lower quartile"] * 1e3, value["upper quartile"] * 1e3
    return f"{value['median'] * 1e3:.0f} ms <small>({low:.0f}–{high:.0f})</small>"


def _machine(record: Record) -> str:
    place, threads = record.get("device", record["processor"]), record["threads"]
    clock = ", time of the process" if record.get("clock") == "cpu" else ""
    return f"{place}, {threads} thread{'s' if threads > 1 else ''}{clock}, PyTorch {record['torch']}"


def _machines(records: list[Record]) -> str:
    return "; ".join(sorted({_machine(record) for record in records}))


MARKERS = {
    "step": step,
    "step_in_full": in_full,
    "zeroed": zeroed,
    "traffic": traffic,
    "norms": norms,
    "convergence": convergence,
    "equalization": equalization,
}
