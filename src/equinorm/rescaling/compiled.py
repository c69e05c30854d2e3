"""Writing by compiled kernels in one call, within which nothing fails and no signal is heard: no original has to be kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equinorm import native
from equinorm._memory import has_memory
from equinorm.rescaling.tensor_write import Write

FEW = 32
"""Rows from which on a scale for each of their entries takes little memory."""

DTYPES = (torch.float32, torch.float64)
"""Of the tensors; what is rounded to half precision is rounded once only where scales are powers of two."""

Rows = tuple[Tensor | None, Tensor | None]
"""Scales of rows and of columns of a tensor as a matrix; None for those that are 1."""


class Compiled:
    """Some of the writes, those that kernels can do.

    Args:
        writes: which have been checked.
        direct: may one factor after the other be multiplied in?

    Attributes:
        chosen: which of them these are.
    """

    def __init__(self, writes: Sequence[Write], direct: Sequence[bool]) -> None:
        found = [_scales(write) if is_direct else None for write, is_direct in zip(writes, direct, strict=True)]
        if not any(found) or not native.are_shipped():
            found = [None] * len(writes)
        entries = {
            dtype: sum(w.tensor.numel() for w, s in zip(writes, found, strict=True) if s and w.tensor.dtype == dtype)
            for dtype in DTYPES
        }
        dtype = max(DTYPES, key=entries.__getitem__)  # one call alone is all or nothing
        self.chosen = [bool(s) and w.tensor.dtype == dtype for w, s in zip(writes, found, strict=True)]
        moves = [(w.tensor, own) for w, s, is_own in zip(writes, found, self.chosen, strict=True) if is_own for own in s or ()]
        self._tensors = [tensor for tensor, _ in moves]
        self._kernels = native.kernels_for(dtype, dtype) if moves else None
        self._mark = torch.ones(1, dtype=dtype)
        ones = torch.ones(max([max(_shape(tensor)) for tensor in self._tensors], default=1), dtype=dtype)
        moves.append((self._mark, (torch.full((1,), 2.0, dtype=dtype), None)))
        self._scales = [[ones if side is None else side.to(dtype).contiguous() for side in own] for _, own in moves]
        self._moves = native.array(
            native.Move,
            [
                native.Move(tensor.data_ptr(), None, *_shape(tensor), *(side.data_ptr() for side in own), None, None)
                for (tensor, _), own in zip(moves, self._scales, strict=True)
            ],
        )

    @property
    def is_done(self) -> bool:
        """Has all been written?"""
        return float(self._mark) != 1.0

    def write_(self) -> None:
        """Write all of it."""
        if self._kernels is not None:
            torch.autograd.graph.increment_version(self._tensors)
            self._kernels.scale_(self._moves)


def _shape(tensor: Tensor) -> tuple[int, int]:
    """Of the tensor as a matrix: a vector is one row."""
    return (tensor.size(0), tensor.numel() // tensor.size(0)) if tensor.dim() > 1 else (1, tensor.numel())


def _scales(write: Write) -> list[Rows] | None:
    """Scales to multiply in, one after the other; None where kernels do not know the tensor or how it moves."""
    tensor = write.tensor
    is_plain = has_memory(tensor) and tensor.device.type in native.DEVICES and tensor.dtype in DTYPES
    if not is_plain or write.offset or not tensor.numel() or not tensor.dim() or not tensor.is_contiguous():
        return None
    found: list[Rows] = []
    for factor in write.factors:
        own = _sides(factor.scale, tensor)
        if own is None:
            return None
        found.append(own)
    return found


def _sides(scale: Tensor, tensor: Tensor) -> Rows | None:
    """One factor's scales of rows or of columns; None if it has both, or too many for few rows."""
    if scale.dim() != tensor.dim():
        return None
    if tensor.dim() == 1:
        return None, scale.expand(tensor.shape)
    if scale.numel() == scale.size(0):
        return scale.reshape(-1).expand(tensor.size(0)), None
    if scale.size(0) > 1 or (tensor.size(0) < FEW and scale.numel() < tensor.numel() // tensor.size(0)):
        return None
    return None, scale.expand(1, *tensor.shape[1:]).reshape(-1)
