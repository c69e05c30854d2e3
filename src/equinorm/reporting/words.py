"""Numbers and names as text."""

import math
from collections.abc import Sequence
from typing import Any

from equinorm import _display
from equinorm._display import norm_name


def number(value: float) -> str:
    """Four decimals for everyday sizes, else five significant digits."""
    return numbers([value])[0]


def numbers(values: Sequence[float]) -> list[str]:
    """A column of numbers in one format: four decimals if that shows them all, else five significant digits."""
    sizes = [abs(value) for value in values if value]
    everyday = all(1e-2 <= size < 1e6 for size in sizes)
    return [(f"{value:,.4f}" if everyday else f"{value:.4e}") if value else "0" for value in values]


def percent(part: float, whole: float) -> str:
    """A share in percent with one decimal; 100.0 % is all of it."""
    return _display.percent(part, whole).replace("%", " %") if whole else "–"


def deviation(value: float) -> str:
    """A relative deviation; zero is bitwise."""
    return "0 (bitwise equal)" if value == 0 else f"{value:.1e}"


def energy_name(p: float, c: float) -> str:
    """The formula of a tensor's energy."""
    factor = "" if c == 1 else "c_k "
    return f"{factor}max |w|" if math.isinf(p) else f"{factor}Σ |w|" + ("" if p == 1 else f"^{p:g}")


def solution(balance: Any) -> list[tuple[str, str]]:
    """Norm, residual and cycles of a balance, or why there is none."""
    if not balance.energies:
        return [("result", balance.reason)]
    return [
        (f"{norm_name(balance.p)} norm", f"{number(balance.norm_before)} → {number(balance.norm_after)}"),
        ("residual", f"{balance.residuals[0]:.1e} → {balance.residual:.1e}"),
        ("cycles", str(balance.cycles)),
    ]


def in_bytes(size: int) -> str:
    """A size on disk.

    >>> in_bytes(3_280_000_000), in_bytes(70_000)
    ('3.28 GB', '0.07 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
