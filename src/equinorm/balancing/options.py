"""What can be asked of a balance, and what is refused."""

import math
from dataclasses import dataclass

from equinorm._arguments import is_number, is_whole
from equinorm._errors import BalanceError
from equinorm.balancing.norm import Norm
from equinorm.modules.choosing import Choice

METHODS = ("two-level", "cyclic")

LEAST_P, LARGEST_P = 0.01, 100

LIMIT = 10_000
"""Largest number of cycles when none is asked for."""


@dataclass(frozen=True, slots=True)
class BalanceOptions:
    """The options of `Symmetries.balance`, which explains them.

    Raises:
        BalanceError: for values out of range.
    """

    p: float = 2.0
    c: float = 1.0
    cycles: int | None = None
    tol: float = 1e-6
    method: str = "two-level"
    biases: bool = False
    modules: Choice | None = None
    compile: bool | None = False

    def __post_init__(self) -> None:
        check_options(self.p, self.c, self.cycles, self.tol, self.method)

    @property
    def norm(self) -> Norm:
        """The norm of `p`."""
        return Norm(self.p)

    @property
    def is_streamed(self) -> bool:
        """Are matrices read from the weights whenever they are needed, where that is cheap?"""
        return self.method == "two-level" and not self.norm.is_max


def check_options(p: float, c: float, cycles: int | None, tol: float, method: str) -> None:
    """Refuse options that are out of range."""
    for name, value in (("p", p), ("c", c), ("tol", tol)):
        if not is_number(value):
            way = ": for the largest entry write math.inf" if name == "p" and value in ("inf", "max") else ""
            raise BalanceError(f"{name} must be a number, not {value!r}{way}.")
    if not (LEAST_P <= p <= LARGEST_P or p == math.inf):
        why = ": powers would underflow" if p > 0 else ": only positive p make a norm" if p <= 0 else ""
        raise BalanceError(f"p must be a number from {LEAST_P} to {LARGEST_P}, or math.inf, not {p!r}{why}.")
    if not (c > 0 and math.isfinite(c)):
        raise BalanceError(f"c must be a positive finite number, not {c!r}; 1 weighs all layers alike.")
    if cycles is not None and (not is_whole(cycles) or cycles < 0):
        raise BalanceError(f"cycles must be None or an integer of at least 0, not {cycles!r}.")
    if not tol >= 0:
        raise BalanceError(f"tol must be at least 0, not {tol!r}.")
    if method not in METHODS:
        raise BalanceError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}.")
