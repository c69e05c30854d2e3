"""What is refused, and packages that may be missing."""

from typing import Any

from equinorm._display import needed
from equinorm._errors import EquinormError


class OnnxError(EquinormError):
    """An ONNX file cannot be read or written as asked; nothing was written."""


def library(name: str) -> Any:
    """Import onnx or onnxruntime.

    Raises:
        OnnxError: saying what to install.
    """
    return needed(name, "ONNX files need", "onnx", OnnxError)
