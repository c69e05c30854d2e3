"""What is refused, and packages that may be missing."""

import importlib
from typing import Any

from equinorm._errors import EquinormError


class OnnxError(EquinormError):
    """An ONNX file cannot be read or written as asked; nothing was written."""


def library(name: str) -> Any:
    """Import onnx or onnxruntime.

    Raises:
        OnnxError: saying what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise OnnxError(f"ONNX files need {missing}, which is not installed. Run pip install 'equinorm[onnx]'.") from error
