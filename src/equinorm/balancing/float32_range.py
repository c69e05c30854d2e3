"""Are sums of energies safe in float32? Where they are not, they are taken again in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor

from equinorm.balancing.energy_reader import Reading
from equinorm.balancing.layout import TensorLayout
from equinorm.balancing.norm import Norm

SMALLEST, LARGEST = 1e-30, 1e30
"""Within these sums in float32 neither vanish, nor overflow where they are multiplied."""

SAFE = 1e20
"""Sums of energies up to this do not reach `LARGEST`."""


def are_safe(energies: Tensor) -> bool:
    """Are these safe, which are not 0 in a list, and their sums along both sides of a matrix?"""
    is_list = energies.dim() == 1 or energies.size(1) == 1
    return _are_between([energies], SAFE) if is_list else _are_between(_totals(energies), LARGEST)


def are_safe_sums(sums: Iterable[Tensor]) -> bool:
    """Are sums that were taken safe, neither zero nor beyond the range, nor NaN?"""
    return _are_between(sums, LARGEST)


def fits_float32(layout: TensorLayout, tensor: Tensor, norm: Norm) -> bool:
    """Are the energies of all channels of a tensor safe that have any?"""
    if are_safe_sums(_totals(Reading(layout, tensor, norm, torch.float32).read_energies())):
        return True
    sums = _totals(Reading(layout, tensor, norm, torch.float64).read_energies())
    return are_safe_sums([torch.where(total == 0, 1.0, total) for total in sums])


def _totals(energies: Tensor) -> list[Tensor]:
    """Sums along every side: too small, too large or NaN shows whether float32 will do."""
    if energies.dim() == 1:
        return [energies]
    rows, columns = energies.shape
    return [energies @ energies.new_ones(columns), energies.T @ energies.new_ones(rows)]


def _are_between(values: Iterable[Tensor], most: float) -> bool:
    """Are all above the smallest, and below the most?"""
    ends = (value.aminmax() for value in values if value.numel())
    return all(SMALLEST < float(low) <= float(high) < most for low, high in ends)
