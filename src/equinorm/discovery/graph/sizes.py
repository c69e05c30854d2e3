"""Sizes that data decide, as of what a mask leaves: each unknown is taken to be a prime, so that laws can count."""

import math
from itertools import count
from typing import Any

import torch
from torch import SymInt, Tensor


class Sizes:
    """The number that stands for each unknown of one graph.

    Args:
        least: the primes are no smaller; odd. No product of sizes that a network writes down should be one of them by chance.
    """

    def __init__(self, least: int = 1_000_001) -> None:
        self._primes: dict[Any, int] = {}
        self._next = (
            number for number in count(least, 2) if all(number % part for part in range(3, math.isqrt(number) + 1, 2))
        )

    def known(self, result: Any) -> Any:
        """Results with numbers for sizes; as they were where a size is no such number."""
        if isinstance(result, (list, tuple)):
            return [self.known(part) for part in result]
        if not isinstance(result, Tensor) or all(isinstance(size, int) for size in result.shape):
            return result
        sizes = [self.number(size) for size in result.shape]
        return result if None in sizes else torch.empty(sizes, dtype=result.dtype, device="meta")  # pyright: ignore

    def number(self, size: Any) -> int | None:
        """The number for one size; None if it is none that is positive."""
        if not isinstance(size, SymInt):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._primes:
                self._primes[symbol] = next(self._next)
        value = expression.subs(self._primes)
        return int(value) if value.is_Integer and value > 0 else None
