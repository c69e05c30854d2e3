"""When outputs count as exact, what is refused where they are not, and what for the command line copies models."""

import torch

from equinorm._deviation import LIMITS, coarsest
from equinorm._errors import EquinormError, dtype_name

__all__ = ["LIMITS", "VERIFYING", "WIDER", "InexactError", "coarsest", "remedy", "verify"]

VERIFYING = "to verify its outputs"
"""What the command line copies models for."""

WIDER = "a factory that returns model.double()"
"""What computes more exactly."""


class InexactError(EquinormError):
    """Outputs deviate by more than rounding."""


def remedy(power_of_two: bool) -> str:
    """What to do where balanced outputs deviate."""
    if power_of_two:
        return f"Scales so large reach numbers that this dtype cannot hold: use {WIDER}."
    return f"Use --power-of-two, which changes no mantissa, or {WIDER}."


def verify(what: str, apart: float, dtype: torch.dtype, instead: str) -> None:
    """Refuse outputs that deviate by more than rounding.

    Args:
        what: whose outputs they are.
        apart: how far they deviate, relative to the outputs.
        dtype: the coarsest of the model's.
        instead: what to do instead, in a sentence.

    Raises:
        InexactError: if the deviation is more than the limit of the dtype, or not a number.
    """
    if apart <= LIMITS[dtype]:
        return
    raise InexactError(
        f"refused: the {what} outputs deviate by {apart:.1e}, more than the limit of {LIMITS[dtype]:g} for "
        f"{dtype_name(dtype)}. {instead}"
    )
