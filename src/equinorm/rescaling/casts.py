"""Casts inside of a network: where a value loses bits, rounding keeps to scales that are powers of two, and to no others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from equinorm._class_ids import joint_log_scales
from equinorm._display import and_more, count
from equinorm._errors import RescaleError, dtype_name
from equinorm._scaling import HALVES, Cast, Scaling
from equinorm.rescaling.powers_of_two import is_power_of_two, unit_of_powers_of_two
from equinorm.sharding.boxes import part_of


def check(found: Sequence[Cast], scalings: Sequence[Scaling], tensors: Mapping[str, Tensor], log_scales: Tensor) -> None:
    """Refuse scales that a cast does not keep.

    Raises:
        RescaleError: for scales other than powers of two where a value is rounded, and for weights that would overflow there.
    """
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), log_scales.detach().to("cpu", torch.float64)])
    by_name = {name: scaling for scaling in scalings for name in scaling.names}
    for cast in found:
        if not is_power_of_two(joint_log_scales(cast.factors, padded)):
            raise RescaleError(refusal(cast))
        if cast.tensor in by_name:
            scaling = by_name[cast.tensor]
            part, logs = part_of(cast.tensor, tensors[cast.tensor], [joint_log_scales(scaling.factors, padded)])
            weight = scaling.effective(part).to("cpu", torch.float64)
            after = weight * logs[0].exp()
            largest = torch.finfo(cast.dtype).max
            if bool(((after.abs() > largest) & (weight.abs() <= largest)).any()):
                raise RescaleError(
                    f"cannot rescale {cast.tensor}: the network casts it to {dtype_name(cast.dtype)}, by {cast.reason}, "
                    f"where it would overflow (largest number {largest:.1e}). Use smaller log-scales."
                )


def check_real(found: Sequence[Cast], scalings: Sequence[Scaling]) -> None:
    """Refuse real scales before any is known: of weights in half precision that move, and where a value that scales is cast.

    Raises:
        RescaleError: which names the first.
    """
    for scaling in scalings:
        if scaling.factors and scaling.dtype in HALVES:
            raise RescaleError(refusal_in_half(scaling.name, scaling.dtype))
    if found:
        raise RescaleError(refusal(found[0]))


def check_training(found: Sequence[Cast], held: Tensor, moving: Sequence[Scaling], power_of_two: bool) -> None:
    """Refuse to rescale at every step what a cast does not keep.

    Under autocast steps go on: weights are exact in their own dtype, and outputs as exact as autocast takes them to be.

    Args:
        found: the casts.
        held: mask over 0..num_free of classes that do not move.
        moving: scalings of what does.
        power_of_two: are scales rounded to powers of two?

    Raises:
        RescaleError: naming the first cast that the network itself asks for.
    """
    for cast in found:
        if cast.by_autocast or bool(held[cast.free()].all()):
            continue
        if not power_of_two:
            raise RescaleError(refusal(cast))
        if unit_of_powers_of_two([*moving, cast]) != unit_of_powers_of_two(moving):
            raise RescaleError(
                f"cannot rescale exactly: the network rounds a value that moves with a fractional power of a scale to "
                f"{dtype_name(cast.dtype)}, by {cast.reason}. Leave its module out (modules=), or compute there in more bits."
            )


def refusal_in_half(name: str, dtype: torch.dtype, otherwise: str = "convert the model to float32") -> str:
    """Why real scales are refused for a weight, and what to do; powers of two, or otherwise."""
    info = torch.finfo(dtype)
    return (
        f"cannot rescale {name} exactly: in {info.dtype} a real scale would change each weight by up to {info.eps / 2:.1e} "
        f"of itself. Use powers of two (power_of_two=True), or {otherwise}."
    )


def refusal(cast: Cast) -> str:
    """Why real scales are refused, and what to do."""
    info = torch.finfo(cast.dtype)
    text = (
        f"cannot rescale exactly by real scales: the network rounds a value that scales to {dtype_name(cast.dtype)}, by "
        f"{cast.reason}. Only powers of two leave that as it is; others would change it by up to {info.eps / 2:.1e} of itself. "
        "Use powers of two (power_of_two=True)"
    )
    if cast.dtype == torch.float16:
        text += f", and scales near 1: float16 overflows above {info.max:.0f}"
    return text + "."


def described(found: Sequence[Cast]) -> list[str]:
    """One line for each dtype that values are rounded to."""
    lines = []
    for dtype in dict.fromkeys(cast.dtype for cast in found):
        here = [cast for cast in found if cast.dtype == dtype]
        number = len(torch.unique(torch.cat([cast.free() for cast in here])))
        reasons = [str(reason) for reason in dict.fromkeys(cast.reason for cast in here)]
        classes = count(number, "class passes", "classes pass")
        lines.append(f"  {classes} a cast to {dtype_name(dtype)}: {and_more(reasons, 1)}")
    return ["powers of two only:", *lines] if lines else []
