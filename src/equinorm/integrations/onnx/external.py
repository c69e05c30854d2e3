"""Numbers that lie outside of an ONNX file: read as onnxruntime does, links included."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from equinorm.integrations.onnx.errors import OnnxError


def outside(path: Path, proto: Any) -> np.ndarray:
    """The bytes of an external tensor.

    Its file lies where the model's path says, or where the model's file really is: a cache of Hugging Face keeps links to both.

    Args:
        path: the model.
        proto: a TensorProto whose numbers are external.

    Raises:
        OnnxError: if that file is missing, cut off, or in another folder.
    """
    named = {entry.key: entry.value for entry in proto.external_data}
    about = f"cannot read the tensor {proto.name!r} of {path}"
    if not named.get("location"):
        raise OnnxError(f"{about}: its numbers are external, and no file is named. The model is damaged.")
    place = path.parent / named["location"]
    allowed = {path.parent.resolve(), path.resolve().parent}
    if os.path.isabs(named["location"]) or not allowed & {*place.resolve().parents}:
        raise OnnxError(
            f"{about}: its numbers lie in {named['location']}, outside of the model's folder, where onnxruntime reads none. "
            "Save the model again with onnx.save."
        )
    if not place.is_file():
        instead = ", or name the file that this link leads to" if path.is_symlink() else ""
        raise OnnxError(f"{about}: its numbers should lie in {place}, and there is no such file. Put it there{instead}.")
    start, size = int(named.get("offset", 0)), place.stat().st_size
    length = int(named.get("length", max(size - start, 0)))
    if min(start, length) < 0 or start + length > size:
        raise OnnxError(
            f"{about}: its {length:,} bytes from {start:,} on are not in {place}, which has {size:,}. That file is cut off, or "
            "of another model."
        )
    return np.fromfile(place, np.uint8, length, offset=start)
