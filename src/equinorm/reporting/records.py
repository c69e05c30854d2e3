"""Records: what is drawn, and any as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from equinorm._display import plain


@dataclass(frozen=True, slots=True)
class Balanced:
    """What is drawn of a balance: `energies` have name, before and after, `totals` are these together, `tol` 0 is unknown."""

    model: str
    p: float
    c: float
    energies: Sequence[Any]
    totals: tuple[float, float]
    residuals: tuple[float, ...]
    tol: float
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Magnitudes of one weight before and after, as matrices: rows along axis 0, columns along axis 1, kernels as their rms."""

    name: str
    before: Tensor
    after: Tensor


def as_json(record: Any) -> dict[str, Any]:
    """A record as JSON holds it: numbers that are not finite become the strings "inf", "-inf" and "nan"."""
    return plain(asdict(record))
