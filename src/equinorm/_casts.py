"""Casts inside of a network: where a value loses bits, rounding keeps to scales that are powers of two, and to no others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equinorm._errors import RescaleError
from equinorm._rescale import LN2, unit_of_powers_of_two
from equinorm._scaling import Reason, Scaling
from equinorm._trace import Trace
from equinorm._values import Source, loses, source_of
from equinorm.discovery.resolve import factors


@dataclass(frozen=True, slots=True, eq=False)
class Cast:
    """A value that scales and that the network rounds to fewer bits than the weights of its classes have.

    round(s·x) = s·round(x) for powers of two s (under- and overflow aside), and for hardly any other s.

    Attributes:
        dtype: what the value is rounded to.
        reason: the operation that does, with the user's source line.
        factors: how the value scales, as those of a `Scaling`.
        tensor: name of the model's tensor that is cast as it is, or empty.
        by_autocast: is it not the network that asks for fewer bits, but autocast, in its forward or around?
    """

    dtype: torch.dtype
    reason: Reason
    factors: tuple[tuple[float, Tensor], ...]
    tensor: str = ""
    by_autocast: bool = False

    def free(self) -> Tensor:
        """Sorted ids of the free classes that move the value."""
        ids = torch.unique(torch.cat([torch.zeros(1, dtype=torch.long), *(ids.flatten() for _, ids in self.factors)]))
        return ids[ids > 0]


def casts(trace: Trace, scalings: Sequence[Scaling], roots: np.ndarray) -> tuple[Cast, ...]:
    """Casts that matter: of values whose classes move weights of more bits. Others are as exact as weights of their own dtype.

    Args:
        trace: what was seen.
        scalings: of the model's tensors.
        roots: the free classes that these use.
    """
    index = np.zeros(int(trace.classes.free_roots().max(initial=1)) + 2, np.int64)
    index[roots] = np.arange(1, len(roots) + 1)
    anywhere = torch.rand(len(roots) + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    anywhere[0] = 0.0
    wide: dict[torch.dtype, Tensor] = {}
    found = []
    for value, dtype, reason, by_autocast in trace.casts:
        stand_in = Source((), value.shape, "value", dtype, trace.label(value))
        source = source_of(value)
        name = source.names[0] if source else ""
        cast = Cast(dtype, reason, factors(stand_in, trace.classes, index), name, by_autocast)
        if dtype not in wide:
            free = [scaling.free() for scaling in scalings if loses(scaling.dtype, dtype)]
            wide[dtype] = torch.cat([torch.zeros(0, dtype=torch.long), *free])
        scales = bool((_log_scales(cast.factors, anywhere).abs() > 1e-9).any())  # its factors may cancel
        if scales and bool(torch.isin(cast.free(), wide[dtype]).any()):
            found.append(cast)
    return tuple(found)


def check(found: Sequence[Cast], scalings: Sequence[Scaling], tensors: Mapping[str, Tensor], log_scales: Tensor) -> None:
    """Refuse scales that a cast does not keep.

    Raises:
        RescaleError: for scales other than powers of two where a value is rounded, and for weights that would overflow there.
    """
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), log_scales.detach().to("cpu", torch.float64)])
    by_name = {name: scaling for scaling in scalings for name in scaling.names}
    for cast in found:
        twos = _log_scales(cast.factors, padded) / LN2
        if not bool(((twos - twos.round()).abs() <= 1e-12 * twos.abs().clamp(min=1)).all()):
            raise RescaleError(refusal(cast))
        if cast.tensor in by_name:
            scaling = by_name[cast.tensor]
            weight = scaling.effective(tensors[cast.tensor]).to("cpu", torch.float64)
            after = weight * _log_scales(scaling.factors, padded).exp()
            largest = torch.finfo(cast.dtype).max
            if bool(((after.abs() > largest) & (weight.abs() <= largest)).any()):
                raise RescaleError(
                    f"cannot rescale {cast.tensor}: the network casts it to {_name(cast.dtype)}, by {cast.reason}, where it "
                    f"would overflow (largest number {largest:.1e}). Use smaller log-scales."
                )


def check_training(found: Sequence[Cast], moving: Sequence[Scaling], power_of_two: bool) -> None:
    """Refuse to rescale at every step what a cast does not keep.

    Under autocast steps go on: weights are exact in their own dtype, and outputs as exact as autocast takes them to be.

    Raises:
        RescaleError: naming the first cast that the network itself asks for.
    """
    for cast in found:
        if cast.by_autocast:
            continue
        if not power_of_two:
            raise RescaleError(refusal(cast))
        if unit_of_powers_of_two([*moving, cast]) != unit_of_powers_of_two(moving):
            raise RescaleError(
                f"cannot rescale exactly: the network rounds a value that moves with a fractional power of a scale to "
                f"{_name(cast.dtype)}, by {cast.reason}. Leave its module out (modules=), or compute there in more bits."
            )


def _log_scales(factors: Sequence[tuple[float, Tensor]], padded: Tensor) -> Tensor:
    return sum((exponent * padded[ids] for exponent, ids in factors), start=torch.zeros((), dtype=torch.float64))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refusal(cast: Cast) -> str:
    """Why real scales are refused, and what to do."""
    info = torch.finfo(cast.dtype)
    text = (
        f"cannot rescale exactly by real scales: the network rounds a value that scales to {_name(cast.dtype)}, by "
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
        count = len(torch.unique(torch.cat([cast.free() for cast in here])))
        places = len({cast.reason for cast in here}) - 1
        more = f" and {places} more" if places else ""
        classes = "1 class passes" if count == 1 else f"{count} classes pass"
        lines.append(f"  {classes} a cast to {_name(dtype)}: {here[0].reason}{more}")
    return ["powers of two only:", *lines] if lines else []
