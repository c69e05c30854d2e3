"""The report of `equinorm balance` and `equinorm demo`. Renders to bytes; touches no files."""

from collections.abc import Sequence
from pathlib import Path

from equinorm.cli.verified_balance import Balancing
from equinorm.reporting import pictures
from equinorm.reporting.records import Balanced, Weights
from equinorm.reporting.words import deviation, solution


def draw(path: Path, record: Balancing, weights: Sequence[Weights]) -> bytes:
    """The report in the format that a path's suffix names."""
    return pictures.draw(path, _balanced(record), weights)


def _balanced(record: Balancing) -> Balanced:
    rounded = ", scales rounded to powers of two" if record.power_of_two else ""
    facts = [
        *solution(record),
        ("deviation of outputs", deviation(record.deviation)),
        ("method", record.method + rounded),
        ("asymmetry c", f"{record.c:g}"),
        ("free classes", f"{record.num_free:,}"),
        ("dead channels", f"{record.dead:,}"),
        ("model", record.model),
        ("inputs", record.inputs),
    ]
    totals = record.energy_before, record.energy_after
    return Balanced(record.model, record.p, record.c, record.energies, totals, record.residuals, record.tol, tuple(facts))
