"""Writing a model's weights: to one file, or to a folder like the one that they came from."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from equinorm._display import and_more, count
from equinorm._errors import describe
from equinorm.checkpoints.folder import Checkpoint, open_checkpoint
from equinorm.checkpoints.saving import fitted, write_folder
from equinorm.checkpoints.staging import Rewritten, check_output
from equinorm.checkpoints.stored import save_tensors
from equinorm.cli.loading import is_folder
from equinorm.reporting.files import OutputError, check_target, write_atomically

_FILES = (".safetensors",)


def source_of(model: str, output: Path, force: bool, suffixes: Sequence[str] = _FILES) -> Checkpoint | None:
    """The checkpoint that a folder is written like; None where one file is written. Weights are not read.

    A FOLDER goes to a folder; hf:FOLDER to a folder, or to one file if the output's name says so; other models to one file.

    Args:
        model: as it was named.
        output: where its weights go.
        force: whether a file that exists may be replaced.
        suffixes: of files that the command writes.

    Raises:
        OutputError: if the output could not be written in the end.
        CheckpointError: if the folder's files are damaged.
    """
    whole = model.removeprefix("hf:")
    if not is_folder(whole) or (output.suffix in suffixes and whole != model):
        check_output_of(model, output, suffixes, force)
        return None
    check_is_folder(model, output, suffixes)
    checkpoint = open_checkpoint(Path(whole).expanduser())
    check_output(checkpoint, output)
    return checkpoint


def check_output_of(model: str, output: Path, suffixes: Sequence[str], force: bool) -> None:
    """Refuse early what a model cannot be written to, and say how to get the kind of output that was named.

    Raises:
        OutputError: see `check_target`.
    """
    advice = ""
    if output.suffix == ".onnx":
        advice = " To get an ONNX file, export the network with torch.onnx.export, and give that file as the model."
    elif model.startswith("hf:") and not output.suffix:
        advice = f" To get a folder, write {model.removeprefix('hf:')} without hf:."
    check_target(output, suffixes, force, advice)


def check_is_folder(model: str, output: Path, suffixes: Sequence[str] = _FILES) -> None:
    """Refuse a file as what a checkpoint's folder goes to.

    Raises:
        OutputError: which says how to write one.
    """
    if output.suffix in suffixes:
        raise OutputError(
            f"{output} is a file, and {model} a checkpoint's folder, which goes to a folder: name one with --output, without "
            f"{output.suffix}. hf:{model} is loaded as a whole, and goes to one file."
        )


def check_fits(model: nn.Module, checkpoint: Checkpoint | None) -> None:
    """Refuse early a model whose weights the files of its checkpoint cannot hold.

    Raises:
        CheckpointError: if a file would round a weight.
    """
    if checkpoint is not None:
        fitted(model, checkpoint)


def save_like(checkpoint: Checkpoint | None, model: nn.Module, output: Path, force: bool) -> list[str]:
    """Write a model's weights as `source_of` has it; returns what the user must know of that.

    Raises:
        EquinormError: if they cannot be written; nothing is there then.
    """
    if checkpoint is not None:
        return left_out(write_folder(model, checkpoint, output))
    write_atomically([(output, lambda path: save(model, path))], force)
    return []


def left_out(done: Rewritten) -> list[str]:
    """Which files of a folder did not come along, in a note."""
    if not done.left:
        return []
    return [f"{count(len(done.left), 'file')} may hold weights as they were, and did not come along: {and_more(done.left, 4)}"]


def save(model: nn.Module, path: Path) -> None:
    """Write a model's whole state dict as safetensors; tied tensors under each of their names.

    Raises:
        OutputError: if the state dict holds something that is no dense tensor.
        OSError: if the file cannot be written.
    """
    state = model.state_dict()
    odd = [key for key, value in state.items() if not isinstance(value, Tensor) or value.layout != torch.strided]
    if odd:
        raise OutputError(
            f"cannot write the state of {describe(model)} as safetensors: {', '.join(odd[:8])} is no dense tensor. "
            "Nothing was written."
        )
    copies = {key: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    save_tensors(copies, path, {"format": "pt"})
