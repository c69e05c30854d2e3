"""What `equinorm equalize` writes: weights, an exported copy, an ONNX file or a checkpoint's folder, and the report."""

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from equinorm.checkpoints.folder import Checkpoint
from equinorm.checkpoints.saving import write_folder
from equinorm.cli.calibration import Batch
from equinorm.cli.loading import Loaded
from equinorm.cli.onnx_files import about, is_onnx, to_write
from equinorm.cli.weights import InputError
from equinorm.cli.writing import left_out, save, source_of
from equinorm.quantization.equalization import Equalization
from equinorm.reporting.equalizations import draw
from equinorm.reporting.files import REPORTS, Files, check_target, write_atomically

VERIFIED = 8
"""Batches of calibration data on which outputs are verified."""


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """Where an equalized network goes.

    Attributes:
        output: a file, or a checkpoint's folder.
        like: the checkpoint that the folder is written like; None for a file.
        report: where a report goes, if anywhere.
        force: whether files that exist may be replaced.
    """

    output: Path
    like: Checkpoint | None
    report: Path | None
    force: bool

    def write(self, found: Equalization, loaded: Loaded, batches: Sequence[Batch], names: Collection[str]) -> list[str]:
        """Write everything; returns what the user must know of it.

        Args:
            found: the equalized network.
            loaded: the model with its inputs.
            batches: of calibration data.
            names: of the tensors that the model had.

        Raises:
            EquinormError: if something cannot be written; its file, or the folder, is not there then.
        """
        files: Files = []
        written, notes = None, []
        if self.output.suffix == ".onnx":
            more = [batch for batch in batches[:VERIFIED] if isinstance(batch, tuple) and len(batch) == len(loaded.args)]
            files, written = to_write(found.model, loaded.args, self.output, more, corrected=bool(found.corrections))
        elif self.like is None and self.output.suffix == ".pt2":
            files = [(self.output, _exported(found.model, loaded))]
        else:
            notes += self._of_own_weights(found.model, names)
            if self.like is None:
                files = [(self.output, lambda path: save(found.model, path))]
        if self.report is not None:
            files.append((self.report, draw(self.report, found)))
        if self.like is not None:
            notes += left_out(write_folder(found.model, self.like, self.output))
        write_atomically(files, self.force)
        return notes if written is None else [*notes, *about(written, self.output, files)]

    def _of_own_weights(self, model: nn.Module, names: Collection[str]) -> list[str]:
        """What to know where the weights go back into the model that they came from.

        Raises:
            InputError: if layers got biases that are not among the model's names of tensors.
        """
        if new := sorted(model.state_dict().keys() - names):
            instead = "-o FILE.pt2 holds a copy with it, or leave" if self.like is None else "leave"
            raise InputError(
                f"{new[0]} is a bias that the model does not have, and {self.output} would not fit it: {instead} "
                "--bias-correction out."
            )
        if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
            return []
        return ["batch normalization stays, so that these weights fit the model: -o FILE.pt2 folds it, which gains more"]


def destination(model: str, output: Path, report: Path | None, force: bool) -> Destination:
    """Where the equalized network of a model goes that was named so.

    Raises:
        OutputError: if something could not be written in the end.
        CheckpointError: if the folder's files are damaged.
    """
    like = source_of(model, output, force, (".onnx",) if is_onnx(model) else (".safetensors", ".pt2"))
    if report is not None:
        check_target(report, REPORTS, force)
    return Destination(output, like, report, force)


def _exported(model: nn.Module, loaded: Loaded) -> bytes:
    """The content of a .pt2 file.

    Raises:
        InputError: if the model cannot be exported.
    """
    content = io.BytesIO()
    try:
        program = torch.export.export(model, loaded.args, dict(loaded.kwargs), strict=False)
        torch.export.save(program, content)
    except Exception as error:
        raise InputError(
            f"cannot export the equalized copy: {error}. Write its weights instead, to a .safetensors file."
        ) from error
    return content.getvalue()
