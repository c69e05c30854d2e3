"""What is to be written to one tensor, and what becomes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm.rescaling.factors import ScaleFactor
from equinorm.rescaling.powers_of_two import LN2, scale_of

_STEP, _END = 1000 * LN2, 2200 * LN2
"""Logarithms of one factor in float64, and of one that takes every number of float64 out of it."""


@dataclass(slots=True, eq=False)
class Write:
    """tensor ← (tensor + offset) · Π scales − offset.

    Attributes:
        what: its name.
        tensor: to be written.
        factors: the scales.
        is_weight: a parameter or buffer, not what belongs to it.
        offset: number that the network adds before it uses the tensor.
        is_squared: does the network take norms of it?
    """

    what: str
    tensor: Tensor
    factors: Sequence[ScaleFactor] = ()
    is_weight: bool = False
    offset: float = 0.0
    is_squared: bool = False

    @property
    def logs(self) -> list[Tensor]:
        """Natural logarithms of the scales."""
        return [factor.log for factor in self.factors]

    def shifted(self) -> Tensor:
        """What a tensor with an offset becomes."""
        return shifted(self.tensor, self.logs, self.offset)


def shifted(tensor: Tensor, logs: Sequence[Tensor], offset: float) -> Tensor:
    """(tensor + offset) · exp(Σ logs) − offset."""
    return (scaled(tensor.double() + offset, logs) - offset).to(tensor.dtype)


def scaled(tensor: Tensor, logs: Sequence[Tensor]) -> Tensor:
    """tensor · exp(Σ logs), in float64; also where the scale alone is beyond float64."""
    result = tensor.detach().to(torch.float64)
    rest = sum(logs, start=torch.zeros((), dtype=torch.float64)).clamp(-_END, _END)
    while bool((rest != 0).any()):
        step = rest.clamp(-_STEP, _STEP)
        result = result * scale_of(step).to(tensor.device)
        rest = rest - step
    return result
