"""From a module back to the same file with other weights."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equinorm._deviation import LIMITS
from equinorm.integrations.onnx.errors import OnnxError
from equinorm.integrations.onnx.files import Stored, stored, tensors, within
from equinorm.integrations.onnx.module import OnnxModule
from equinorm.integrations.onnx.numbers import FLOATS, store, to_array, weight
from equinorm.integrations.onnx.runtime import FLOOR, apart, computed, outputs
from equinorm.reporting.files import Files, OutputError, check_target, write_atomically

External = dict[str | int, Any]
"""TensorProtos whose numbers lie outside: by key, or numbered if they are of a function."""

LARGEST = 2**31 - 1
"""Bytes that protobuf can hold."""

ALIGNMENT = 4096
"""Bytes to whose multiples external tensors are moved, as memory mapping asks."""


def write(
    module: OnnxModule,
    path: str | os.PathLike[str],
    args: Sequence[Tensor],
    force: bool = False,
    *,
    corrected: bool = False,
) -> float:
    """Write the file that a module was read from, with the module's weights: same nodes, names, metadata.

    Where the graph was prepared, its normalizations are folded, and bounds that differ by channel are a Clip and a Min.

    What is written is first run in onnxruntime against the file that was read; only then does it take its name. External data
    are written beside it, as NAME.data.

    Args:
        module: as `read` gave it, its weights rescaled.
        path: the new file, ending in .onnx.
        args: inputs to verify it on.
        force: replace a file that exists.
        corrected: were biases corrected, so that the module computes something else on purpose? Then the new file is verified
            against the module instead of the file that was read.

    Returns:
        The largest relative output difference of the two files in onnxruntime; 0.0 means bitwise equal.

    Raises:
        OnnxError: if outputs deviate by more than rounding, or the file has changed since it was read.
        OutputError: if it cannot be written. Nothing is written then.
    """
    if not isinstance(module, OnnxModule):
        raise OnnxError(
            f"module must be what read(...).module gives, not {type(module).__name__}: its file gets other weights. "
            "A network of PyTorch becomes a file by torch.onnx.export."
        )
    path = Path(path)
    check_target(path, (".onnx",), force)
    written = Written(module, args, corrected=corrected)
    write_atomically(written.files(path), force)
    return written.deviation


@dataclass(eq=False)
class Written:
    """What is to be written, to be put among other files of one command.

    Attributes:
        module: as `read` gave it.
        args: inputs to verify it on.
        more: further ones.
        corrected: is the new file held against the module, which computes something else on purpose, not the old file?
        deviation: of the two files' outputs in onnxruntime, once it is written.
        limit: the largest that counts as exact for the coarsest dtype of the weights; or twice what PyTorch and onnxruntime
            differ by on the old file, if that is more: two sums of the same terms differ by so much.
        from_module: the new file's outputs in onnxruntime, from the module's, where that is what it is held against.
        bounds: how many Clips have bounds that differ by channel.
    """

    module: OnnxModule
    args: Sequence[Tensor]
    more: Sequence[Sequence[Tensor]] = ()
    corrected: bool = False
    deviation: float = math.inf
    limit: float = field(default=LIMITS[torch.float32], init=False)
    bounds: int = field(default=0, init=False)
    from_module: float = field(default=0.0, init=False)

    def files(self, path: Path) -> Files:
        """The files and their writers: the new one, in front of it its external data if it has any.

        Raises:
            OnnxError: if the file that was read has changed.
            OutputError: if external data would replace a file.
        """
        file, changed = self._changed()
        found = tensors(file.model.graph)
        lies_outside = {key for key, proto in found.items() if proto.data_location == proto.EXTERNAL} | file.moved
        for key in changed.keys() - (lies_outside - file.moved):
            store(found[key], changed[key])
        if self.module.preparing is not None:
            self.bounds = self.module.preparing.settle(file)
        external: External = {key: proto for key, proto in tensors(file.model.graph).items() if key in lies_outside}
        for number, proto in enumerate(
            proto for function in file.model.functions for node in function.node for proto in within(node)
        ):
            if proto.data_location == proto.EXTERNAL:
                external[number] = proto
        if external:
            return _external(file, external, changed, path, self._check)

        def write_model(place: Path) -> None:
            place.write_bytes(_serialized(file))
            self._check(place)

        return [(path, write_model)]

    def _changed(self) -> tuple[Stored, dict[str, Tensor]]:
        """The file as it is now, and the tensors of the module that differ from it, by key."""
        file = stored(self.module.path)
        if self.module.preparing is not None:
            self.module.preparing.apply(file)
        self.limit = max(self.limit, 2 * self.module.rounding)
        found, state, changed = tensors(file.model.graph), self.module.state_dict(), {}
        for name, key in self.module.keys.items():
            tensor, proto = state[name], found.get(key)
            self.limit = max(self.limit, LIMITS[tensor.dtype])
            if proto is None or FLOATS.get(proto.data_type) != tensor.dtype or tuple(proto.dims) != tuple(tensor.shape):
                raise OnnxError(
                    f"{self.module.path} holds no {key} of shape {tuple(tensor.shape)} and {tensor.dtype}. Read it again, and "
                    "leave shapes and dtypes as they are. Nothing was written."
                )
            if not torch.equal(weight(file.numbers(proto))[0], tensor):
                changed[key] = tensor
        return file, changed

    def _check(self, place: Path) -> None:
        """Run the new file against the old one; where biases were corrected, against the module too, which decides."""
        old, every = self.module.path, [self.args, *self.more]
        found = [outputs(place, self.module, args) for args in every]
        apart_from_old = (apart(new, outputs(old, self.module, args), FLOOR) for new, args in zip(found, every, strict=True))
        self.deviation = decisive = max(apart_from_old)
        if self.corrected:
            self.from_module = decisive = max(
                apart(new, computed(self.module, args), FLOOR) for new, args in zip(found, every, strict=True)
            )
        if not decisive <= self.limit:
            other = f"what was read from {old}, biases corrected" if self.corrected else f"those of {old}"
            raise OnnxError(
                f"refused: in onnxruntime the outputs of the new file deviate by {decisive:.1e} from {other}, "
                f"more than {self.limit:g}. Nothing was written. Scales that are powers of two change no mantissa."
            )


def _external(file: Stored, external: External, changed: dict[str, Tensor], path: Path, check: Callable[[Path], None]) -> Files:
    """The external data and the model, which must be new files: no crash then mixes old and new."""
    data = path.with_name(path.name + ".data")
    if taken := next(filter(os.path.lexists, (path, data)), None):  # a link that leads nowhere counts
        raise OutputError(f"{taken} exists, and with external data nothing is replaced. Write to another name.")
    places: dict[str | int, tuple[int, int]] = {}
    names = [data.name]

    def write_data(place: Path) -> None:
        with open(place, "wb") as stream:
            for key, proto in external.items():
                stream.write(bytes(-stream.tell() % ALIGNMENT))
                raw = to_array(changed[key]).reshape(-1).view(np.uint8) if key in changed else file.raw(proto)
                places[key] = stream.tell(), raw.size
                stream.write(raw.data)
        names.insert(0, place.name)

    def write_model(place: Path) -> None:
        for name in names:  # verified while it names the temporary file
            for key, proto in external.items():
                _locate(proto, name, *places[key])
            place.write_bytes(_serialized(file))
            if name != data.name:
                check(place)

    return [(data, write_data), (path, write_model)]


def _serialized(file: Stored) -> bytes:
    """The model's bytes.

    Raises:
        OnnxError: if they are more than an ONNX file holds.
    """
    if file.model.ByteSize() > LARGEST:
        raise OnnxError(
            f"what is to be written of {file.path} has more than {LARGEST:,} bytes, which no ONNX file holds. Nothing was "
            "written. Let its numbers lie outside first: onnx.save(onnx.load(path), new, save_as_external_data=True)."
        )
    return file.model.SerializeToString()


def _locate(proto: Any, name: str, start: int, length: int) -> None:
    """Say where the numbers of an external tensor are."""
    proto.ClearField("raw_data")
    proto.data_location = proto.EXTERNAL
    del proto.external_data[:]
    for key, value in (("location", name), ("offset", start), ("length", length)):
        entry = proto.external_data.add()
        entry.key, entry.value = key, str(value)
