"""The norm whose minimum is looked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """The ℓp norm, by its energies: Σ |w|^p, or max |w| for p = ∞.

    Attributes:
        p: any positive number, or inf.

    >>> Norm(3.0).q, Norm(float("inf")).q
    (3.0, 1.0)
    """

    p: float

    @property
    def is_max(self) -> bool:
        """Is the largest energy minimised, not their sum?"""
        return math.isinf(self.p)

    @property
    def q(self) -> float:
        """The power of scales in an energy."""
        return 1.0 if math.isinf(self.p) else self.p

    @property
    def is_cheap(self) -> bool:
        """Do its powers cost nothing beside reading?"""
        return self.p in (1.0, 2.0)

    def join(self, logs: Sequence[float]) -> float:
        """Logarithm of the sum (maximum) of energies."""
        if len(logs) == 1:
            return float(logs[0])
        values = torch.tensor(logs, dtype=torch.float64)
        return float(values.max() if self.is_max else values.logsumexp(0))

    def join_by(self, ids: Tensor, logs: Tensor, size: int) -> Tensor:
        """The same of those that share an id 0..size − 1; −∞ for ids without any."""
        top = torch.full((size,), -math.inf, dtype=torch.float64).scatter_reduce(0, ids, logs, "amax")
        if self.is_max:
            return top
        safe = torch.where(top.isfinite(), top, 0.0)
        return torch.zeros_like(top).scatter_add(0, ids, torch.exp(logs - safe[ids])).log() + safe

    def log_weight(self, depth: float, c: float) -> float:
        """Logarithm of c^(−qk), by which energies of a weight of depth k count."""
        return -self.q * depth * math.log(c)


def exp(log: float) -> float:
    """exp, inf beyond the largest float."""
    return math.exp(log) if log < 709.0 else math.inf
