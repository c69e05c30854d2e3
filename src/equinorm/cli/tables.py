"""Records as text for a terminal: rich tables whose totals add up."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from equinorm.balancing.balance import TensorEnergy
from equinorm.cli.demo import Demonstration
from equinorm.cli.records import Balancing, Comparison, Inspection
from equinorm.reporting.tables import facts, table
from equinorm.reporting.words import deviation, energy_name, norm_name, number, numbers, percent


def inspection(record: Inspection) -> RenderableType:
    """What `equinorm inspect` prints."""
    share, seconds = percent(record.moving, record.parameters), record.seconds_export + record.seconds_labels
    count = len(record.families)
    head = facts(
        [
            ("model", record.model),
            ("inputs", record.inputs),
            (
                "free classes",
                f"{record.num_free:,} in {count:,} {'family' if count == 1 else 'families'}",
            ),
            ("coverage", f"{share}: free classes move {record.moving:,} of {record.parameters:,} parameters"),
            ("seconds", f"{seconds:.2f} ({record.seconds_export:.2f} export, {record.seconds_labels:.2f} labels)"),
            *_notes(record.notes),
        ]
    )
    if record.families:
        families: RenderableType = table(
            "Free scale classes",
            [("family", False), ("classes", True), ("tensors moved", True)],
            [(f"{row.tensor}[{row.axis}]", f"{row.classes:,}", f"{row.tensors:,}") for row in record.families],
            ("total", f"{record.num_free:,}", ""),
        )
    else:
        families = Text("No free class: every channel is pinned.")
    rows = []
    for role, label in (("weight", "weights"), ("bias", "biases")):
        chosen = [row for row in record.tensors if row.role == role]
        entries, moving = sum(row.entries for row in chosen), sum(row.moving for row in chosen)
        rows.append((label, f"{len(chosen):,}", f"{entries:,}", f"{moving:,}", percent(moving, entries)))
    count = sum(row.kind == "parameter" for row in record.tensors)
    coverage = table(
        "Coverage",
        [("", False), ("tensors", True), ("entries", True), ("moving", True), ("share", True)],
        rows,
        ("parameters", f"{count:,}", f"{record.parameters:,}", f"{record.moving:,}", percent(record.moving, record.parameters)),
    )
    pins = table(
        "Pinned channels",
        [("axis", False), ("channels", True), ("reason", False), ("source line", False), ("module", False)],
        [
            (
                f"{pin.tensor}[{pin.axis}]",
                f"{pin.channels:,}",
                pin.operation + (f": {pin.detail}" if pin.detail else ""),
                pin.source + (f"  {pin.code}" if pin.code else ""),
                pin.module,
            )
            for pin in record.pins
        ],
        ("total", f"{sum(pin.channels for pin in record.pins):,}", "", "", ""),
    )
    return Group(head, Text(), families, coverage, pins if record.pins else Text("Nothing is pinned."))


def balancing(record: Balancing) -> RenderableType:
    """What `equinorm balance` prints."""
    pairs = [("model", record.model), ("inputs", record.inputs), ("free classes", f"{record.num_free:,}")]
    if record.energies:
        share = percent(record.norm_after - record.norm_before, record.norm_before)
        sign = "+" if record.norm_after > record.norm_before else ""
        pairs += [
            (f"{norm_name(record.p)} norm", f"{number(record.norm_before)} → {number(record.norm_after)} ({sign}{share})"),
            ("residual", f"{record.residuals[0]:.1e} → {record.residual:.1e}"),
            ("cycles", f"{record.cycles} {record.method}: {record.reason}"),
        ]
    else:
        pairs.append(("result", f"{record.reason}; the weights are unchanged"))
    if record.dead:
        pairs.append(("dead channels", f"{record.dead:,}, left at scale 1"))
    pairs.append(("deviation", f"{deviation(record.deviation)}; limit {record.limit:g} in {record.dtype}"))
    pairs += [(name, path) for name, path in (("written", record.output), ("report", record.report)) if path]
    pairs += _notes(record.notes)
    parts: list[RenderableType] = [facts(pairs)]
    if record.energies:
        parts += [Text(), energies(record.energies, record.energy_before, record.energy_after, record.p, record.c)]
    return Group(*parts)


def energies(rows: Sequence[TensorEnergy], before: float, after: float, p: float, c: float) -> Table:
    """Energy of every tensor before and after."""
    names = [*(row.name for row in rows), "maximum" if math.isinf(p) else "total"]
    columns = numbers([*(row.before for row in rows), before]), numbers([*(row.after for row in rows), after])
    *lines, total = zip(names, *columns, strict=True)
    return table(f"Energy {energy_name(p, c)}", [("tensor", False), ("before", True), ("after", True)], lines, total)


def comparison(record: Comparison) -> RenderableType:
    """What `equinorm compare` prints."""
    outputs = "equal" if record.same_outputs else "different"
    pairs = [
        ("first", record.model_a),
        ("second", record.model_b),
        ("inputs", record.inputs),
        ("outputs", f"{outputs}: deviation {deviation(record.deviation)}; limit {record.limit:g}"),
        *_notes(record.notes),
    ]
    if record.equivalent is None or record.difference is None:
        pairs.append(("weights", f"not compared: {record.note}"))
        return facts(pairs)
    verdict = "rescaling-equivalent" if record.equivalent else "not rescaling-equivalent"
    pairs.append(("weights", f"{verdict}: canonical forms differ by {record.difference:.1e}; tolerance {record.tolerance:g}"))
    if record.equivalent and record.largest_scale is not None:
        pairs.append(("scales", f"{record.num_scales:,}, the largest ×{record.largest_scale:.4g} or its inverse"))
    if record.note:
        pairs.append(("note", record.note))
    if not record.different:
        return facts(pairs)
    rows = [(row.tensor, f"{row.difference:.1e}") for row in record.different]
    return Group(facts(pairs), Text(), table("Tensors that differ", [("tensor", False), ("difference", True)], rows))


def demonstration(record: Demonstration) -> RenderableType:
    """What `equinorm demo` prints."""
    done = record.balancing
    stages = table(
        "The same function, three sets of weights",
        [
            ("", False),
            ("test accuracy", True),
            (f"{norm_name(done.p)} norm", True),
            ("residual", True),
            ("predictions changed", True),
        ],
        [
            (
                stage.name,
                percent(stage.accuracy, 1),
                number(stage.norm),
                f"{stage.residual:.1e}",
                f"{stage.predictions_changed:,} of {record.images:,}",
            )
            for stage in record.stages
        ],
    )
    exact = f"{record.deviation_power_of_two:.1g}"
    proof = facts(
        [
            ("predictions", f"{record.predictions_unchanged:,} of {record.images:,} unchanged"),
            ("deviation", f"{deviation(done.deviation)} with real scales; limit {done.limit:g} in {done.dtype}"),
            ("powers of two", f"{exact}: {record.outputs_equal:,} of {record.outputs:,} outputs bitwise the same"),
            ("balanced in", f"{done.cycles} cycles, {done.seconds:.2f} s: {done.reason}"),
        ]
    )
    return Group(
        facts(
            [
                ("network", f"{record.network} with ReLU, {record.parameters:,} parameters, {done.num_free:,} free classes"),
                ("training", f"{record.epochs} epochs on scikit-learn's digits, {record.seconds:.1f} s"),
            ]
        ),
        Text(),
        stages,
        proof,
        Text(),
        energies(done.energies, done.energy_before, done.energy_after, done.p, done.c),
        facts([("report", record.report)] if record.report else []),
    )


def _notes(notes: Sequence[str]) -> list[tuple[str, str]]:
    return [("note", note) for note in notes]
