"""What is refused before anything is permuted: orders that are none, tensors that have changed or cannot be written."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import PermutationError
from equinorm._memory import storage_of
from equinorm.discovery.values import Source
from equinorm.permuting.families import ChannelFamily
from equinorm.permuting.writing import Move


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


def check_unchanged(source: Source, tied: Sequence[Tensor]) -> None:
    """Refuse a model whose tensors are no longer those that were analysed."""
    name = source.names[0]
    if not tied or any(tuple(tensor.shape) != source.shape for tensor in tied):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tied) or "gone"
        raise PermutationError(f"{name} had shape {source.shape} when the model was analysed, now {shapes}. Analyse it again.")
    if len({storage_of(tensor) for tensor in tied}) > 1:
        names = ", ".join(source.names)
        raise PermutationError(f"{names} shared memory when the model was analysed and no longer do. Analyse the model again.")


def check_writable(move: Move) -> None:
    """Refuse what cannot be written in place."""
    what, tensor = move.what, move.tensor
    if tensor.is_meta:
        raise PermutationError(f"cannot permute {what}: it is on the meta device and holds no numbers. Load the weights first.")
    if tensor.layout != torch.strided:
        raise PermutationError(f"cannot permute {what}: its layout is {tensor.layout}, only dense tensors can be permuted.")
    expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.is_inference() or expanded:
        raise PermutationError(f"cannot permute {what} in place: it is an inference or an expanded tensor. Clone it first.")
