"""Which entries of a sharded tensor this process holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import RescaleError
from equinorm._memory import is_sharded, local
from equinorm._scaling import Scaling


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor.

    Attributes:
        offsets: first place along every axis.
        sizes: places along every axis, from there on.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def narrowed(self, tensor: Tensor) -> Tensor:
        """The part of what broadcasts to the whole tensor; axes of size 1 stay."""
        for axis in range(-1, -tensor.dim() - 1, -1):
            if tensor.size(axis) > 1:
                tensor = tensor.narrow(axis, self.offsets[axis], self.sizes[axis])
        return tensor

    def scaling(self, scaling: Scaling) -> Scaling:
        """How the part moves."""
        factors = tuple((exponent, self.narrowed(ids)) for exponent, ids in scaling.factors)
        return replace(scaling, shape=self.sizes, factors=factors)


def box_of(name: str, tensor: Tensor) -> Box | None:
    """The part of a tensor that this process holds; None where that is all of it.

    Raises:
        RescaleError: if that is no box, or not the part that PyTorch says it is.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    held: Any = tensor
    sizes, offsets = compute_local_shape_and_global_offset(held.shape, held.device_mesh, held.placements)
    if tuple(local(held).shape) != tuple(sizes):
        raise RescaleError(
            f"cannot rescale {name}: this process holds a part of shape {tuple(local(held).shape)}, and its placements "
            f"{held.placements} say {tuple(sizes)}. Shard it by fully_shard or parallelize_module."
        )
    return Box(tuple(map(int, offsets)), tuple(map(int, sizes)))


def part_of(name: str, tensor: Tensor, logs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What this process holds of a tensor, and of the logarithms that broadcast to it."""
    box = box_of(name, tensor)
    return (tensor, [*logs]) if box is None else (local(tensor), [box.narrowed(log) for log in logs])


def held_like(name: str, value: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a tensor, whole or in parts, on the device and in the dtype and the parts of another one of its shape.

    Every process calls this: parts of other boxes are put together first.
    """
    box, value = box_of(name, tensor), value.detach()
    if box_of(name, value) == box:
        return value.to(tensor.device, tensor.dtype, copy=True)
    found, value = torch.zeros_like(tensor.detach()), whole(value)
    local(found).copy_(value if box is None else box.narrowed(value))
    return found


def whole(value: Any) -> Any:
    """A tensor, put together from the parts of all processes, each of which calls this; anything else as it is."""
    sharded: Any = value
    return sharded.full_tensor() if isinstance(value, Tensor) and is_sharded(value) else value
