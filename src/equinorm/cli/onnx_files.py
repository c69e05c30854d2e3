"""ONNX files on the command line: read with the inputs that options name, written back with other weights."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._display import count
from equinorm.cli.inputs import read_inputs
from equinorm.cli.weights import InputError, shorten
from equinorm.quantization.prepare import Preparation
from equinorm.reporting.files import Files
from equinorm.reporting.words import deviation

VALUE = "value:"
"""In front of a number that an input always has, such as sr=value:16000."""


def is_onnx(name: str) -> bool:
    """Does this name an ONNX file?"""
    return name.endswith(".onnx") and not name.startswith("hf:")


def names_of(name: str) -> list[str]:
    """Names of an ONNX file's inputs, in order."""
    from equinorm.integrations.onnx import input_names  # only who names such a file needs onnx

    return input_names(Path(name).expanduser())


def from_onnx(
    name: str, inputs: Sequence[str], fold: bool, free: bool | Sequence[str]
) -> tuple[nn.Module, tuple, tuple[str, ...]]:
    """The module, example inputs, and what a reader must know.

    Args:
        name: of the file.
        inputs: shapes or files, in order or as name=…; name=value:16000 for one that always has this number.
        fold: fold batch normalization.
        free: set bounds of Clips free, or those of these names.

    Raises:
        EquinormError: if it cannot be read.
    """
    from equinorm.integrations.onnx import read

    path, names = Path(name).expanduser(), names_of(name)
    given: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    places = iter(names)
    for text in inputs:
        named = next((known for known in sorted(names, key=len, reverse=True) if text.startswith(f"{known}=")), None)
        value = text if named is None else text[len(named) + 1 :]
        target = named if named is not None else next((free for free in places if free not in given | fixed), None)
        if target is None:
            raise InputError(f"{name} takes {count(len(names), 'input')}: {shorten(names)}.")
        if value.startswith(VALUE):
            fixed[target] = _number(value.removeprefix(VALUE), text)
        else:
            given[target] = _given(value, text, name, names)
    found = read(path, given, fixed, fold=fold, free=free)
    notes = []
    if found.preparation is not None:
        notes += preparing_notes(found.preparation)
    if found.unread:
        run = count(len(found.unread), "node runs unread and pins what it reads", "nodes run unread and pin what they read")
        notes.append(f"{run}: {shorten(found.unread)}")
    if found.fed:
        notes.append(f"a caller may replace {shorten(found.fed)}, which are inputs too: they stay as they are")
    if found.module.tiny:
        zeros = count(found.module.tiny, "entry of weights below 2^-100 counts", "entries of weights below 2^-100 count")
        notes.append(f"{zeros} as zero")
    return found.module, found.args, tuple(notes)


def preparing_notes(preparation: Preparation) -> list[str]:
    """What was done to a network before, in sentences."""
    notes = []
    if preparation.folded:
        notes.append(f"{count(len(preparation.folded), 'batch normalization')} folded into the layer in front")
    if preparation.freed:
        notes.append(f"{count(len(preparation.freed), 'bounded activation')} may get one bound for each channel")
    if preparation.left:
        shown = shorten([f"{name}: {why}" for name, why in preparation.left.items()])
        notes.append(f"left as they are, of normalizations and bounds: {shown}")
    return notes


def to_write(
    module: nn.Module, args: Sequence[Tensor], path: Path, more: Sequence[Sequence[Tensor]] = (), *, corrected: bool = False
) -> tuple[Files, Any]:
    """What to write for a module that was read from an ONNX file, and what then says how far the outputs are apart.

    Args:
        module: as it was read, other numbers in it.
        args: inputs to verify it on.
        path: of the new file.
        more: further inputs.
        corrected: were biases corrected, so that it computes something else on purpose?
    """
    from equinorm.integrations.onnx import OnnxModule, Written

    assert isinstance(module, OnnxModule)
    written = Written(module, args, more, corrected)
    return written.files(path), written


def about(written: Any, output: Path, files: Sequence[tuple[Path, Any]]) -> list[str]:
    """What to say of an ONNX file that was written."""
    said = [f"in onnxruntime the new file's outputs deviate by {deviation(written.deviation)} from the old one's"]
    if written.corrected:
        said[0] += f", by its corrected biases; by {deviation(written.from_module)} from what was verified"
    if written.bounds:
        said.append(f"{count(written.bounds, 'Clip')} got a Min with one bound for each channel")
    return said + [f"its numbers lie beside it, in {path.name}" for path, _ in files if path.name == f"{output.name}.data"]


def _number(text: str, option: str) -> float | int:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InputError(f"{option!r} names no number after {VALUE}.")


def _given(value: str, option: str, name: str, names: Sequence[str]) -> Any:
    """A shape, or the only tensor that a file holds."""
    if re.fullmatch(r"\d+(x\d+)*|scalar", value):
        return () if value == "scalar" else tuple(int(size) for size in value.split("x"))
    if "=" in value:
        raise InputError(f"{name} has no input {value.partition('=')[0]!r}. It takes {shorten(names)}.")
    args, kwargs = read_inputs([value], torch.float32)
    tensors = [*args, *kwargs.values()]
    if len(tensors) != 1:
        raise InputError(f"{option!r} names {count(len(tensors), 'tensor')}. Name one for each input, as NAME=FILE.")
    return tensors[0]
