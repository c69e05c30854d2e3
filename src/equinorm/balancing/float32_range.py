"""Are sums of energies safe in float32? Where they are not, they are taken again in float64."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from equinorm.balancing.energy_reader import Reading
from equinorm.balancing.layout import TensorLayout
from equinorm.balancing.norm import Norm

SMALLEST, LARGEST = 1e-30, 1e30
"""Within these sums in float32 neither vanish, nor overflow where they are multiplied."""

APART = 87.0
"""Logarithm by which factors of at most 1 may differ so that the least of them does not vanish."""


def are_safe_sums(sums: Iterable[Tensor]) -> bool:
    """Are sums that were taken safe, neither zero nor beyond the range, nor NaN?"""
    ends = (total.aminmax() for total in sums if total.numel())
    return all(SMALLEST < float(low) <= float(high) < LARGEST for low, high in ends)


def are_safe_factors(logs: Tensor) -> bool:
    """Can factors stand in float32 beside one another? From their logarithms; −∞ is a factor 0.

    Where they cannot, sums may lose terms as large as those that remain, and look safe.
    """
    return float(logs.max() - torch.where(logs.isfinite(), logs, math.inf).min()) < APART


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
