"""What users give: refused in words where it is something else."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from equinorm._errors import EquinormError, EquivalenceError, RescaleError


def real_numbers(log_scales: Any, num_free: int) -> Tensor:
    """A dense tensor of real numbers."""
    wanted = f"log_scales must be a tensor of shape ({num_free},)"
    if isinstance(log_scales, (str, bytes)) or not isinstance(log_scales, (Tensor, Sequence, np.ndarray)):
        raise RescaleError(f"{wanted}, not {type(log_scales).__name__}.")
    try:
        found = torch.as_tensor(log_scales).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RescaleError(f"{wanted}, not this {type(log_scales).__name__}: {error}.") from error
    if found.is_meta:
        raise RescaleError(f"{wanted}, and one on the meta device holds no numbers.")
    if found.layout != torch.strided or found.is_quantized or found.is_complex() or found.dtype == torch.bool:
        raise RescaleError(f"{wanted} of real numbers, not of {found.dtype} in layout {found.layout}.")
    return found


def positional(args: Any, error: type[EquinormError] = EquinormError, what: str = "args") -> tuple:
    """Positional inputs, of which one tensor may stand alone.

    Args:
        args: as the user gives them.
        error: to raise.
        what: they are.

    Raises:
        EquinormError: of that class, for what are none.
    """
    if isinstance(args, Tensor):
        return (args,)
    if not isinstance(args, (tuple, list)):
        is_named = what == "args" and isinstance(args, Mapping)  # what tokenizers of transformers return is one too
        way = " Give inputs by name as the next argument, kwargs: model, (), inputs." if is_named else ""
        raise error(f"{what} must be a tuple of inputs, not {type(args).__name__}.{way}")
    return tuple(args)


def check_keywords(kwargs: Any, error: type[EquinormError] = EquinormError) -> None:
    """Refuse what are no keyword inputs; None stands for none of them."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise error(f"kwargs must be a dict of keyword inputs, not {type(kwargs).__name__}.")


def batches_of(data: Any) -> Iterator[tuple]:
    """Positional inputs of one batch after the other.

    Raises:
        EquivalenceError: if data are no batches of positional inputs, or hold none.
    """
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise EquivalenceError(f"data must be batches of positional inputs, not {type(data).__name__}. For one: [x].")
    number = -1
    for number, batch in enumerate(data):
        yield positional(batch, EquivalenceError, f"data batch {number}")
    if number < 0:
        raise EquivalenceError("data hold no batch.")


def every_call(args: Any, kwargs: Any, also: Any) -> list[tuple[tuple, Mapping[str, Any] | None]]:
    """Positional and keyword inputs of every call that a network is analysed for.

    Args:
        args: positional inputs of the first.
        kwargs: its keyword inputs.
        also: inputs of the others, positional ones or keyword ones in place of the first's.

    Raises:
        EquinormError: for what are no inputs.
    """
    first = positional(args)
    check_keywords(kwargs)
    further = [(first, other) if isinstance(other, Mapping) else (other, kwargs) for other in further_inputs(also)]
    return [(first, kwargs), *further]


def is_number(value: Any) -> TypeGuard[float]:
    """Is it a real number? True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> TypeGuard[int]:
    """Is it a whole number? True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(number: Any, name: str, error: type[EquinormError] = EquinormError) -> None:
    """Refuse what is no positive whole number."""
    if not is_whole(number) or number < 1:
        raise error(f"{name} must be a whole number of at least 1, not {number!r}.")


def check_flag(value: Any, name: str, error: type[EquinormError]) -> None:
    """Refuse what is no truth value."""
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False, not {value!r}.")


def further_inputs(also: Any) -> list[Any]:
    """The further inputs, each by itself."""
    if isinstance(also, (Tensor, Mapping)):
        raise EquinormError(f"also must be a list of further inputs. For one: also=[...], around this {type(also).__name__}.")
    if not isinstance(also, (tuple, list)):
        raise EquinormError(f"also must be a list of further inputs, not {type(also).__name__}.")
    if wrong := [type(other).__name__ for other in also if not isinstance(other, (Tensor, tuple, list, Mapping))]:
        raise EquinormError(f"also must hold further inputs (a tuple, a tensor, or a dict of keyword inputs), not {wrong[0]}.")
    return list(also)
