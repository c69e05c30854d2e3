"""Sizes that data decides, as of what `nonzero` finds: each unknown is taken to be a large prime, so that laws can count."""

import math
from itertools import count
from typing import Any

import torch
from torch import SymInt, Tensor

_FROM = 1_000_001
"""Primes that stand for unknowns are no smaller: no product of sizes that a network writes down is one of theirs by chance."""


class Sizes:
    """The number that stands for each unknown of one graph."""

    def __init__(self) -> None:
        self._primes: dict[Any, int] = {}
        self._next = (
            number for number in count(_FROM, 2) if all(number % part for part in range(3, math.isqrt(number) + 1, 2))
        )

    def known(self, result: Any) -> Any:
        """Results with numbers for sizes; as they were where a size is no such number."""
        if isinstance(result, (list, tuple)):
            return [self.known(part) for part in result]
        if not isinstance(result, Tensor) or all(isinstance(size, int) for size in result.shape):
            return result
        sizes = [self._number(size) for size in result.shape]
        return result if None in sizes else torch.empty(sizes, dtype=result.dtype, device="meta")  # pyright: ignore

    def _number(self, size: Any) -> int | None:
        if not isinstance(size, SymInt):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._primes:
                self._primes[symbol] = next(self._next)
        value = expression.subs(self._primes)
        return int(value) if value.is_Integer and value > 0 else None
