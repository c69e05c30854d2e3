"""Weights as two networks are compared by them: with offsets, dense, on the CPU, at scales of one's choice."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.rescaling.tensor_write import scaled

Forms = Mapping[str, Tensor]
"""By name."""


def dtype_of(found: Symmetries) -> torch.dtype:
    """What matching computes in: float64 where the network does, else float32."""
    return torch.float64 if any(scaling.dtype == torch.float64 for scaling in found.scalings) else torch.float32


def forms(found: Symmetries, log_scales: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Forms:
    """All tensors of a network, rescaled or as they are; complex ones, which never scale, of the complex dtype."""
    return dict(zip((s.name for s in found.scalings), each(found, log_scales, dtype), strict=True))


def each(found: Symmetries, log_scales: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """The same, one after the other, in the order of the scalings: a large network need not be held twice."""
    tensors = found.tensors
    for scaling in found.scalings:
        yield _rescaled(scaling, _effective(scaling, tensors[scaling.name]), log_scales, dtype)


def rescaled(scalings: Iterable[Scaling], tensors: Forms, log_scales: Tensor) -> Forms:
    """What forms become at other scales; of the dtype that they have."""
    return {s.name: _rescaled(s, tensors[s.name], log_scales, tensors[s.name].dtype) for s in scalings}


def real(tensors: Forms) -> Forms:
    """Forms by which channels can be matched: magnitudes in place of complex numbers."""
    return {name: tensor.abs() if tensor.is_complex() else tensor for name, tensor in tensors.items()}


def _effective(scaling: Scaling, tensor: Tensor) -> Tensor:
    return scaling.effective(tensor).to_dense().cpu()


def _rescaled(scaling: Scaling, form: Tensor, log_scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    if form.is_complex():
        return form.to(dtype.to_complex())
    return form.to(dtype) if log_scales is None else scaled(form, scaling.log_factors(log_scales)).to(dtype)
