"""Inputs of models: from shapes, or from files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equinorm.cli.weights import InputError, first_sentence, parts, read, shorten

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<dtype>[a-z]+\d*):)?(?P<sizes>\d+(?:x\d+)*|scalar)")


def read_inputs(inputs: Sequence[str], floating: torch.dtype) -> tuple[tuple, dict[str, Any]]:
    """Inputs from shapes such as ``1x3x224x224``, ``int64:1x16`` or, by keyword, ``mask=bool:1x16``; or from files.

    Floating-point inputs are drawn from a standard normal distribution with seed 0; integers are zeros, booleans true. A
    file holds one tensor, a list of them (positional) or a mapping from names to tensors (keyword inputs).

    Raises:
        InputError: if one cannot be read.
    """
    generator = torch.Generator().manual_seed(0)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in inputs:
        if (match := _SHAPE.fullmatch(text)) is not None:
            sizes = [] if match["sizes"] == "scalar" else [int(size) for size in match["sizes"].split("x")]
            dtype = _dtype(match["dtype"], text) if match["dtype"] else floating
            try:
                example = _example(sizes, dtype, generator)
            except (RuntimeError, OverflowError) as error:
                raise InputError(
                    f"cannot make the input {text!r}: {first_sentence(error)}. Write another shape, or name a file."
                ) from error
            if match["name"]:
                kwargs[match["name"]] = example
            else:
                args.append(example)
            continue
        path = Path(text)
        if path.suffix not in (".pt", ".pth", ".safetensors"):
            raise InputError(
                f"{text!r} is no input. Write a shape such as 1x3x224x224 or int64:1x16, or name a .pt or .safetensors file."
            )
        value = read(path, "inputs", "It must hold a tensor, a list of tensors, or a dict of tensors by keyword.")
        if isinstance(value, dict) and path.suffix == ".safetensors" and len(value) == 1:
            value = next(iter(value.values()))
        found, is_named = parts(value), isinstance(value, dict)
        odd = [key for key, part in found.items() if isinstance(part, str) or isinstance(key, str) != is_named]
        if odd:
            raise InputError(f"{path} holds inputs that no model takes: {shorten([repr(key) for key in odd])}. Write tensors.")
        if is_named:
            kwargs |= found
        else:
            args += found.values()
    return tuple(args), kwargs


def _example(sizes: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    return torch.ones(sizes, dtype=dtype) if dtype == torch.bool else torch.zeros(sizes, dtype=dtype)


def _dtype(name: str, text: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"unknown dtype {name!r} in input {text!r}. Use for example float32, float64, int64 or bool.")
    return dtype
