"""The in-place laws: parameters, buffers, gradients and optimizer state move to an equivalent point, all or nothing."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, optim

from equinorm._blocks import STRIP
from equinorm._errors import RescaleError
from equinorm._optimizers import scaled_state
from equinorm._scaling import Scaling

LN2 = math.log(2.0)

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest relative error of a rescaled weight."""


@dataclass(frozen=True, slots=True, eq=False)
class _Write:
    """tensor ← (tensor + offset) · Π scales − offset."""

    what: str
    tensor: Tensor
    logs: list[Tensor]
    is_weight: bool = False
    offset: float = 0.0


class _Moves(Protocol):
    @property
    def factors(self) -> tuple[tuple[float, Tensor], ...]: ...


def unit_of_powers_of_two(scalings: Sequence[_Moves]) -> float:
    """Log-scales that are multiples of this scale every tensor entry by an integer power of two.

    Exponents in labels are rational; with m the least common multiple of their denominators it is m·ln 2.
    """
    denominators = {float(e).as_integer_ratio()[1] for scaling in scalings for e, _ in scaling.factors}
    return math.lcm(*denominators) * LN2


def round_to_powers_of_two(log_scales: Tensor, scalings: Sequence[_Moves]) -> Tensor:
    """Round log-scales so that the scale of every tensor entry becomes an integer power of two."""
    unit = unit_of_powers_of_two(scalings)
    return torch.round(log_scales / unit) * unit


def rescale_(
    tensors: Mapping[str, Tensor],
    scalings: Sequence[Scaling],
    log_scales: Tensor,
    optimizer: optim.Optimizer | None = None,
) -> None:
    """Multiply every tensor by its scales, in place; also gradients (by the inverse) and the state of `optimizer`.

    Everything is checked before anything is written, and the writing is not interrupted by Ctrl-C.

    Args:
        tensors: the model's tensors by the first name of their scaling.
        scalings: how they move.
        log_scales: float64 natural logarithms, one for each free class.
        optimizer: whose state to move along.

    Raises:
        RescaleError: if a tensor is not finite, cannot be written, would overflow, or would lose a channel to underflow.
    """
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), log_scales.detach().to("cpu", torch.float64)])
    writes: list[_Write] = []
    moving: dict[int, tuple[str, list[Tensor]]] = {}
    for scaling in scalings:
        logs = [exponent * padded[ids] for exponent, ids in scaling.factors]
        logs = [log for log in logs if bool((log != 0).any())]
        if not logs:
            continue
        tied = {id(tensors[name]): tensors[name] for name in scaling.names if name in tensors}
        _check_unchanged(scaling, list(tied.values()))
        for tensor in tied.values():  # one memory, but gradients and optimizer state of their own
            moving[id(tensor)] = (scaling.name, logs)
            if tensor.grad is not None:
                writes.append(_Write(f"gradient of {scaling.name}", tensor.grad, [-log for log in logs]))
        writes.append(_Write(scaling.name, next(iter(tied.values())), logs, True, scaling.offset))
    if optimizer is not None:
        for what, parameter, state, exponent in scaled_state(optimizer, {key: name for key, (name, _) in moving.items()}):
            if exponent:
                writes.append(_Write(what, state, [exponent * log for log in moving[id(parameter)][1]]))
    direct = [_check(write) for write in writes]
    with torch.no_grad(), uninterrupted():
        for write, is_direct in zip(writes, direct, strict=True):
            _multiply_(write, is_direct)


def scale_of(log: Tensor) -> Tensor:
    """exp(log) in float64; logarithms that are multiples of ln 2 (to 1e-12) give exact powers of two."""
    twos = log / LN2
    whole = torch.round(twos)
    if bool(((twos - whole).abs() <= 1e-12 * whole.abs().clamp(min=1)).all()):
        return torch.from_numpy(np.asarray(np.ldexp(1.0, whole.numpy().astype(np.int32))))
    return torch.exp(log)


def _multiply_(write: _Write, is_direct: bool) -> None:
    tensor, logs = write.tensor, write.logs
    if write.offset:
        tensor.copy_(_shifted(write))
        return
    if not is_direct:  # in float64, a strip at a time to spare memory
        whole = tensor if tensor.dim() else tensor[None]
        rows = max(1, STRIP * len(whole) // max(1, whole.numel()))
        for first in range(0, len(whole), rows):
            strip, here = whole[first : first + rows], slice(first, first + rows)
            strip.copy_(scaled(strip, [log[here] if log.dim() and len(log) > 1 else log for log in logs]))
        return
    for log in logs:
        tensor.mul_(scale_of(log).to(tensor.device, tensor.dtype))


def _shifted(write: _Write) -> Tensor:
    return (scaled(write.tensor.double() + write.offset, write.logs) - write.offset).to(write.tensor.dtype)


def scaled(tensor: Tensor, logs: Sequence[Tensor]) -> Tensor:
    """tensor · exp(Σ logs), in float64."""
    scale = scale_of(sum(logs[1:], start=logs[0])).to(tensor.device) if logs else 1.0
    return tensor.detach().to(torch.float64) * scale


def _check_unchanged(scaling: Scaling, tied: Sequence[Tensor]) -> None:
    """Refuse a model whose tensors are no longer those that were analysed."""
    if not tied or any(tuple(tensor.shape) != scaling.shape for tensor in tied):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tied) or "gone"
        raise RescaleError(
            f"{scaling.name} had shape {scaling.shape} when the model was analysed, now {shapes}. Analyse it again."
        )
    if len({tensor.untyped_storage()._cdata for tensor in tied}) > 1:
        names = ", ".join(scaling.names)
        raise RescaleError(f"{names} shared memory when the model was analysed and no longer do. Analyse the model again.")


def check_writable(what: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be multiplied in place.

    Raises:
        RescaleError: for meta, sparse, integer, complex, inference and expanded tensors.
    """
    if tensor.is_meta:
        raise RescaleError(f"cannot rescale {what}: it is on the meta device and holds no numbers. Load the weights first.")
    if tensor.layout != torch.strided:
        raise RescaleError(f"cannot rescale {what}: its layout is {tensor.layout}, only dense tensors can be rescaled.")
    if not tensor.is_floating_point():
        raise RescaleError(f"cannot rescale {what}: its dtype is {tensor.dtype}.")
    expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.is_inference() or expanded:
        raise RescaleError(f"cannot rescale {what} in place: it is an inference or an expanded tensor. Clone it first.")


def _check(write: _Write) -> bool:
    """Refuse what cannot be written or would not be exact; says whether it can be multiplied by one factor after the other.

    In half precision factors that are not powers of two would be rounded twice.
    """
    what, tensor = write.what, write.tensor
    check_writable(what, tensor)
    info = torch.finfo(tensor.dtype)
    if not tensor.numel():
        return False
    rows = _row_bounds(tensor.detach())
    if not bool(rows.isfinite().all()):
        raise RescaleError(f"cannot rescale {what}: it holds NaN or inf.")
    if write.offset:
        _check_shifted(write, info)
        return False
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    is_rounded = half and not all(_exact(log) for log in write.logs)
    if is_rounded and write.is_weight:
        raise RescaleError(
            f"cannot rescale {what} exactly: in {info.dtype} a real scale would change each weight by up to {info.eps / 2:.1e} "
            "of itself. Use powers of two (power_of_two=True), or convert the model to float32."
        )
    # Bounds on the largest entry of each row and on each factor, while some of the factors are applied.
    high = rows.log() + sum(_reduced(log, "amax").clamp_min(0.0) for log in write.logs)
    slack = 0.5 * math.log(tensor[0].numel()) if tensor.dim() > 1 else 0.0  # the bounds may be so much too large
    low = rows.log() - slack + sum(_reduced(log, "amin").clamp_max(0.0) for log in write.logs)
    low = low[rows.expand_as(low) > 0]
    largest, smallest = math.log(info.max), math.log(info.tiny / info.eps)
    is_safe = not low.numel() or (float(high.max()) < largest and float(low.min()) > smallest)
    if not is_safe:
        _check_exactly(write, info)
    return is_safe and not is_rounded and all(float(log.abs().max()) < largest / 2 for log in write.logs)


def _check_shifted(write: _Write, info: torch.finfo) -> None:
    """w + offset must keep its precision although w is what is stored."""
    after = _shifted(write).double()
    used = (after + write.offset).abs()
    lost = float(torch.where(used > 0, info.eps * after.abs() / used, 0.0).max()) if after.numel() else 0.0
    limit = EXACT[write.tensor.dtype]
    if not lost <= limit:
        raise RescaleError(
            f"cannot rescale {write.what}: the network uses {write.offset:g} + {write.what}, and rounding that in {info.dtype} "
            f"would change it by up to {lost:.1e} of itself at the new scale (limit {limit:g}). Use smaller log-scales."
        )


def _row_bounds(tensor: Tensor) -> Tensor:
    """Bounds on the largest magnitude in each slice along axis 0 from above, at most √n too large; float64, all axes kept.

    NaN or inf if it holds one. The norm of a slice is such a bound, and ten times faster than its largest entry.
    """
    if tensor.dim() < 2:
        return tensor.abs().to("cpu", torch.float64)
    rest = tuple(range(1, tensor.dim()))
    bounds = torch.linalg.vector_norm(tensor, dim=rest, dtype=torch.promote_types(tensor.dtype, torch.float32))
    bounds = bounds.to("cpu", torch.float64)
    unsafe = ~((bounds > 1e-15) & (bounds < 1e15))  # squares may have under- or overflowed
    if bool(unsafe.any()):
        rows = tensor[unsafe.to(tensor.device)]
        bounds[unsafe] = torch.maximum(-rows.amin(rest), rows.amax(rest)).to("cpu", torch.float64)
    return bounds.reshape(-1, *[1] * (tensor.dim() - 1))


def _check_exactly(write: _Write, info: torch.finfo) -> None:
    exact = scaled(write.tensor, write.logs)
    after = exact.to(write.tensor.dtype)
    if not bool(after.isfinite().all()):
        raise RescaleError(
            f"cannot rescale {write.what}: it would overflow {info.dtype} (largest number {info.max:.1e}). "
            "Use smaller log-scales, or convert the model to a wider dtype."
        )
    dims = tuple(range(1, after.dim()))
    largest = after.abs().amax(dim=dims, keepdim=True) if dims else after.abs()
    changed = (after.double() - exact).abs() > info.eps * exact.abs()
    lost = changed & (after.abs() < info.tiny) & (largest < info.tiny / info.eps)
    if bool(lost.any()):
        raise RescaleError(
            f"cannot rescale {write.what}: {int(lost.sum())} of its {lost.numel()} entries would underflow "
            f"{info.dtype} (smallest normal number {info.tiny:.1e}) with their whole channel. "
            "Use smaller log-scales, or convert the model to a wider dtype."
        )


def _exact(log: Tensor) -> bool:
    twos = log / LN2
    return bool(((twos - torch.round(twos)).abs() <= 1e-12 * twos.abs().clamp(min=1)).all())


def _reduced(log: Tensor, how: str) -> Tensor:
    """Largest or smallest over every axis but the first."""
    dims = tuple(range(1, log.dim()))
    return getattr(log, how)(dim=dims, keepdim=True) if dims else log


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])
