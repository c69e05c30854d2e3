"""The in-place laws: parameters, buffers, gradients and optimizer state move to an equivalent point, all or nothing."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._errors import RescaleError
from equinorm._memory import local
from equinorm._scaling import HALVES
from equinorm.rescaling.bounds import SAFE, bounds_of, reduced, row_bounds
from equinorm.rescaling.casts import refusal_in_half
from equinorm.rescaling.checks import check_in_place, unchanged
from equinorm.rescaling.factors import FactorTable, factors_of
from equinorm.rescaling.flat_state import renew_
from equinorm.rescaling.optimizer_state import Moving, scaled_state, unaveraged
from equinorm.rescaling.optimizer_wrappers import Optimizers, unwrapped_optimizers
from equinorm.rescaling.tensor_write import Write, scaled
from equinorm.rescaling.writing import uninterrupted, write_
from equinorm.sharding.boxes import part_of
from equinorm.sharding.processes import agreeing, processes_of

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest relative error of a rescaled weight."""

WRITABLE = (*EXACT, *HALVES)
"""Dtypes of tensors that can be rescaled."""


def rescale_(
    tensors: Mapping[str, Tensor],
    table: FactorTable,
    log_scales: Tensor,
    optimizer: Optimizers | None = None,
    nonlinear: Sequence[str] = (),
) -> None:
    """Multiply every tensor by its scales, in place; also gradients (by the inverse) and the state of `optimizer`.

    Everything is checked before anything is written, and the writing is not interrupted by Ctrl-C.

    Args:
        tensors: the model's tensors by the first name of their scaling.
        table: how they move.
        log_scales: float64 natural logarithms, one for each free class.
        optimizer: one or several, whose state to move along.
        nonlinear: what may keep gradients from scaling by the inverse.

    Raises:
        RescaleError: if a tensor is not finite, cannot be written, would overflow, or would lose a channel to underflow.
    """
    with agreeing(processes_of(tensors)):
        writes = _writes(tensors, table, log_scales, optimizer, nonlinear)
        direct = _check_all(writes)
    with uninterrupted():
        write_(writes, direct)
        for inner, _ in [] if optimizer is None else unwrapped_optimizers(optimizer):
            renew_(inner)


def _writes(
    tensors: Mapping[str, Tensor],
    table: FactorTable,
    log_scales: Tensor,
    optimizer: Optimizers | None,
    nonlinear: Sequence[str],
) -> list[Write]:
    """Everything that moves; of what is sharded the part that this process holds."""
    found: list[tuple[Write, Sequence[Tensor]]] = []  # and logarithms, if its factors are still to be made from them
    moving: dict[int, Moving] = {}
    z = log_scales.detach().to("cpu", torch.float64)
    for scaling, factors in zip(table.scalings, table.factors(z), strict=True):
        if not factors:
            continue
        tied = unchanged(scaling.names, scaling.shape, tensors)
        own = Moving(scaling.name, scaling.offset, [factor.log for factor in factors])
        for tensor in tied:  # one memory, but gradients and optimizer state of their own
            moving[id(tensor)] = own
            if tensor.grad is not None:
                _check_linear(scaling.name, tensor, nonlinear)
                found.append(_write(f"gradient of {scaling.name}", tensor.grad, [-log for log in own.logs]))
        part, logs = part_of(scaling.name, tied[0], own.logs)
        known, unmade = (factors, ()) if part is tied[0] else ((), logs)
        found.append((Write(scaling.name, part, known, True, scaling.offset, scaling.is_squared), unmade))
    for state in () if optimizer is None else scaled_state(optimizer, moving):
        own = moving[id(state.parameter)].logs
        own = own if state.averaged is None else unaveraged(own, state.averaged, state.what)
        found.append(_write(state.what, state.tensor, [state.exponent * log for log in own], state.offset))
    made = iter(factors_of([log for _, unmade in found for log in unmade]))
    for write, unmade in found:
        write.factors = [*write.factors, *(next(made) for _ in unmade)]
    return [write for write, _ in found]


def _write(what: str, tensor: Tensor, logs: Sequence[Tensor], offset: float = 0.0) -> tuple[Write, Sequence[Tensor]]:
    """What belongs to a weight, and the logarithms of which its factors are still to be made."""
    part, own = part_of(what, tensor, logs)
    return Write(what, part, offset=offset), own


def _check_linear(name: str, tensor: Tensor, nonlinear: Sequence[str]) -> None:
    """Refuse a gradient that may not be the one of the rescaled network, once rescaled itself."""
    own = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    reasons = [*([f"a hook of {name}"] if own else []), *nonlinear]
    if reasons and tensor.grad is not None and bool((local(tensor.grad) != 0).any()):
        raise RescaleError(
            f"cannot rescale the gradient of {name}: {reasons[0]} may change gradients in ways that do not scale, as a clamp "
            "does. Drop gradients first: optimizer.zero_grad()."
        )


def check_writable(what: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be multiplied in place.

    Raises:
        RescaleError: for meta, sparse, integer, complex, inference and expanded tensors.
    """
    check_in_place(what, tensor, "rescale")
    if tensor.dtype not in WRITABLE:
        raise RescaleError(f"cannot rescale {what}: its dtype is {tensor.dtype}.")


@dataclass(frozen=True, slots=True)
class LogBounds:
    """Bounds on the logarithm of the largest entry of any row, while some of the factors are applied.

    Attributes:
        low: of the row whose largest entry may become smallest; inf if all are zero.
        high: of the row whose largest entry may become largest.
    """

    low: float
    high: float

    def is_within(self, dtype: torch.dtype) -> bool:
        """Can no entry overflow, and no row underflow?"""
        lowest, highest = _range_of(dtype)
        return self.low == math.inf or (self.high < highest and self.low > lowest)


@functools.cache
def _range_of(dtype: torch.dtype) -> tuple[float, float]:
    """Logarithms of the smallest number that keeps its digits, with room for a row below it, and of the largest."""
    info = torch.finfo(dtype)
    return math.log(info.tiny / info.eps), math.log(info.max)


def _check_all(writes: Sequence[Write]) -> list[bool]:
    """`check` of each; most need no more than bounds that are worked out for all at once. Which of them are direct?"""
    for write in writes:
        check_writable(write.what, write.tensor)
    direct: list[bool] = []
    for write, (low, least, most) in zip(writes, bounds_of([write.tensor for write in writes]), strict=True):
        are_sure = write.tensor.dim() < 2 or (SAFE[0] < low and most < SAFE[1])
        is_plain = are_sure and math.isfinite(most) and not (write.offset or write.is_squared or _is_rounded(write))
        is_plain = is_plain and not _lowers_columns(write)
        reach = _outer_reach(write, least, most) if is_plain and write.tensor.numel() else None
        if reach is None or not reach.is_within(write.tensor.dtype):
            reach = check(write)
        direct.append(_is_direct(write, reach))
    return direct


def check(write: Write, rows: Tensor | None = None) -> LogBounds | None:
    """Refuse what cannot be written or would not be exact.

    Args:
        write: what is to be written.
        rows: its `row_bounds`, where they are known: then few tensors are read.

    Returns:
        How large and small what is written may become; None where there are no entries, or they are shifted.

    Raises:
        RescaleError: which names it.
    """
    what, tensor = write.what, write.tensor
    check_writable(what, tensor)
    info = torch.finfo(tensor.dtype)
    if not tensor.numel():
        return None
    rows = row_bounds(tensor.detach()) if rows is None else rows
    if not math.isfinite(rows.max()):  # NaN is the largest
        raise RescaleError(f"cannot rescale {what}: it holds NaN or inf.")
    if write.offset:
        _check_shifted(write, info)
        return None
    if write.is_weight and _is_rounded(write):
        raise RescaleError(refusal_in_half(what, tensor.dtype))
    reach = _outer_reach(write, *map(float, rows.aminmax()))
    if write.is_squared or reach.low == -math.inf or not reach.is_within(tensor.dtype):
        reach = _reach(write, rows)
    if write.is_squared and reach.low < math.inf:
        _check_squares(write, reach)
    if not reach.is_within(tensor.dtype) or _lowers_columns(write):
        _check_exactly(write, info)
    return reach


def _is_direct(write: Write, reach: LogBounds | None) -> bool:
    """Can it be multiplied by one factor after the other? Factors that are no powers of two would be rounded twice in half."""
    dtype = write.tensor.dtype
    if reach is None or not reach.is_within(dtype) or _is_rounded(write):
        return False
    most = _range_of(dtype)[1] / 2
    return all([-most < factor.low and factor.high < most for factor in write.factors])  # noqa: C419 -- a list is faster


def _is_rounded(write: Write) -> bool:
    """Would half precision round the factors?"""
    return write.tensor.dtype in HALVES and not all(factor.is_exact for factor in write.factors)


def _reach(write: Write, rows: Tensor) -> LogBounds:
    """From bounds on the largest entry of each row, and the factors of each."""
    slack = _slack(write.tensor)
    high = rows.log() + sum(reduced(log, "amax").clamp_min(0.0) for log in write.logs)
    low = rows.log() - slack + sum(reduced(log, "amin").clamp_max(0.0) for log in write.logs)
    low = low[rows.expand_as(low) > 0]
    return LogBounds(float(low.min()) if low.numel() else math.inf, float(high.max()))


def _outer_reach(write: Write, least: float, most: float) -> LogBounds:
    """From the smallest and the largest of these bounds, and of the factors."""
    low, high = -_slack(write.tensor), 0.0
    for factor in write.factors:
        low, high = low + min(factor.low, 0.0), high + max(factor.high, 0.0)
    return LogBounds(low + math.log(least) if least else -math.inf, high + math.log(most) if most else -math.inf)


def _slack(tensor: Tensor) -> float:
    """Logarithm of how much too large the bounds may be."""
    return 0.5 * math.log(tensor.numel() / tensor.size(0)) if tensor.dim() > 1 else 0.0


def _check_squares(write: Write, reach: LogBounds) -> None:
    """Norms of the tensor must stay in range, whose squares are summed in float32 at least."""
    info = torch.finfo(torch.promote_types(write.tensor.dtype, torch.float32))
    most = 0.5 * math.log(write.tensor.numel())
    if not (reach.high + most < 0.5 * math.log(info.max) and reach.low > 0.5 * math.log(info.tiny / info.eps)):
        raise RescaleError(
            f"cannot rescale {write.what}: the network takes norms of it, as weight normalization does, and its squares would "
            f"leave {info.dtype} ({info.tiny:.1e} to {info.max:.1e}). Use smaller log-scales, or a wider dtype."
        )


def _check_shifted(write: Write, info: torch.finfo) -> None:
    """w + offset must keep its precision although w is what is stored."""
    after = write.shifted().double()
    used = (after + write.offset).abs()
    lost = float(torch.where(used > 0, info.eps * after.abs() / used, 0.0).max()) if after.numel() else 0.0
    limit = EXACT.get(write.tensor.dtype)
    if limit is None:
        raise RescaleError(
            f"cannot rescale {write.what} exactly: the network uses {write.offset:g} + {write.what}, and it is {info.dtype} "
            "now. Convert the model to float32, rescale it there, and convert it back."
        )
    if not lost <= limit:
        raise RescaleError(
            f"cannot rescale {write.what}: the network uses {write.offset:g} + {write.what}, and rounding that in {info.dtype} "
            f"would change it by up to {lost:.1e} of itself at the new scale (limit {limit:g}). Use smaller log-scales."
        )


def _are_small(tensor: Tensor, axis: int, least: float) -> Tensor:
    """Of each slice along an axis: is its largest entry below this?"""
    rest = tuple(other for other in range(tensor.dim()) if other != axis)
    sizes = tensor.abs()
    return (sizes.amax(dim=rest, keepdim=True) if rest else sizes) < least


def _lowers_columns(write: Write) -> bool:
    """May columns underflow although bounds of rows say nothing of it? Only float16 has so few magnitudes."""
    return write.tensor.dtype == torch.float16 and any(
        factor.low < 0 and any(size > 1 for size in factor.log.shape[1:]) for factor in write.factors
    )


def _check_exactly(write: Write, info: torch.finfo) -> None:
    exact = scaled(write.tensor, write.logs)
    after = exact.to(write.tensor.dtype)
    if not bool(after.isfinite().all()):
        raise RescaleError(
            f"cannot rescale {write.what}: it would overflow {info.dtype} (largest number {info.max:.1e}). "
            "Use smaller log-scales, or convert the model to a wider dtype."
        )
    changed = ((after.double() - exact).abs() > info.eps * exact.abs()) & (after.abs() < info.tiny)
    moving = {axis for log in write.logs for axis, size in enumerate(log.shape) if size > 1}
    lost = changed & _are_small(after, 0, info.tiny / info.eps)
    for axis in moving - {0}:  # where more is lost than rounding the largest entry loses
        lost |= changed & _are_small(after, axis, info.tiny)
    if bool(lost.any()):
        raise RescaleError(
            f"cannot rescale {write.what}: {int(lost.sum())} of its {lost.numel()} entries would underflow "
            f"{info.dtype} (smallest normal number {info.tiny:.1e}) with their whole channel. "
            "Use smaller log-scales, or convert the model to a wider dtype."
        )
