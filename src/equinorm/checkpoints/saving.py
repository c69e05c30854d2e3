"""A model in memory becomes a folder like the one that it came from: the same files and keys, other numbers."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from equinorm._errors import dtype_name
from equinorm.checkpoints.conversion import stored_tensors
from equinorm.checkpoints.folder import Checkpoint
from equinorm.checkpoints.rewriting import copied
from equinorm.checkpoints.staging import Rewritten, fill, kept, prepare
from equinorm.checkpoints.stored import CheckpointError, Entry, StoredFile
from equinorm.reporting.files import write_atomically


def write_folder(model: nn.Module, checkpoint: Checkpoint, output: Path) -> Rewritten:
    """Write a folder that holds the weights of a model where another one holds those that it was loaded from.

    What the model does not read, and files that fit any weights, are copied.

    Args:
        model: of transformers.
        checkpoint: what it was loaded from.
        output: folder to write.

    Raises:
        EquinormError: if a weight would be rounded, or the output cannot be written; there is none then.
    """
    tensors = fitted(model, checkpoint)
    staging = prepare(checkpoint, output, {"weights": _digest(tensors)})
    with kept(staging):
        return fill(checkpoint, lambda stored, path: _write(stored, tensors, path), output, staging)


def fitted(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a model by the keys of its files, in their dtypes.

    Raises:
        CheckpointError: if a file would round a weight, or has more digits than the model was loaded with.
    """
    tensors = stored_tensors(model, checkpoint.entries)
    return {key: _cast(tensor.detach().cpu(), checkpoint.entries[key]) for key, tensor in tensors.items()}


def _cast(tensor: Tensor, entry: Entry) -> Tensor:
    """A tensor in the dtype of its file."""
    if tensor.dtype == entry.dtype:
        return tensor
    is_wider = entry.dtype is not None and torch.promote_types(tensor.dtype, entry.dtype) == tensor.dtype
    written = tensor.to(entry.dtype) if is_wider else None
    if written is None or not torch.equal(written.to(tensor.dtype), tensor):
        raise CheckpointError(
            f"{entry.key} is {entry.kind} in the files and {dtype_name(tensor.dtype)} in the model, as config.json has it: one "
            "rounds the other. Load the folder, and save it again with save_pretrained."
        )
    return written


def _write(stored: StoredFile, tensors: Mapping[str, Tensor], output: Path) -> int:
    """Write one file under a name that must be free; nothing underflows."""

    def write(target: Path) -> None:
        with open(stored.path, "rb", buffering=0) as source, open(target, "wb") as file:
            file.write(stored.head)
            for entry in stored.entries:
                if entry.key in tensors:
                    file.write(_bytes(tensors[entry.key]))
                else:
                    source.seek(entry.first)
                    copied(stored, entry, lambda size: None, source, file)

    write_atomically([(output, write)], force=False)
    return 0


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Tells weights apart, so that no run goes on with another's files."""
    found = hashlib.blake2b(digest_size=16)
    for key, tensor in tensors.items():
        found.update(key.encode())
        found.update(_bytes(tensor))
    return found.hexdigest()
