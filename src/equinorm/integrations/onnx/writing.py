"""From a module back to the same file with other weights."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equinorm.integrations.onnx.errors import OnnxError
from equinorm.integrations.onnx.files import Stored, stored, tensors
from equinorm.integrations.onnx.module import OnnxModule
from equinorm.integrations.onnx.numbers import FLOATS, store, to_array, to_tensor
from equinorm.integrations.onnx.runtime import apart, outputs
from equinorm.reporting.files import OutputError, check_target, write_atomically

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest deviation between what was read and what is written, in onnxruntime, by the coarsest dtype of the weights."""

ALIGNMENT = 4096
"""Bytes to whose multiples external tensors are moved, as memory mapping asks."""


def write(module: OnnxModule, path: str | os.PathLike[str], args: Sequence[Tensor], force: bool = False) -> float:
    """Write the file that a module was read from, with the module's weights: same nodes, names, metadata.

    What is written is first run in onnxruntime against the file that was read; only then does it take its name. External data
    are written beside it, as NAME.data.

    Args:
        module: as `read` gave it, its weights rescaled.
        path: the new file, ending in .onnx.
        args: inputs to verify it on.
        force: replace a file that exists.

    Returns:
        The largest relative output difference of the two files in onnxruntime; 0.0 means bitwise equal.

    Raises:
        OnnxError: if outputs deviate by more than rounding, or the file has changed since it was read.
        OutputError: if it cannot be written. Nothing is written then.
    """
    path = Path(path)
    check_target(path, (".onnx",), force)
    file = stored(module.path)
    found = tensors(file.model.graph)
    state, changed = module.state_dict(), {}
    for name, key in module.keys.items():
        proto = found.get(key)
        if proto is None or FLOATS.get(proto.data_type) != state[name].dtype or tuple(proto.dims) != tuple(state[name].shape):
            raise OnnxError(f"{module.path} holds no {key} of this shape and dtype any more: read it again. Nothing was written.")
        if not torch.equal(to_tensor(file.numbers(proto)), state[name]):
            changed[key] = state[name]
    limit = max((LIMITS[state[name].dtype] for name in module.keys), default=LIMITS[torch.float32])
    external = {key: proto for key, proto in found.items() if proto.data_location == proto.EXTERNAL}
    for key in changed.keys() - external.keys():
        store(found[key], changed[key])
    deviations: list[float] = []

    def checked(written: Path) -> None:
        deviations.append(_deviation(module, written, args, limit))

    if external:
        _write_external(file, external, changed, path, checked)
    else:
        write_atomically([(path, _then(lambda place: place.write_bytes(file.model.SerializeToString()), checked))], force)
    return deviations[-1]


def _then(write: Callable[[Path], Any], check: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(place: Path) -> None:
        write(place)
        check(place)

    return both


def _deviation(module: OnnxModule, written: Path, args: Sequence[Tensor], limit: float) -> float:
    """How far the outputs of the new file are from those of the old one."""
    found = apart(outputs(written, module.inputs, args), outputs(module.path, module.inputs, args))
    if not found <= limit:
        raise OnnxError(
            f"refused: in onnxruntime the outputs of the new file deviate by {found:.1e} from those of {module.path}, more than "
            f"{limit:g}. Nothing was written. Scales that are powers of two change no mantissa."
        )
    return found


def _write_external(
    file: Stored, external: dict[str, Any], changed: dict[str, Tensor], path: Path, check: Callable[[Path], None]
) -> None:
    """Write the model and its external data, which must be a new file: no crash then mixes old and new."""
    data = path.with_name(path.name + ".data")
    if path.exists() or data.exists():
        taken = path if path.exists() else data
        raise OutputError(f"{taken} exists, and with external data nothing is replaced. Write to another name.")
    places: dict[str, tuple[int, int]] = {}
    names = [data.name]

    def write_data(place: Path) -> None:
        with open(place, "wb") as stream:
            for key, proto in external.items():
                stream.write(bytes(-stream.tell() % ALIGNMENT))
                array = to_array(changed[key]) if key in changed else file.numbers(proto)
                raw, start = array.tobytes(), stream.tell()
                stream.write(raw)
                places[key] = start, len(raw)
        names.insert(0, place.name)

    def write_model(place: Path) -> None:
        for name in names:  # verified while it names the temporary file
            for key, proto in external.items():
                _locate(proto, name, *places[key])
            place.write_bytes(file.model.SerializeToString())
            if name != data.name:
                check(place)

    write_atomically([(data, write_data), (path, write_model)], force=False)


def _locate(proto: Any, name: str, start: int, length: int) -> None:
    """Say where the numbers of an external tensor are."""
    del proto.external_data[:]
    for key, value in (("location", name), ("offset", start), ("length", length)):
        entry = proto.external_data.add()
        entry.key, entry.value = key, str(value)
