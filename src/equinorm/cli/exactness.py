"""When outputs count as exact, what is refused where they are not, and what for the command line copies models."""

import torch
from torch import nn

from equinorm._deviation import LIMITS, coarsest, deviation
from equinorm._errors import EquinormError, dtype_name
from equinorm.cli.loading import Loaded

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


def verified(what: str, model: nn.Module, original: nn.Module, loaded: Loaded, instead: str) -> tuple[float, torch.dtype]:
    """How far outputs deviate, relative to them, and the coarsest dtype of the original, whose limit holds.

    Args:
        what: whose outputs they are.
        model: the one that was changed.
        original: what it was.
        loaded: the example inputs.
        instead: what to do instead, in a sentence.

    Raises:
        InexactError: if the deviation is more than the limit of the dtype, or not a number.
    """
    apart, dtype = deviation(model, original, loaded.args, loaded.kwargs), coarsest(original)
    if apart <= LIMITS[dtype]:
        return apart, dtype
    raise InexactError(
        f"refused: the {what} outputs deviate by {apart:.1e}, more than the limit of {LIMITS[dtype]:g} for "
        f"{dtype_name(dtype)}. {instead}"
    )
