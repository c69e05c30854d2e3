"""Numbers as arrays, as PyTorch's tensors, and as ONNX stores them."""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from equinorm.integrations.onnx.errors import library

FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""Dtypes of weights that may be rescaled, by ONNX's numbers for them."""


def to_tensor(array: ndarray, floating: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these numbers; float32 becomes `floating`."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    if array.dtype.kind not in "biuf":
        raise TypeError("strings are no numbers" if array.dtype.kind in "OUS" else f"numbers of type {array.dtype.name}")
    found = torch.from_numpy(np.array(array, order="C"))  # a copy, which keeps an array without axes
    return found.to(floating) if found.dtype == torch.float32 and floating != torch.float32 else found


LEAST = 2.0**-100
"""Weights below this are read as zero. Training with weight decay leaves such numbers, down to what float32 can hardly hold; a
rescaling would lose them."""


def weight(array: ndarray) -> tuple[Tensor, int]:
    """A weight, and how many of its entries are so small that they were read as zero."""
    tensor = to_tensor(array)
    tiny = (tensor != 0) & (tensor.abs() < LEAST)
    count = int(tiny.sum()) if tensor.dtype != torch.float16 else 0
    return (tensor.masked_fill(tiny, 0.0) if count else tensor), count


def to_array(tensor: Tensor) -> ndarray:
    """An array of these numbers, for ONNX."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(library("ml_dtypes").bfloat16)
    return tensor.numpy()


def store(proto: Any, tensor: Tensor) -> None:
    """Put other numbers into a TensorProto, in the field that holds them now.

    Raises:
        TypeError: if shape or dtype differ.
    """
    if tuple(proto.dims) != tuple(tensor.shape) or FLOATS.get(proto.data_type) != tensor.dtype:
        raise TypeError(f"{proto.name} has another shape or dtype in the file")
    array = to_array(tensor)
    if proto.HasField("raw_data"):
        proto.raw_data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return
    field = {1: "float_data", 11: "double_data"}.get(proto.data_type, "int32_data")
    values = array.reshape(-1) if field != "int32_data" else array.reshape(-1).view(np.uint16)
    proto.ClearField(field)
    getattr(proto, field).extend(values.tolist())
