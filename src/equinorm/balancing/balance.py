"""Balance: the member of a network's rescaling orbit with least ℓp norm, and the record of how it was found."""

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from equinorm import native
from equinorm._display import as_html, count, drawing, norm_name, plain
from equinorm._errors import BalanceError, RescaleError, describe
from equinorm.balancing.kept_layouts import kept_layout
from equinorm.balancing.minimum import minimum
from equinorm.balancing.norm import Norm, exp
from equinorm.balancing.options import LIMIT, BalanceOptions
from equinorm.balancing.scope import counted, held_classes, nothing_moves
from equinorm.balancing.solver import Progress, Solution
from equinorm.rescaling.optimizer_wrappers import Optimizers
from equinorm.rescaling.orbit import Orbit
from equinorm.rescaling.plan import Plan, plan_of
from equinorm.sharding.processes import processes_of

_RECORDED = "p", "c", "method", "norm_before", "norm_after", "residuals", "residual", "cycles", "converged", "reason", "dead"
"""What `Balance.to_dict` takes as it is."""


@dataclass(frozen=True, slots=True)
class TensorEnergy:
    """c_k·‖W‖_p^p of one tensor before and after (c_k·‖W‖_∞ if p = ∞)."""

    name: str
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """A balanced member of a network's orbit; the model is untouched until `apply_`.

    Attributes:
        symmetries: the orbit, of the model.
        log_scales: float64 natural logarithms of shape (num_free,), from the current weights to the balanced ones.
        p: the norm.
        c: the asymmetry.
        method: "two-level" or "cyclic".
        norm_before: (Σ_k c_k ‖W_k‖_p^p)^{1/p} over the balanced weights, with c_k = c^(−pk) for a weight of depth k.
        norm_after: the same at the balanced point.
        residuals: ρ = ‖r − s‖₁ / ‖r + s‖₁ before the first cycle and after each, r and s the in- and out-energies of channels.
            For p = ∞ the gap 1 − t* / t between the largest weight t and the least that any rescaling reaches.
        cycles: number of cycles that ran.
        converged: is the last residual at most `tol`? False where all channels are dead, so that there is no minimum.
        reason: why the iteration stopped.
        dead: ids (1..num_free) of channels without a path of nonzero weights from an input and to an output; they stay at
            scale 1.
        energies: of every balanced tensor, before and after.
        versions: counters of the weights' in-place changes when they were read; `apply_` refuses others.
    """

    symmetries: Orbit = field(repr=False)
    log_scales: Tensor = field(repr=False)
    p: float
    c: float
    method: str
    norm_before: float
    norm_after: float
    residuals: tuple[float, ...] = field(repr=False)
    converged: bool
    reason: str
    dead: tuple[int, ...] = field(repr=False)
    energies: tuple[TensorEnergy, ...] = field(repr=False)
    versions: tuple[int, ...] = field(repr=False, default=())

    @property
    def residual(self) -> float:
        """The last of `residuals`."""
        return self.residuals[-1]

    @property
    def cycles(self) -> int:
        """Number of cycles that ran."""
        return len(self.residuals) - 1

    def apply_(self, optimizer: Optimizers | None = None, power_of_two: bool = False) -> None:
        """Rescale the model in place to the balanced point.

        Args:
            optimizer: one or several, whose state to move along.
            power_of_two: round every scale to a power of two, so that outputs stay bitwise the same through linear layers,
                convolutions, ReLU and pooling (under- and overflow aside; gains written 1 + w are rounded).

        Raises:
            RescaleError: if the weights have changed since they were read, or if the result would not be exact; nothing is
                written then.
        """
        if self.versions != self.symmetries.versions():
            raise RescaleError(
                "the weights have changed since this balance was computed. Compute it again: symmetries.balance()."
            )
        self.symmetries.rescale_(self.log_scales, optimizer, power_of_two)

    def plan(self, power_of_two: bool = False) -> Plan:
        """This point of the orbit apart from the model: to save, and to apply to other copies of its weights.

        Args:
            power_of_two: round every scale to a power of two.
        """
        return plan_of(self.symmetries, self.log_scales, power_of_two)

    def plot(self, axes: Any = None) -> Any:
        """Draw the energies of all tensors before and after, and the residual by cycle. Needs matplotlib.

        Args:
            axes: two axes of matplotlib to draw in; None for a new figure.

        Returns:
            The two axes.

        Raises:
            EquinormError: if matplotlib is not installed.
        """
        return drawing().plot(self, axes)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write facts, pictures and energies as one page (.html) or picture (.png), whole or not at all. Needs matplotlib.

        Weights are pictured as they are and as they would be, as long as they are those that were read: before `apply_`.

        Args:
            path: of the file; one that exists is replaced.

        Raises:
            EquinormError: if the file cannot be written, or matplotlib is not installed.
        """
        drawing().report(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it: all but the model; numbers that are not finite are the strings "inf" and "nan".

        >>> import json, torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> record = equinorm.balance_(net, (torch.randn(1, 8),)).to_dict()
        >>> json.loads(json.dumps(record)) == record, record["converged"], len(record["log_scales"])
        (True, True, 16)
        """
        record = {name: getattr(self, name) for name in _RECORDED}
        energies = [asdict(energy) for energy in self.energies]
        return plain({**record, "energies": energies, "log_scales": self.log_scales.tolist()})

    def __str__(self) -> str:
        if not self.energies:
            return self.reason
        asymmetry = f", c = {self.c:g}" if self.c != 1 else ""
        return (
            f"{norm_name(self.p)} norm {self.norm_before:.6g} → {self.norm_after:.6g}{asymmetry}, residual "
            f"{self.residual:.1e} after {count(self.cycles, f'{self.method} cycle')}"
            + ("" if self.converged else f": {self.reason}")
            + (f"; {count(len(self.dead), 'dead channel')} left at scale 1" if self.dead else "")
        )

    def _repr_html_(self) -> str:
        title = f"Balance of {describe(self.symmetries.model)}"
        if not self.energies:
            return as_html(title, [("result", self.reason)])
        cycles = count(self.cycles, f"{self.method} cycle")
        facts = [
            (f"{norm_name(self.p)} norm", f"{self.norm_before:.6g} → {self.norm_after:.6g}"),
            ("residual", f"{self.residuals[0]:.1e} → {self.residual:.1e} after {cycles}"),
            *([("asymmetry c", f"{self.c:g}")] if self.c != 1 else []),
            ("result", self.reason),
            *([("left at scale 1", count(len(self.dead), "dead channel"))] if self.dead else []),
        ]
        rows = [(energy.name, f"{energy.before:.6g}", f"{energy.after:.6g}") for energy in self.energies]
        return as_html(title, facts, (("energy of", "before", "after"), rows, "tensors"))


def balance(symmetries: Orbit, options: BalanceOptions, progress: Progress | None = None) -> Balance:
    """See `Symmetries.balance`."""
    held = held_classes(symmetries, options.modules)
    scalings = counted(symmetries.scalings, options.biases)
    if options.modules is not None:
        scalings = [s for s in scalings if bool((~held[s.free()]).any())]
    tensors = symmetries.tensors
    versions = symmetries.versions(tensors)
    devices = {tensors[scaling.name].device.type for scaling in scalings}
    if options.compile and not devices.isdisjoint(native.DEVICES):
        native.require()
    if not scalings:
        return _unmoved(symmetries, options)
    network = kept_layout(symmetries, scalings, held)
    processes = processes_of(tensors)
    if processes is not None:
        _check_shared(options)
        options = replace(options, compile=bool(options.compile))
    least = minimum(network, tensors, options, progress, devices, processes)
    solution, before, after = least.solution, least.before, least.after
    is_void = bool(solution.dead.any()) and options.norm.join(list(after.values())) == -math.inf
    converged = solution.residuals[-1] <= options.tol and not is_void
    return Balance(
        symmetries=symmetries,
        log_scales=solution.z[1:].clone(),
        p=options.p,
        c=options.c,
        method=options.method,
        norm_before=_norm(options.norm, before.values()),
        norm_after=_norm(options.norm, after.values()),
        residuals=solution.residuals,
        converged=converged,
        reason=_reason(solution, options, converged, is_void),
        dead=tuple(solution.dead.nonzero().flatten().tolist()),
        versions=versions,
        energies=tuple(TensorEnergy(scalings[i].name, exp(before[i]), exp(after[i])) for i in sorted(before)),
    )


def _check_shared(options: BalanceOptions) -> None:
    """Refuse what would read sharded tensors in another way than all at once."""
    if options.norm.is_max:
        raise BalanceError(
            "p = inf looks for single weights among all, and no process holds all of a sharded model. Use a finite p, as 2 or "
            "10, or balance the model before it is sharded."
        )
    if options.method == "cyclic":
        raise BalanceError(
            "method='cyclic' sums over processes once for every layer of every cycle, on a sharded model: use "
            "method='two-level', which leads to the same weights, or ENorm to follow Algorithm 1 while training."
        )


def _unmoved(symmetries: Orbit, options: BalanceOptions) -> Balance:
    """The record where nothing is to be balanced."""
    return Balance(
        symmetries=symmetries,
        log_scales=torch.zeros(symmetries.num_free, dtype=torch.float64),
        p=options.p,
        c=options.c,
        method=options.method,
        norm_before=0.0,
        norm_after=0.0,
        residuals=(0.0,),
        converged=True,
        reason=nothing_moves(symmetries, options.modules),
        dead=(),
        energies=(),
        versions=symmetries.versions(),
    )


def _reason(solution: Solution, options: BalanceOptions, converged: bool, is_void: bool) -> str:
    """Why the iteration stopped, in words."""
    residuals, tol = solution.residuals, options.tol
    if is_void:
        channels = count(int(solution.dead.sum()), "channel")
        return f"no path of nonzero weights joins any of {channels} to an input and an output: the norm has no minimum"
    if converged:
        return f"residual at most {tol:g}"
    if options.cycles is not None:
        return f"stopped after the {count(options.cycles, 'cycle')} asked for, residual above {tol:g}"
    if len(residuals) > LIMIT:
        return f"stopped at the limit of {LIMIT} cycles, residual above {tol:g}"
    if options.norm.is_max and residuals[-1] > tol:
        rest = "method='two-level' reaches it" if options.method == "cyclic" else "that is as far as rounding lets it"
        return f"stands still {residuals[-1]:.1e} above the least maximum; {rest}"
    return f"stopped where rounding keeps the residual at {min(residuals):.1e}, above {tol:g}"


def _norm(norm: Norm, log_energies: Iterable[float]) -> float:
    return exp(norm.join(list(log_energies)) / norm.q)
