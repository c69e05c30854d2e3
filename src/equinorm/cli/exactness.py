"""From a loaded model to a record: inspect it, balance it and verify its outputs, compare it with another."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from equinorm._deviation import deviation
from equinorm._equivalence import equivalence
from equinorm._errors import EquinormError, describe, describe_inputs
from equinorm._modules import duplicate
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.balancing.balance import Balance, TensorEnergy
from equinorm.cli.loading import Loaded
from equinorm.cli.records import Balancing, Comparison, Difference, FamilyRow, Inspection, PinRow, TensorRow, Weights
from equinorm.cli.weights import InputError
from equinorm.cli.wording import worded
from equinorm.reporting.pictures import pictured

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest relative deviation of outputs that counts as exact, by the coarsest dtype of the parameters. In double and single
precision real scales round every weight once; in half precision only powers of two are applied; ten roundings are allowed."""

VERIFYING = "to verify its outputs"
"""What the command line copies models for."""


class InexactError(EquinormError):
    """The balanced model's outputs would differ by more than rounding."""


def inspection(loaded: Loaded, symmetries: Symmetries) -> Inspection:
    """The record of a model's symmetries."""
    tensors = tuple(
        TensorRow(s.names, s.shape, s.kind, s.role if s.kind == "parameter" else "buffer", s.numel, _moving(s))
        for s in symmetries.scalings
    )
    parameters = [row for row in tensors if row.kind == "parameter"]
    moved = [set(s.free().tolist()) for s in symmetries.scalings]
    families = tuple(
        FamilyRow(f.tensor, f.axis, len(f.ids), sum(not ids.isdisjoint(f.ids) for ids in moved)) for f in symmetries.families
    )
    pins = tuple(
        PinRow(pin.tensor, pin.axis, pin.channels, r.operation, worded(r.detail), r.source, r.code, r.module)
        for pin in symmetries.pins
        for r in (pin.reason,)
    )
    return Inspection(
        model=f"{loaded.name} ({describe(loaded.model)})",
        inputs=describe_inputs(loaded.args, loaded.kwargs),
        num_free=symmetries.num_free,
        parameters=sum(row.entries for row in parameters),
        moving=sum(row.moving for row in parameters),
        coverage=symmetries.coverage,
        families=families,
        pins=pins,
        tensors=tensors,
        seconds_export=symmetries.seconds[0],
        seconds_labels=symmetries.seconds[1],
        notes=loaded.notes,
    )


def balancing(
    loaded: Loaded,
    symmetries: Symmetries,
    *,
    p: float = 2.0,
    c: float = 1.0,
    cycles: int | None = None,
    tol: float = 1e-6,
    method: str = "two-level",
    biases: bool = False,
    power_of_two: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Balancing, list[Weights]]:
    """Balance a model in place and verify that its outputs stay; returns the record and the weights to picture.

    With powers of two the record holds norm, energies and the last residual at the rounded scales. Where rounding would
    leave no smaller norm than before, the weights stay as they are.

    Raises:
        InexactError: if outputs deviate by more than the limit of the model's dtype; the model has changed then.
        EquinormError: if balancing or rescaling refuses.
    """
    started = time.perf_counter()
    model = loaded.model
    original = duplicate(model, VERIFYING)
    balance = symmetries.balance(p, c, cycles, tol, method, biases=biases, progress=progress)
    balance.apply_(power_of_two=power_of_two)
    norm, residual, energies, reason = balance.norm_after, balance.residual, balance.energies, balance.reason
    if power_of_two and balance.energies:
        norm, residual, energies, reason = _rounded(symmetries, balance, tol, biases, original)
    apart = deviation(model, original, loaded.args, loaded.kwargs)
    dtype = coarsest(model)
    if not apart <= LIMITS[dtype]:
        raise InexactError(_inexact(apart, dtype, power_of_two))
    record = Balancing(
        model=f"{loaded.name} ({describe(model)})",
        inputs=describe_inputs(loaded.args, loaded.kwargs),
        p=p,
        c=c,
        method=method,
        biases=biases,
        power_of_two=power_of_two,
        tol=tol,
        num_free=symmetries.num_free,
        dead=len(balance.dead),
        norm_before=balance.norm_before,
        norm_after=norm,
        energy_before=_total(p, [energy.before for energy in energies]),
        energy_after=_total(p, [energy.after for energy in energies]),
        energies=energies,
        residuals=balance.residuals,
        residual=residual,
        cycles=balance.cycles,
        converged=balance.converged,
        reason=reason,
        deviation=apart,
        limit=LIMITS[dtype],
        dtype=_name(dtype),
        changed=any(not torch.equal(a, b) for a, b in zip(_parameters(model), _parameters(original), strict=True)),
        seconds=time.perf_counter() - started,
        notes=loaded.notes,
    )
    return record, pictures(symmetries, dict(original.named_parameters(remove_duplicate=False)))


def comparison(a: Loaded, b: Loaded, opaque: Sequence[str] = (), hint: str = "") -> Comparison:
    """Run both models on the inputs of the first, and decide whether a rescaling joins them.

    Args:
        a: one model.
        b: another.
        opaque: names of submodules that are not looked into.
        hint: what to note if the outputs differ.

    Raises:
        EquinormError: if one does not run, or their outputs have different shapes.
    """
    limit = LIMITS[coarsest(a.model, b.model)]
    try:
        apart = deviation(a.model, b.model, a.args, a.kwargs)
    except EquinormError as error:
        dtypes = [sorted(_name(dtype) for dtype in {t.dtype for t in m.parameters()}) for m in (a.model, b.model)]
        if dtypes[0] == dtypes[1]:
            raise
        held = " and ".join(f"{side.name} holds {', '.join(found)}" for side, found in zip((a, b), dtypes, strict=True))
        raise InputError(f"{held}: they do not run on the same inputs. Name weights of one dtype. {error}") from error
    found, note = None, ""
    try:
        found = equivalence(a.model, b.model, a.args, a.kwargs, opaque=opaque)
    except EquinormError as error:  # other architectures, dead ends of the solver: outputs are compared all the same
        note = worded(str(error))
    scales = found.log_scales.abs().max() if found is not None and found.log_scales.numel() else None
    return Comparison(
        model_a=f"{a.name} ({describe(a.model)})",
        model_b=f"{b.name} ({describe(b.model)})",
        inputs=describe_inputs(a.args, a.kwargs),
        deviation=apart,
        limit=limit,
        same_outputs=apart <= limit,
        equivalent=None if found is None else found.equivalent,
        difference=None if found is None else found.difference,
        tolerance=None if found is None else found.tolerance,
        different=() if found is None else tuple(Difference(*pair) for pair in found.different),
        num_scales=None if found is None else found.log_scales.numel(),
        largest_scale=None if scales is None else float(scales.exp()),
        note=note if found is None else " ".join(found.notes),
        notes=(*a.notes, *b.notes, *([hint] if hint and not apart <= limit else [])),
    )


def _rounded(symmetries: Symmetries, balance: Balance, tol: float, biases: bool, original: nn.Module):
    """Norm, residual, energies and reason at the rounded scales, or at the old weights if these are no better."""
    now = symmetries.balance(balance.p, balance.c, 0, tol, balance.method, biases=biases)
    reason = f"{balance.reason}; then rounded to powers of two"
    if now.norm_before >= balance.norm_before:
        symmetries.model.load_state_dict(original.state_dict())
        kept = tuple(TensorEnergy(e.name, e.before, e.before) for e in balance.energies)
        return balance.norm_before, balance.residuals[0], kept, "no power of two makes the norm smaller: the weights stay"
    after = {energy.name: energy.before for energy in now.energies}
    energies = tuple(TensorEnergy(e.name, e.before, after[e.name]) for e in balance.energies)
    return now.norm_before, now.residuals[0], energies, reason


def _inexact(apart: float, dtype: torch.dtype, power_of_two: bool) -> str:
    name = _name(dtype)
    remedy = (
        "Scales so large reach numbers that this dtype cannot hold: use a factory that returns model.double()."
        if power_of_two
        else "Use --power-of-two, which changes no mantissa, or a factory that returns model.double()."
    )
    return (
        f"refused: the balanced outputs deviate by {apart:.1e}, more than the limit of {LIMITS[dtype]:g} for {name}. {remedy}"
    )


def pictures(symmetries: Symmetries, before: Mapping[str, Tensor], most: int = 5) -> list[Weights]:
    """Consecutive weights before and after: all, or the run of `most` of them that changed most."""
    tensors = symmetries.tensors
    return pictured(symmetries.scalings, before, lambda scaling: tensors[scaling.name], most)


def coarsest(*models: nn.Module) -> torch.dtype:
    """The floating dtype of least precision among the models' parameters."""
    dtypes = {tensor.dtype for model in models for tensor in model.parameters() if tensor.dtype in LIMITS}
    return max(dtypes, key=lambda dtype: LIMITS[dtype], default=torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _total(p: float, energies: list[float]) -> float:
    return max(energies, default=0.0) if math.isinf(p) else math.fsum(energies)


def _parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def _moving(scaling: Scaling) -> int:
    """How many entries at least one free class moves."""
    if not scaling.factors:
        return 0
    moves = torch.zeros((), dtype=torch.bool)
    for _, ids in scaling.factors:
        moves = moves | (ids != 0)
    return int(moves.expand(scaling.shape).sum())
