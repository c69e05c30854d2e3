"""Several measurements of one thing in one cell."""

from collections.abc import Iterable
from statistics import fmean, stdev


def mean_and_deviation(values: Iterable[float], digits: int) -> str:
    """The mean and, of several, their standard deviation."""
    values = [*values]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
