"""Calibration data of the command line: files of samples, in batches that a model takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equinorm._errors import dtype_name
from equinorm.cli.weights import InputError, parts, read, readable, shorten

Batch = tuple[Tensor, ...] | dict[str, Tensor]
"""Positional inputs, or inputs by keyword."""

_HOLDS = (
    "It must hold inputs of many samples, which their first axis counts: a tensor, a list of tensors, or a dict by keyword."
)


class Samples:
    """Inputs of many samples.

    Attributes:
        tensors: by keyword, or by place: 0, 1, …
        count: how many samples there are.

    Raises:
        InputError: if the file cannot be read, or its tensors hold unequal numbers of samples.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.tensors = path, _tensors(path)
        counts = {len(tensor) if tensor.dim() else 0 for tensor in self.tensors.values()}
        if len(counts) != 1 or not min(counts):
            shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self.tensors.items()) or "nothing"
            raise InputError(f"the first axis of every tensor in {path} must count the same samples, at least one: {shapes}.")
        (self.count,) = counts

    def placed(self, names: Sequence[str]) -> "Samples":
        """By place what is by keyword, in the order of an ONNX file's inputs.

        Raises:
            InputError: for names that are no inputs, and inputs without samples.
        """
        named = dict(enumerate(names))
        found = {named.get(key, str(key)) if isinstance(key, int) else key: tensor for key, tensor in self.tensors.items()}
        if odd := [name for name in found if name not in names]:
            raise InputError(f"{self.path} holds {shorten(odd)}, which is no input. The inputs are {shorten(names)}.")
        if missing := [name for name in names if name not in found]:
            raise InputError(
                f"{self.path} holds no samples of {shorten(missing)}. It must hold those of every input: {shorten(names)}. One "
                f"that always has the same number is given by --input {missing[0]}=value:NUMBER."
            )
        self.tensors = {place: found[name] for place, name in enumerate(names)}
        return self

    def whole(self, size: int) -> "Samples":
        """Without those that are left over where only so many at a time are taken.

        Raises:
            InputError: if there are fewer.
        """
        if self.count < size:
            raise InputError(
                f"{self.path} holds {self.count} samples, and the model was exported for {size} at a time. Give at least so "
                "many, or export it with a first axis of any size: torch.export.export(..., dynamic_shapes=...)."
            )
        self.count -= self.count % size
        self.tensors = {key: tensor[: self.count] for key, tensor in self.tensors.items()}
        return self

    def shapes(self, size: int, names: Sequence[str] = ()) -> list[str]:
        """What `--input` would say of one batch."""
        return [self._shape(name, tensor, min(size, self.count), names) for name, tensor in self.tensors.items()]

    def batches(self, size: int) -> list[Batch]:
        """All samples, so many at a time; what is left over makes a smaller batch."""
        found: list[Batch] = []
        for start in range(0, self.count, size):
            part: Mapping[Any, Tensor] = {name: tensor[start : start + size] for name, tensor in self.tensors.items()}
            by_place = all(isinstance(name, int) for name in part)
            found.append(tuple(part.values()) if by_place else dict(part))
        return found

    @staticmethod
    def _shape(name: Any, tensor: Tensor, size: int, names: Sequence[str]) -> str:
        sizes = "x".join(map(str, (size, *tensor.shape[1:])))
        if names:  # of an ONNX file, which knows its own dtypes
            return f"{names[name]}={sizes}"
        if tensor.is_floating_point():  # which the model has its own of
            return f"{name}=" * isinstance(name, str) + sizes
        return f"{name}=" * isinstance(name, str) + f"{dtype_name(tensor.dtype)}:{sizes}"


def _tensors(path: Path) -> dict[Any, Tensor]:
    if path.suffix in (".npz", ".npy"):
        readable(path)
        try:
            loaded = np.load(path, allow_pickle=False)
            arrays = {"arr_0": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            named: Any = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise InputError(f"cannot read {path} as arrays: {error}. Write it with numpy.savez.") from error
        if all(name == f"arr_{place}" for place, name in enumerate(named)):  # numpy.savez without keywords
            named = list(named.values())
    else:
        named = read(path, "calibration data", _HOLDS)
    found = parts(named)
    if odd := [name for name, tensor in found.items() if not isinstance(tensor, Tensor)]:
        raise InputError(f"{path} holds no tensor at {odd[0]!r}. {_HOLDS}")
    return found
