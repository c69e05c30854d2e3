"""Bounds on the magnitudes in each slice of a tensor along axis 0: norms, which are ten times faster than largest entries."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm._class_ids import slices_at_once

SAFE = 1e-15, 1e15
"""Beyond these, squares in float32 may have under- or overflowed."""


def bounds_of(tensors: Sequence[Tensor]) -> Iterator[tuple[float, float, float]]:
    """The least of the bounds on the magnitudes in each slice along axis 0, the least that is not 0, and the largest."""
    for here in slices_at_once([tensor.numel() if tensor.dim() < 2 else len(tensor) for tensor in tensors]):
        with torch.no_grad():
            parts = [norms(tensor) if tensor.dim() > 1 else tensor.reshape(-1) for tensor in tensors[here]]
            parts = [part if part.is_cpu else part.cpu() for part in parts]
            flat = torch.cat([*parts, torch.zeros(1, dtype=torch.float32)]).abs_().numpy()  # which has no bfloat16
        starts = np.cumsum([0, *map(len, parts)])  # and the one that ends the last
        above = np.where(flat > 0, flat, np.inf)
        hows = (np.minimum.reduceat(flat, starts), np.minimum.reduceat(above, starts), np.maximum.reduceat(flat, starts))
        yield from zip(*(how[:-1].tolist() for how in hows), strict=True)


def row_bounds(tensor: Tensor) -> Tensor:
    """Bounds on the largest magnitude in each slice along axis 0 from above, at most √n too large; float64, all axes kept.

    NaN or inf if it holds one. The norm of a slice is such a bound, and ten times faster than its largest entry.
    """
    bounds = norms(tensor).to("cpu", torch.float64)
    if tensor.dim() < 2:
        return bounds
    unsafe = ~((bounds > SAFE[0]) & (bounds < SAFE[1]))
    if bool(unsafe.any()):
        rest = tuple(range(1, tensor.dim()))
        rows = tensor[unsafe.to(tensor.device)]
        bounds[unsafe] = torch.maximum(-rows.amin(rest), rows.amax(rest)).to("cpu", torch.float64)
    return bounds.reshape(-1, *[1] * (tensor.dim() - 1))


def room(tensor: Tensor, logs: Sequence[Tensor]) -> float:
    """The logarithm by which bounds on the entries of tensor · exp(Σ logs) stay below overflow; inf if it overflows already."""
    if not tensor.numel():
        return math.inf
    high = row_bounds(tensor).log()
    for own in logs:
        high = high + reduced(own.to("cpu", torch.float64), "amax")
    found = 0.999 * math.log(torch.finfo(tensor.dtype).max) - float(high.nan_to_num(-math.inf, math.inf).amax())
    return found if found >= 0 or bool(tensor.isfinite().all()) else math.inf


def norms(tensor: Tensor) -> Tensor:
    """Of each slice along axis 0; magnitudes of a vector."""
    if tensor.dim() < 2:
        return tensor.abs()
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), dtype=dtype)


def reduced(log: Tensor, how: str) -> Tensor:
    """Largest or smallest over every axis but the first."""
    dims = tuple(range(1, log.dim()))
    return getattr(log, how)(dim=dims, keepdim=True) if dims else log
