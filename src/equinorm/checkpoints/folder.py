"""A checkpoint's folder: its safetensors, what they hold, and what else lies there."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from equinorm._display import and_more, count
from equinorm.checkpoints.stored import CheckpointError, Entry, StoredFile, open_stored

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"

_WEIGHTS = (
    *(".bin", ".ckpt", ".distcp", ".gguf", ".h5", ".keras", ".mlmodel", ".msgpack", ".nemo", ".onnx", ".ot"),
    *(".pb", ".pt", ".pt2", ".pte", ".pth", ".safetensors", ".tflite"),
)
"""Files that may hold weights, which would no longer be those of the folder."""

_BESIDE = re.compile(r"\.onnx[._]data(_\d+)?$|\.data-\d+-of-\d+$|\.ckpt\.(index|meta)$")
"""Ends of further ones, which ONNX and TensorFlow store beside a file of theirs."""

_NARROW = ("F4", "F6_", "F8_", "I4", "I8", "I32", "U4", "U8", "U32")
"""Starts of the dtypes in which quantized numbers are stored; whole numbers of 32 bits hold several."""

_BESIDE_TENSOR = ("_scale", "_scale_inv", ".absmax")
_BESIDE_WEIGHT = ("scales", "SCB")
"""What tools store beside quantized numbers: ends of the tensor's own key, and names beside a module's weight."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a folder, on disk.

    Attributes:
        folder: where they are.
        files: that hold them.
        entries: every tensor by key.
    """

    folder: Path
    files: tuple[StoredFile, ...] = field(repr=False)
    entries: Mapping[str, Entry] = field(repr=False)
    where: Mapping[str, StoredFile] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.size for file in self.files)

    def mapped(self, key: str) -> Tensor:
        """A tensor that lies in its file; see `StoredFile.mapped`."""
        return self.where[key].mapped(key)

    def others(self) -> tuple[list[Path], list[Path]]:
        """Relative paths of files that fit any weights, as tokenizers do, and of those that may hold other weights.

        Raises:
            CheckpointError: for a link that leads nowhere, or to a folder around it.
        """
        own = {file.path.name for file in self.files}
        index = None if own == {ONE} else INDEX  # beside one file it would name others
        found = [path for path in _walk(self.folder, Path(), ()) if path.as_posix() not in own]
        weights = [path for path in found if path.as_posix() != index and _is_weight(path.name)]
        return [path for path in found if path not in weights], weights


def _is_weight(name: str) -> bool:
    """May a file of this name hold weights, or say which files do?"""
    return name.endswith((*_WEIGHTS, ".index.json")) or _BESIDE.search(name) is not None


def quantized(checkpoint: Checkpoint) -> tuple[Entry, str] | None:
    """A tensor of quantized numbers and the key of what scales them, if there is one."""
    for entry in checkpoint.entries.values():
        if entry.kind.startswith(_NARROW):
            module, _, name = entry.key.rpartition(".")
            beside = [entry.key + end for end in _BESIDE_TENSOR]
            beside += [f"{module}.{other}" for other in _BESIDE_WEIGHT if name in ("weight", "qweight")]
            for key in beside:
                if key in checkpoint.entries:
                    return entry, key
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a folder's safetensors; no tensor is touched.

    Raises:
        CheckpointError: if there are none, one is missing or damaged, or they are not what the index says.
    """
    named: dict[str, str] | None = None
    if (folder / ONE).is_file():
        names = [ONE]
    elif (folder / INDEX).is_file():
        named = _index(folder / INDEX)
        names = sorted({*named.values()})
    else:
        raise CheckpointError(f"{folder} holds neither {ONE} nor {INDEX}. Write it with save_pretrained.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {count(len(names), 'file')} that its index names: {and_more(missing)}."
        )
    files = tuple(open_stored(folder / name) for name in names)
    where: dict[str, StoredFile] = {}
    for file in files:
        for entry in file.entries:
            if entry.key in where:
                raise CheckpointError(f"{entry.key} is in {where[entry.key].path.name} and in {file.path.name}.")
            where[entry.key] = file
    if named is not None:
        apart = [key for key in {*named, *where} if key not in where or named.get(key) != where[key].path.name]
        if apart:
            where_they_are = f"where {count(len(apart), 'tensor is', 'tensors are')}: {and_more(sorted(apart))}"
            raise CheckpointError(f"{folder / INDEX} and the files disagree about {where_they_are}.")
    entries = {entry.key: entry for file in files for entry in file.entries}
    return Checkpoint(folder, files, entries, where)


def _index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text("utf-8"))["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in found.values()):
            raise ValueError("names of files must be plain")
        return dict(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of weights: {type(error).__name__}: {error}.") from error


def _walk(root: Path, below: Path, around: Sequence[Path]) -> Iterator[Path]:
    """Files of a folder and of those in it, without hidden ones; `around` are the folders above."""
    around = (*around, (root / below).resolve())
    for path in sorted((root / below).iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and path.resolve() not in around:
            yield from _walk(root, below / path.name, around)
        elif path.is_file():
            yield below / path.name
        else:
            what = "is a link to a folder around it" if path.is_dir() else "is no file, or a link that leads to none"
            raise CheckpointError(f"{path} {what}, and cannot come along. Remove it, or fetch what is missing.")
