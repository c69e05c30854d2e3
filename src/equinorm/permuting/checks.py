"""What is refused before anything is permuted: orders that are none."""

from typing import Any

import torch
from torch import Tensor

from equinorm._errors import PermutationError
from equinorm.permuting.families import ChannelFamily


def checked(family: ChannelFamily, order: Any) -> Tensor:
    """An order of a family's channels."""
    shape = tuple(getattr(order, "shape", ()))
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or shape != family.shape or order.is_meta:
        kind = f"{order.dtype} of shape {shape}" if isinstance(order, Tensor) else type(order).__name__
        raise PermutationError(f"the order of {family.name} must be an int64 tensor of shape {family.shape}, not {kind}.")
    order = order.cpu()
    if not bool((order.sort(-1).values == torch.arange(family.size)).all()):
        raise PermutationError(f"the order of {family.name} must hold each of its channels 0 to {family.size - 1} once.")
    return order
