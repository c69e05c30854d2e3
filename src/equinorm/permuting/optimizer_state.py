"""The state of an optimizer that has a place for each entry of a parameter, and moves with it."""

from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor

from equinorm._errors import PermutationError
from equinorm.rescaling.optimizer_state import unwrapped_optimizer


def states_of(optimizer: Any, moving: Container[int]) -> Iterator[tuple[str, Tensor, int]]:
    """Description, tensor, and `id` of the parameter, of every state tensor of the parameters that move.

    Args:
        optimizer: one of the known classes, which update each entry by itself.
        moving: parameters by `id`.

    Raises:
        RescaleError: if the optimizer is not known.
        PermutationError: if a state tensor has another shape than its parameter.
    """
    optimizer, wrappers = unwrapped_optimizer(optimizer)
    names = {id(p): f"parameter {number}" for group in optimizer.param_groups for number, p in enumerate(group["params"])}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in moving:
                continue
            for holder in (optimizer, *wrappers):
                for key, value in holder.state.get(parameter, {}).items():
                    if not isinstance(value, Tensor) or value.dim() == 0:
                        continue
                    what = f"state {key!r} of {type(holder).__name__} for {names[id(parameter)]}"
                    if value.shape != parameter.shape:
                        raise PermutationError(
                            f"cannot permute {what}: its shape {tuple(value.shape)} is not the parameter's "
                            f"{tuple(parameter.shape)}. Factored and flattened states are not supported."
                        )
                    yield what, value, id(parameter)
