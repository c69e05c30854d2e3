"""Writing a model's weights."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from equinorm._errors import describe
from equinorm.reporting.files import OutputError, check_target, make_folder, write_atomically

__all__ = ["OutputError", "check_target", "make_folder", "save", "write_atomically"]


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
    try:
        safetensors.torch.save_file(copies, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
