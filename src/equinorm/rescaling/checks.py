"""What is refused before anything is written in place: models that have changed, tensors without entries of their own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from equinorm._errors import EquinormError, RescaleError
from equinorm._memory import storage_of


def unchanged(
    names: Sequence[str],
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    error: type[EquinormError] = RescaleError,
) -> list[Tensor]:
    """The tensors of these names, each once; refuses a model in which they are no longer those that were analysed.

    Args:
        names: of one tensor, several if tied.
        shape: that it had.
        tensors: of the model now, by name.
        error: to raise.
    """
    tied = list({id(tensors[name]): tensors[name] for name in names if name in tensors}.values())
    if not tied or any(tensor.shape != shape for tensor in tied):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tied) or "gone"
        raise error(f"{names[0]} had shape {shape} when the model was analysed, now {shapes}. Analyse it again.")
    if len(tied) > 1 and len({storage_of(tensor) for tensor in tied}) > 1:
        raise error(f"{', '.join(names)} shared memory when the model was analysed and no longer do. Analyse the model again.")
    return tied


def check_in_place(what: str, tensor: Tensor, verb: str, error: type[EquinormError] = RescaleError) -> None:
    """Refuse a tensor whose entries cannot be written: on the meta device, sparse, of inference mode, expanded.

    Args:
        what: its name.
        tensor: itself.
        verb: what is to be done: rescale, permute, flip.
        error: to raise.
    """
    if tensor.is_meta:
        raise error(f"cannot {verb} {what}: it is on the meta device and holds no numbers. Load the weights first.")
    if tensor.layout != torch.strided:
        done = {"rescale": "rescaled", "permute": "permuted", "flip": "flipped"}[verb]
        raise error(f"cannot {verb} {what}: its layout is {tensor.layout}, only dense tensors can be {done}.")
    strides = () if tensor.is_contiguous() else zip(tensor.shape, tensor.stride(), strict=True)
    if tensor.is_inference() or any(size > 1 and stride == 0 for size, stride in strides):
        raise error(f"cannot {verb} {what} in place: it is an inference or an expanded tensor. Clone it first.")
