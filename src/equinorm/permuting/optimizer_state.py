"""The state of an optimizer that has a place for each entry of a parameter, and moves with it."""

from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor

from equinorm._errors import PermutationError
from equinorm.rescaling.flat_state import is_flat
from equinorm.rescaling.optimizer_wrappers import unwrapped_optimizers


def states_of(optimizer: Any, moving: Container[int]) -> Iterator[tuple[str, Tensor, int]]:
    """Description, tensor, and `id` of the parameter, of every state tensor of the parameters that move.

    Args:
        optimizer: one of the known classes, or several.
        moving: parameters by `id`.

    Raises:
        RescaleError: if the optimizer is not known.
        PermutationError: if a state tensor has another shape than its parameter.
    """
    for inner, wrappers in unwrapped_optimizers(optimizer):
        if is_flat(inner):
            kind = type(inner).__name__
            raise PermutationError(f"cannot permute the state of {kind}: one vector holds that of all parameters.")
        for group in inner.param_groups:
            for number, parameter in enumerate(group["params"]):
                if id(parameter) in moving:
                    yield from _states(parameter, f"parameter {number}", (inner, *wrappers))


def _states(parameter: Tensor, name: str, holders: tuple[Any, ...]) -> Iterator[tuple[str, Tensor, int]]:
    """Those of one parameter."""
    for holder in holders:
        for key, value in holder.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            what = f"state {key!r} of {type(holder).__name__} for {name}"
            if value.shape != parameter.shape:
                raise PermutationError(
                    f"cannot permute {what}: its shape {tuple(value.shape)} is not the parameter's "
                    f"{tuple(parameter.shape)}. Factored and flattened states are not supported."
                )
            yield what, value, id(parameter)
