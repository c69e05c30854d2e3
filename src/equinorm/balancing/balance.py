"""Balance: the member of a network's rescaling orbit with least ℓp norm, and the record of how it was found."""

import contextlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, optim

from equinorm import native
from equinorm._display import count, drawing
from equinorm._errors import BalanceError, RescaleError, describe
from equinorm._modules import Choice, chosen
from equinorm._scaling import Scaling
from equinorm.balancing import description
from equinorm.balancing.assemble import problem
from equinorm.balancing.layout import layouts
from equinorm.balancing.problem import Problem
from equinorm.balancing.solver import solve
from equinorm.rescaling.orbit import Orbit

METHODS = ("two-level", "cyclic")

LEAST_P, LARGEST_P = 0.01, 100

LIMIT = 10_000
"""Largest number of cycles when none is asked for."""


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

    def apply_(self, optimizer: optim.Optimizer | None = None, power_of_two: bool = False) -> None:
        """Rescale the model in place to the balanced point.

        Args:
            optimizer: whose state to move along.
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
        return description.as_dict(self)

    def __str__(self) -> str:
        return description.text(self)

    def _repr_html_(self) -> str:
        return description.markup(self)


def balance(
    symmetries: Orbit,
    p: float,
    c: float,
    cycles: int | None,
    tol: float,
    method: str,
    biases: bool,
    modules: Choice | None,
    progress: Callable[[int, float], None] | None,
    compile: bool,
) -> Balance:
    """See `Symmetries.balance`."""
    check_options(p, c, cycles, tol, method)
    if progress is not None and not callable(progress):
        raise BalanceError(f"progress must be called with the number of a cycle and the residual, not be {progress!r}.")
    held = held_classes(symmetries, modules)
    scalings = counted(symmetries.scalings, biases)
    if modules is not None:
        scalings = [s for s in scalings if bool((~held[s.free()]).any())]
    if compile and any(symmetries.tensors[scaling.name].device.type in native.DEVICES for scaling in scalings):
        native.require()
    if not scalings:
        zero = torch.zeros(symmetries.num_free, dtype=torch.float64)
        return Balance(
            symmetries,
            zero,
            p,
            c,
            method,
            0.0,
            0.0,
            (0.0,),
            True,
            nothing_moves(symmetries, modules),
            (),
            (),
            symmetries.versions(),
        )
    precision = torch.float32 if tol >= 1e-6 else torch.float64
    ranges, tensors = symmetries.family_ranges, symmetries.tensors
    laid = layouts(scalings, ranges, symmetries.num_free, held)
    streams = method == "two-level" and not math.isinf(p)
    versions = symmetries.versions()
    start = torch.zeros(symmetries.num_free + 1, dtype=torch.float64)
    with contextlib.ExitStack() as stack:
        for device in {tensors[scaling.name].device.type for scaling in scalings}:
            if not torch.amp.is_autocast_available(device):
                continue
            stack.enter_context(torch.autocast(device, enabled=False))  # which would sum in half precision
        found = problem(laid, tensors, ranges, symmetries.num_free, p, c, precision, streams, compile)
        before = found.log_energies(start)
        solution = solve(found, method, cycles, tol, LIMIT, progress)
        if solution.problem is not found:  # edges of dead channels are not part of the norms
            found = solution.problem
            before = found.log_energies(start)
        after = found.log_energies(solution.z)
    is_void = bool(solution.dead.any()) and found.join(list(after.values())) == -math.inf
    converged = solution.residuals[-1] <= tol and not is_void
    if is_void:
        channels = count(int(solution.dead.sum()), "channel")
        reason = f"no path of nonzero weights joins any of {channels} to an input and an output: the norm has no minimum"
    elif converged:
        reason = f"residual at most {tol:g}"
    elif cycles is not None:
        reason = f"stopped after the {count(cycles, 'cycle')} asked for, residual above {tol:g}"
    elif math.isinf(p) and solution.residuals[-1] > tol and len(solution.residuals) <= LIMIT:
        reason = f"stands still {solution.residuals[-1]:.1e} above the least maximum; {_way(method)}"
    elif len(solution.residuals) <= LIMIT:
        reason = f"stopped where rounding keeps the residual at {min(solution.residuals):.1e}, above {tol:g}"
    else:
        reason = f"stopped at the limit of {LIMIT} cycles, residual above {tol:g}"
    return Balance(
        symmetries=symmetries,
        log_scales=solution.z[1:].clone(),
        p=p,
        c=c,
        method=method,
        norm_before=_norm(found, before.values()),
        norm_after=_norm(found, after.values()),
        residuals=solution.residuals,
        converged=converged,
        reason=reason,
        dead=tuple(solution.dead.nonzero().flatten().tolist()),
        versions=versions,
        energies=tuple(TensorEnergy(scalings[i].name, _exp(before[i]), _exp(after[i])) for i in sorted(before)),
    )


def _way(method: str) -> str:
    return "method='two-level' reaches it" if method == "cyclic" else "that is as far as rounding lets it"


def _norm(found: Problem, logs: Iterable[float]) -> float:
    return _exp(found.join(list(logs)) / found.q)


def _exp(log: float) -> float:
    """exp, inf beyond the largest float."""
    return math.exp(log) if log < 709.0 else math.inf


def counted(scalings: Iterable[Scaling], biases: bool) -> list[Scaling]:
    """Scalings of the tensors whose norm counts: weights that move, and biases if they are asked for."""
    return [s for s in scalings if s.factors and s.numel and s.kind == "parameter" and (biases or s.role == "weight")]


def nothing_moves(symmetries: Orbit, modules: Choice | None) -> str:
    """Why there is nothing to balance, in a sentence without its full stop: what pins most channels, and by what."""
    model = describe(symmetries.model)
    if not symmetries.num_free:
        pins = sorted(symmetries.pins, key=lambda pin: -pin.channels)
        shown = [f"{count(pin.channels, 'channel')} of {pin.tensor}[{pin.axis}] by {pin.reason}" for pin in pins[:3]]
        more = [f"and {len(pins) - 3} more"] if len(pins) > 3 else []
        return f"no hidden channel of {model} can be rescaled: {'; '.join(shown + more) or 'it has none'}"
    if modules is not None:
        return f"no hidden channel of {model} can be rescaled: none moves within the chosen modules alone"
    return f"no weight of {model} is to be balanced: what moves are biases, which do not count without biases=True, and buffers"


def check_options(p: float, c: float, cycles: int | None, tol: float, method: str) -> None:
    """Refuse options that are out of range."""
    for name, value in (("p", p), ("c", c), ("tol", tol)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BalanceError(f"{name} must be a number, not {value!r}.")
    if not (LEAST_P <= p <= LARGEST_P or p == math.inf):
        why = ": powers would underflow" if p > 0 else ": only positive p make a norm" if p <= 0 else ""
        raise BalanceError(f"p must be a number from {LEAST_P} to {LARGEST_P}, or math.inf, not {p!r}{why}.")
    if not (c > 0 and math.isfinite(c)):
        raise BalanceError(f"c must be a positive finite number, not {c!r}; 1 weighs all layers alike.")
    if cycles is not None and (isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 0):
        raise BalanceError(f"cycles must be None or an integer of at least 0, not {cycles!r}.")
    if not tol >= 0:
        raise BalanceError(f"tol must be at least 0, not {tol!r}.")
    if method not in METHODS:
        raise BalanceError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}.")


def held_classes(symmetries: Orbit, modules: Choice | None) -> Tensor:
    """Mask over 0..num_free of classes that move a tensor outside of the chosen modules."""
    held = torch.zeros(symmetries.num_free + 1, dtype=torch.bool)
    if modules is None:
        return held
    inside = chosen(symmetries.model, modules, BalanceError, "modules").values()
    moving = {id(tensor) for module in inside for tensor in (*module.parameters(), *module.buffers())}
    for scaling in symmetries.scalings:
        if id(symmetries.tensors[scaling.name]) not in moving:
            held[scaling.free()] = True
    return held
