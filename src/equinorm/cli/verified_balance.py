"""Balance a loaded model, verify its outputs, and report that: what `equinorm balance` and `equinorm demo` do."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from equinorm._deviation import LIMITS
from equinorm._errors import dtype_name
from equinorm._symmetries import Symmetries
from equinorm.balancing.balance import Balance, TensorEnergy
from equinorm.balancing.options import BalanceOptions
from equinorm.cli.exactness import VERIFYING, remedy, verified
from equinorm.cli.loading import Loaded
from equinorm.modules.choosing import tensors_of
from equinorm.modules.copying import duplicate
from equinorm.reporting.pictures import draw, pictured
from equinorm.reporting.records import Balanced, Weights
from equinorm.reporting.tables import table
from equinorm.reporting.words import deviation, energy_name, numbers, solution


@dataclass(frozen=True, slots=True)
class Balancing:
    """Record of `equinorm balance`: the fields of `Balance`, and what was verified and written.

    `energies` sum (have their maximum, if p = ∞) to `energy_before` and `energy_after`; norms are these to the power 1/p.
    """

    model: str
    inputs: str
    p: float
    c: float
    method: str
    biases: bool
    power_of_two: bool
    tol: float
    num_free: int
    dead: int
    norm_before: float
    norm_after: float
    energy_before: float
    energy_after: float
    energies: tuple[TensorEnergy, ...]
    residuals: tuple[float, ...]
    residual: float
    cycles: int
    converged: bool
    reason: str
    deviation: float
    limit: float
    dtype: str
    changed: bool
    seconds: float
    output: str | None = None
    report: str | None = None
    notes: tuple[str, ...] = ()


def verified_balance(
    loaded: Loaded,
    symmetries: Symmetries,
    options: BalanceOptions,
    *,
    power_of_two: bool = False,
    progress: Callable[[int, float], None] | None = None,
    pictured: bool = True,
) -> tuple[Balancing, list[Weights]]:
    """Balance a model in place and verify that its outputs stay; returns the record, and the weights to picture if so asked.

    With powers of two the record holds norm, energies and the last residual at the rounded scales. Where rounding would
    leave no smaller norm than before, the weights stay as they are.

    Raises:
        InexactError: if outputs deviate by more than the limit of the model's dtype; the model has changed then.
        EquinormError: if balancing or rescaling refuses.
    """
    started = time.perf_counter()
    model = loaded.model
    original = duplicate(model, VERIFYING)
    balance = symmetries.balance(**asdict(options), progress=progress)
    balance.apply_(power_of_two=power_of_two)
    norm, residual, energies, reason = balance.norm_after, balance.residual, balance.energies, balance.reason
    if power_of_two and balance.energies:
        norm, residual, energies, reason = _rounded(symmetries, balance, options, original)
    apart, dtype = verified("balanced", model, original, loaded, remedy(power_of_two))
    record = Balancing(
        model=loaded.title,
        inputs=loaded.inputs,
        p=options.p,
        c=options.c,
        method=options.method,
        biases=options.biases,
        power_of_two=power_of_two,
        tol=options.tol,
        num_free=symmetries.num_free,
        dead=len(balance.dead),
        norm_before=balance.norm_before,
        norm_after=norm,
        energy_before=_total(options.p, [energy.before for energy in energies]),
        energy_after=_total(options.p, [energy.after for energy in energies]),
        energies=energies,
        residuals=balance.residuals,
        residual=residual,
        cycles=balance.cycles,
        converged=balance.converged,
        reason=reason,
        deviation=apart,
        limit=LIMITS[dtype],
        dtype=dtype_name(dtype),
        changed=any(not torch.equal(a, b) for a, b in zip(_parameters(model), _parameters(original), strict=True)),
        seconds=time.perf_counter() - started,
        notes=loaded.notes,
    )
    return record, pictures(symmetries, tensors_of(original)) if pictured else []


def energies(rows: Sequence[TensorEnergy], before: float, after: float, p: float, c: float) -> Table:
    """Energy of every tensor before and after."""
    names = [*(row.name for row in rows), "maximum" if math.isinf(p) else "total"]
    columns = numbers([*(row.before for row in rows), before]), numbers([*(row.after for row in rows), after])
    *lines, total = zip(names, *columns, strict=True)
    return table(f"Energy {energy_name(p, c)}", [("tensor", False), ("before", True), ("after", True)], lines, total)


def _rounded(symmetries: Symmetries, balance: Balance, options: BalanceOptions, original: nn.Module):
    """Norm, residual, energies and reason at the rounded scales, or at the old weights if these are no better."""
    now = symmetries.balance(**{**asdict(options), "cycles": 0})
    reason = f"{balance.reason}; then rounded to powers of two"
    if now.norm_before >= balance.norm_before:
        symmetries.model.load_state_dict(original.state_dict())
        kept = tuple(TensorEnergy(e.name, e.before, e.before) for e in balance.energies)
        return balance.norm_before, balance.residuals[0], kept, "no power of two makes the norm smaller: the weights stay"
    after = {energy.name: energy.before for energy in now.energies}
    energies = tuple(TensorEnergy(e.name, e.before, after[e.name]) for e in balance.energies)
    return now.norm_before, now.residuals[0], energies, reason


def pictures(symmetries: Symmetries, before: Mapping[str, Tensor]) -> list[Weights]:
    """Consecutive weights as they were and as they are now."""
    tensors = symmetries.tensors
    return pictured(symmetries.scalings, before, lambda scaling: tensors[scaling.name])


def drawn(path: Path, record: Balancing, weights: Sequence[Weights]) -> bytes:
    """The report in the format that a path's suffix names; touches no file."""
    rounded = ", scales rounded to powers of two" if record.power_of_two else ""
    facts = (
        *solution(record),
        ("deviation of outputs", deviation(record.deviation)),
        ("method", record.method + rounded),
        ("asymmetry c", f"{record.c:g}"),
        ("free classes", f"{record.num_free:,}"),
        ("dead channels", f"{record.dead:,}"),
        ("model", record.model),
        ("inputs", record.inputs),
    )
    totals = record.energy_before, record.energy_after
    balanced = Balanced(record.model, record.p, record.c, record.energies, totals, record.residuals, record.tol, facts)
    return draw(path, balanced, weights)


def _total(p: float, energies: list[float]) -> float:
    return max(energies, default=0.0) if math.isinf(p) else math.fsum(energies)


def _parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]
