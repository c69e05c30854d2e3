"""Example inputs of a graph: of its own sizes, or of those that a user gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equinorm._display import count
from equinorm.integrations.onnx.errors import OnnxError
from equinorm.integrations.onnx.numbers import to_array, to_tensor
from equinorm.integrations.onnx.operators.elementwise import DTYPES

Given = Mapping[str, Any] | Sequence[Any] | None
"""Tensors, arrays or shapes, by name or in order."""


def examples(graph: Any, names: Sequence[str], given: Given, path: Path) -> tuple[Tensor, ...]:
    """One tensor for each input: normally distributed with seed 0, zeros for integers, true for booleans.

    Args:
        graph: the GraphProto.
        names: of the inputs.
        given: tensors or shapes, by name or in order; the file's own sizes for the others. A first axis of no size has one.
        path: of the file, for errors.

    Raises:
        OnnxError: for a size that is missing or differs from the file's, and for inputs that are no tensors.
    """
    if given is not None and not isinstance(given, Mapping):
        if len(given) > len(names):
            raise OnnxError(f"{path} takes {count(len(names), 'input')} ({', '.join(names)}), not {len(given)}.")
        given = dict(zip(names, given, strict=False))
    chosen = dict(given or {})
    if unknown := sorted(chosen.keys() - set(names)):
        raise OnnxError(f"{path} has no input {unknown[0]!r}. It takes {', '.join(names)}.")
    generator = torch.Generator().manual_seed(0)
    values = {value.name: value for value in graph.input}
    return tuple(_example(values[name], chosen.get(name), path, generator) for name in names)


def fixed_numbers(graph: Any, given: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Inputs that always have these numbers, in the dtype of the file. One number stands for all entries.

    Raises:
        OnnxError: for an input that there is not, and for numbers that it cannot hold.
    """
    values, found = {value.name: value for value in graph.input}, {}
    for name, number in given.items():
        if name not in values:
            raise OnnxError(f"{path} has no input {name!r}. It takes {', '.join(values)}.")
        tensor = values[name].type.tensor_type
        if tensor.elem_type not in DTYPES:
            raise OnnxError(f"the input {name!r} of {path} holds no numbers that could be fixed.")
        try:
            array = to_array(torch.as_tensor(number).to(DTYPES[tensor.elem_type]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise OnnxError(f"the input {name!r} of {path} cannot be fixed to {number!r}, which is no number.") from error
        sizes = [axis if isinstance(axis, int) else 1 for axis in _axes(values[name])]
        found[name] = np.full(sizes, array.item(), array.dtype) if array.size == 1 else array
    return found


def _example(value: Any, wanted: Any, path: Path, generator: torch.Generator) -> Tensor:
    """What an input is given: a tensor, or one of the shape that is wanted; of None of the file's shape, one sample."""
    dtype = _dtype(value, path)
    if isinstance(wanted, np.ndarray):
        wanted = to_tensor(wanted)
    sizes = wanted.shape if isinstance(wanted, Tensor) else _sizes(value, path) if wanted is None else wanted
    sizes = _checked(sizes, value, path)
    if isinstance(wanted, Tensor):
        if wanted.dtype != dtype and wanted.is_floating_point() != dtype.is_floating_point:
            raise OnnxError(f"the input {value.name!r} of {path} holds {dtype}, not {wanted.dtype}.")
        return wanted.to(dtype)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
    return torch.ones(sizes, dtype=dtype) if dtype == torch.bool else torch.zeros(sizes, dtype=dtype)


def _dtype(value: Any, path: Path) -> torch.dtype:
    if not value.type.HasField("tensor_type"):
        raise OnnxError(f"the input {value.name!r} of {path} is a sequence, a map or an optional value: only tensors are read.")
    dtype = DTYPES.get(value.type.tensor_type.elem_type)
    if dtype is None:
        raise OnnxError(f"the input {value.name!r} of {path} holds strings or numbers of a type that PyTorch has not.")
    return dtype


def _axes(value: Any) -> list[int | str]:
    """Sizes of an input's axes; of those that are free a name."""
    axes = value.type.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else axis.dim_param or "?" for axis in axes]


def _sizes(value: Any, path: Path) -> list[int]:
    """The file's sizes, with one sample."""
    if not value.type.tensor_type.HasField("shape"):
        raise OnnxError(
            f"{path} does not say how many axes its input {value.name!r} has. Give its shape, for example "
            f"inputs={{{value.name!r}: (1, 3, 224, 224)}}; on the command line --input {value.name}=1x3x224x224."
        )
    sizes = [1 if place == 0 and isinstance(size, str) else size for place, size in enumerate(_axes(value))]
    if free := [size for size in sizes if isinstance(size, str)]:
        shown = "x".join("N" if isinstance(size, str) else str(size) for size in sizes)
        raise OnnxError(
            f"the input {value.name!r} of {path} has axes without a size ({', '.join(free)}). Give its whole shape, for "
            f"example inputs={{{value.name!r}: {tuple(64 if isinstance(s, str) else s for s in sizes)}}}; on the command "
            f"line --input {value.name}={shown} with numbers for N."
        )
    return [int(size) for size in sizes]


def _checked(wanted: Any, value: Any, path: Path) -> torch.Size:
    """A shape that is one, and fits what the file says of it."""
    try:
        sizes = torch.Size(wanted)
    except TypeError as error:
        raise OnnxError(f"the input {value.name!r} of {path} is given as {wanted!r}: neither a tensor nor a shape.") from error
    axes = _axes(value)
    is_wrong = (
        len(sizes) != len(axes)
        or any(size < 0 for size in sizes)
        or any(isinstance(axis, int) and axis != size for axis, size in zip(axes, sizes, strict=True))
    )
    if value.type.tensor_type.HasField("shape") and is_wrong:
        shown = "x".join(map(str, axes)) or "scalar"
        raise OnnxError(f"the input {value.name!r} of {path} is {shown}, not {'x'.join(map(str, sizes)) or 'scalar'}.")
    return sizes
