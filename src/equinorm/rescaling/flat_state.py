"""L-BFGS: one vector holds what belongs to all parameters, end to end.

It remembers pairs of steps s and of differences y of gradients. Where w ↦ D w these become D s and D⁻¹ y, so that sᵀy stays;
the size of its first guess, sᵀy / yᵀy of the last pair, is computed anew.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, optim

KEYS = ("d", "prev_flat_grad", "old_stps", "old_dirs")
"""The last direction, the gradient where it began, and the pairs s and y."""


def is_flat(optimizer: Any) -> bool:
    """Does it keep one vector for all parameters?"""
    return isinstance(optimizer, optim.LBFGS)


def flat_states(optimizer: optim.LBFGS, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What belongs to one parameter, as views in its shape."""
    first = 0
    for other in optimizer._params:
        if other is parameter:
            break
        first += other.numel()
    for key, vector in vectors(optimizer):
        yield key, vector[first : first + parameter.numel()].view(parameter.shape)


def vectors(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """All vectors that there are; none for other optimizers."""
    if not is_flat(optimizer):
        return
    state = optimizer.state.get(optimizer._params[0], {})
    for key in KEYS:
        held = state.get(key)
        yield from ((key, vector) for vector in (held if isinstance(held, list) else [held]) if isinstance(vector, Tensor))


@torch.no_grad()
def renew_(optimizer: Any) -> None:
    """Compute the first guess anew, once vectors have moved."""
    if not is_flat(optimizer):
        return
    state = optimizer.state.get(optimizer._params[0], {})
    if state.get("old_dirs"):
        difference, step = state["old_dirs"][-1], state["old_stps"][-1]
        state["H_diag"] = difference.dot(step) / difference.dot(difference)
