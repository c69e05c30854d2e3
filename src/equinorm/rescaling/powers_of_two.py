"""Scales that are powers of two, which change no bit of a product."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm._scaling import Cast, Scaling

LN2 = math.log(2.0)


def scale_of(log: Tensor, exact: Tensor | None = None) -> Tensor:
    """exp(log) in float64; logarithms that are multiples of ln 2 (to 1e-12; `exact` says which) give exact powers of two."""
    exact = are_powers_of_two(log) if exact is None else exact
    scale = torch.exp(log)
    if bool(exact.any()):
        twos = torch.round(log[exact] / LN2).numpy().astype(np.int32)
        scale[exact] = torch.from_numpy(np.ldexp(1.0, twos))
    return scale


def are_powers_of_two(log: Tensor) -> Tensor:
    """Which of these logarithms are multiples of ln 2, to 1e-12?"""
    twos = log / LN2
    apart = torch.round(twos).sub_(twos).abs_()
    return apart <= twos.abs_().clamp_(min=1).mul_(1e-12)


def is_power_of_two(log: Tensor) -> bool:
    """Are all of these logarithms multiples of ln 2?"""
    return bool(are_powers_of_two(log).all())


def unit_of_powers_of_two(scalings: Sequence[Scaling | Cast]) -> float:
    """Log-scales that are multiples of this scale every tensor entry by an integer power of two.

    Exponents in labels are rational; with m the least common multiple of their denominators it is m·ln 2.
    """
    denominators = {float(e).as_integer_ratio()[1] for scaling in scalings for e, _ in scaling.factors}
    return math.lcm(*denominators) * LN2


def round_to_powers_of_two(log_scales: Tensor, scalings: Sequence[Scaling | Cast]) -> Tensor:
    """Round log-scales so that the scale of every tensor entry becomes an integer power of two."""
    return round_to_unit(log_scales, unit_of_powers_of_two(scalings))


def round_to_unit(log_scales: Tensor, unit: float) -> Tensor:
    """Round to multiples of a unit."""
    return torch.round(log_scales / unit) * unit
