"""Scales that multiply tensors: what log-scales make of the factors of scalings, for all tensors at once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equinorm._class_ids import firsts_of_runs, moving_log_factors, slices_at_once
from equinorm._scaling import Scaling
from equinorm.rescaling.powers_of_two import are_powers_of_two, scale_of

TABLES = 4
"""Exponents for which the scales of all classes are worked out; nearly all networks have 1 and −1."""


@dataclass(slots=True, eq=False)
class ScaleFactor:
    """Scales that broadcast to a tensor.

    Attributes:
        log: their natural logarithms.
        scale: themselves, in float64.
        low: the least logarithm.
        high: the largest.
        is_exact: are all powers of two?
    """

    log: Tensor
    scale: Tensor
    low: float
    high: float
    is_exact: bool


def factors_of(logs: Sequence[Tensor]) -> list[ScaleFactor]:
    """Scales from their natural logarithms in float64 on the CPU."""
    return [factor for here in slices_at_once([log.numel() for log in logs]) for factor in _factors(logs[here])]


def _factors(logs: Sequence[Tensor]) -> Iterator[ScaleFactor]:
    """The same, all at once."""
    sizes = [log.numel() for log in logs]
    flat = torch.cat([*(log.reshape(-1) for log in logs), torch.zeros(1, dtype=torch.float64)])
    starts = np.cumsum([0, *sizes])  # and the one that ends the last
    low, high = (how.reduceat(flat.numpy(), starts)[:-1].tolist() for how in (np.minimum, np.maximum))
    exact = are_powers_of_two(flat)
    are_exact = np.logical_and.reduceat(exact.numpy(), starts)[:-1].tolist()
    scales = [scale.view(log.shape) for scale, log in zip(scale_of(flat, exact).split([*sizes, 1]), logs, strict=False)]
    return map(ScaleFactor, logs, scales, low, high, are_exact)


class FactorTable:
    """How tensors move, as far as it can be said before log-scales are known.

    Most factors are runs of classes, one after the other, with one of a few exponents: they are cut out of a table of all
    classes, and tensors that move alike share them.

    Args:
        scalings: of the tensors.
        num_free: number of free classes.
    """

    def __init__(self, scalings: Sequence[Scaling], num_free: int) -> None:
        self.scalings = scalings
        self._exponents: list[float] = []
        self._runs: dict[tuple[float, int, tuple[int, ...]], int] = {}  # exponent, first class, shape
        firsts = iter(firsts_of_runs([ids for scaling in scalings for _, ids in scaling.factors]))
        places = [self._places(scaling, [next(firsts) for _ in scaling.factors]) for scaling in scalings]
        self._others = [scaling for scaling, own in zip(scalings, places, strict=True) if own is None]
        keys = sorted(self._runs, key=lambda key: (self._exponents.index(key[0]), *key[1:]))
        rank = {self._runs[key]: place for place, key in enumerate(keys)}
        self._places_of = [None if own is None else [rank[place] for place in own] for own in places]
        self._starts = [self._exponents.index(e) * (num_free + 2) + first for e, first, _ in keys]
        self._shapes = [(shape, _strides(shape)) for *_, shape in keys]
        self._ends = [start + math.prod(shape) for start, (shape, _) in zip(self._starts, self._shapes, strict=True)]

    def _places(self, scaling: Scaling, firsts: Sequence[int | None]) -> list[int] | None:
        """Of its factors among all runs, from the first class of each; None if one of them is no run."""
        found: list[int] = []
        for (exponent, ids), first in zip(scaling.factors, firsts, strict=True):
            if first is None or (exponent not in self._exponents and len(self._exponents) == TABLES):
                return None
            if exponent not in self._exponents:
                self._exponents.append(exponent)
            found.append(self._runs.setdefault((exponent, first, tuple(ids.shape)), len(self._runs)))
        return found

    def factors(self, z: Tensor) -> list[list[ScaleFactor]]:
        """The scales of each tensor, without factors that are all 1.

        Args:
            z: free log-scales of shape (num_free,), float64 on the CPU.
        """
        runs = self._cut(z)
        others = moving_log_factors(self._others, z)
        own = iter(factors_of([log for logs in others for log in logs]))
        rest = iter([[next(own) for _ in logs] for logs in others])
        found = ([runs[place] for place in places] if places is not None else next(rest) for places in self._places_of)
        return [[factor for factor in factors if factor.low or factor.high] for factors in found]

    def _cut(self, z: Tensor) -> list[ScaleFactor]:
        """The runs, out of a table of all classes for each exponent."""
        if not self._runs:
            return []
        zero = torch.zeros(1, dtype=torch.float64)
        logs = torch.cat([part for exponent in self._exponents for part in (zero, exponent * z, zero)])  # one ends the last run
        exact = are_powers_of_two(logs)
        scales = scale_of(logs, exact)
        bounds = np.stack([self._starts, self._ends], 1).ravel()
        low, high = (how.reduceat(logs.numpy(), bounds)[::2].tolist() for how in (np.minimum, np.maximum))
        are_exact = np.logical_and.reduceat(exact.numpy(), bounds)[::2].tolist()
        found = zip(self._starts, self._shapes, low, high, are_exact, strict=True)
        return [ScaleFactor(logs.as_strided(*s, start), scales.as_strided(*s, start), *more) for start, s, *more in found]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of contiguous memory."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
