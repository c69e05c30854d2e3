"""What an ONNX file holds: its graph, and the numbers stored in it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equinorm._display import count
from equinorm._errors import first_line
from equinorm.integrations.onnx.errors import OnnxError, library
from equinorm.integrations.onnx.external import outside
from equinorm.integrations.onnx.numbers import FLOATS

QUANTIZED = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv"),
    *("QLinearMatMul", "QLinearAdd", "QGemm", "QAttention", "MatMulNBits", "DynamicQuantizeMatMul", "QLinearConcat"),
}
"""Operators of graphs that were quantized."""

ONNX_DOMAINS = ("", "ai.onnx")


@dataclass(eq=False)
class Stored:
    """A graph as it is stored.

    Attributes:
        path: the file.
        model: its ModelProto; external data stay where they are.
        graph: what to evaluate: the model's graph, its own functions put in their places.
        opsets: version of each domain's operators.
        own: keys of the tensors that the file itself holds, in contrast to what its functions bring.
        moved: keys of tensors whose numbers lie elsewhere in the file, and here beside their names: these are others.
    """

    path: Path
    model: Any
    graph: Any
    opsets: dict[str, int]
    own: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)

    @property
    def fed(self) -> set[str]:
        """Initializers that are inputs too, which a caller may replace."""
        listed = {value.name for value in self.model.graph.input} & {proto.name for proto in self.model.graph.initializer}
        return listed if self.model.ir_version >= 4 else set()

    def refresh(self) -> None:
        """Follow changes of the model's graph."""
        self.graph = self.model.graph
        if self.model.functions:
            self.graph = library("onnx.inliner").inline_local_functions(self.model).graph
            self._check_inlined()
        self.own = set(tensors(self.model.graph))

    def _check_inlined(self) -> None:
        """Refuse functions that stay where they are called, as those of other versions of operators do."""
        functions = {(function.domain, function.name): function for function in self.model.functions}
        for _, node in nodes(self.graph):
            if (function := functions.get((node.domain, node.op_type))) is not None:
                versions = ", ".join(f"{entry.domain or 'ONNX'} {entry.version}" for entry in function.opset_import)
                raise OnnxError(
                    f"{self.path} calls its function {node.domain}.{node.op_type}, which cannot be put in the place of the "
                    f"call: its operators are of other versions ({versions}) than the file's. Export it with one version "
                    "throughout."
                )

    def numbers(self, proto: Any) -> np.ndarray:
        """The numbers of a TensorProto.

        Raises:
            OnnxError: if they cannot be read.
        """
        try:
            if proto.data_location != proto.EXTERNAL:
                return library("onnx.numpy_helper").to_array(proto)
            raw = outside(self.path, proto)
            if proto.data_type in FLOATS:
                dtype = library("onnx.helper").tensor_dtype_to_np_dtype(proto.data_type)
                return raw.view(dtype.newbyteorder("<")).reshape(tuple(proto.dims))
            copy = type(proto)(name=proto.name, data_type=proto.data_type, dims=proto.dims, raw_data=raw.tobytes())
            return library("onnx.numpy_helper").to_array(copy)
        except OnnxError:
            raise
        except Exception as error:
            raise OnnxError(f"cannot read the tensor {proto.name!r} of {self.path}: {first_line(error)}.") from error

    def raw(self, proto: Any) -> np.ndarray:
        """The bytes of a TensorProto, as they lie outside of a file: two numbers of four bits share one.

        Raises:
            OnnxError: if they cannot be read.
        """
        if proto.data_location == proto.EXTERNAL:
            return outside(self.path, proto)
        return np.frombuffer(self.numbers(proto).tobytes(), np.uint8)


def stored(path: Path) -> Stored:
    """Read a file without its external data.

    Raises:
        OnnxError: if it is no ONNX file, holds operators of an unknown version, or was quantized.
    """
    model = _loaded(path)
    opsets = {"" if entry.domain in ONNX_DOMAINS else entry.domain: entry.version for entry in model.opset_import}
    _check_operators(model, opsets, path)
    file = Stored(path, model, model.graph, opsets)
    file.refresh()
    return file


def _loaded(path: Path) -> Any:
    """The ModelProto."""
    onnx = library("onnx")
    if not path.is_file():
        raise OnnxError(f"there is no file {path}." if not path.exists() else f"{path} is a folder, not a file.")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise OnnxError(
            f"cannot read {path} as an ONNX file: {first_line(error)}. It is damaged, or something else."
        ) from error
    if not model.graph.node or not model.opset_import:
        raise OnnxError(f"cannot read {path} as an ONNX file: it holds no graph of operators.")
    return model


def _check_operators(model: Any, opsets: Mapping[str, int], path: Path) -> None:
    """Refuse what is of an unknown version, quantized, or stored in a form that is not read."""
    onnx = library("onnx")
    newest = onnx.defs.onnx_opset_version()
    if opsets.get("", 1) > newest:
        raise OnnxError(
            f"{path} uses version {opsets['']} of ONNX's operators, and onnx {onnx.__version__} knows them up to {newest}. "
            "Install a newer onnx."
        )
    every = [node for graph in (model.graph, *model.functions) for _, node in nodes(graph)]
    quantized = [node.op_type for node in every if node.op_type in QUANTIZED]
    if quantized:
        raise OnnxError(
            f"{path} is quantized already ({count(len(quantized), 'node')} such as {quantized[0]}): rescaling integers loses "
            "bits. Name the file in floating point that it was made from."
        )
    graphs = [model.graph, *(body for node in every for _, body in bodies(node))]
    sparse = [proto.values.name for graph in graphs for proto in graph.sparse_initializer]
    sparse += [node.output[0] for node in every if any(attribute.HasField("sparse_tensor") for attribute in node.attribute)]
    if sparse:
        raise OnnxError(f"{path} holds sparse tensors ({sparse[0]}), which are not read. Store them as dense initializers.")


def nodes(graph: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every node, those of subgraphs too, with the prefix of the tensors of its graph."""
    for node in graph.node:
        yield prefix, node
        for name, body in bodies(node):
            yield from nodes(body, inside(prefix, node, name))


def bodies(node: Any) -> list[tuple[str, Any]]:
    """Subgraphs of a node, by the names of their attributes."""
    found = [(a.name, a.g) for a in node.attribute if a.HasField("g")]
    return found + [(f"{a.name}{place}", body) for a in node.attribute for place, body in enumerate(a.graphs)]


def inside(prefix: str, node: Any, attribute: str) -> str:
    """Prefix of what a subgraph holds."""
    return f"{prefix}{next(filter(None, node.output), node.name)}.{attribute}."


def tensors(graph: Any, prefix: str = "") -> dict[str, Any]:
    """Every TensorProto that a graph holds as an initializer or a Constant, by the name of its value."""
    found = {prefix + proto.name: proto for proto in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ONNX_DOMAINS:
            protos = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            found |= zip([prefix + node.output[0]], protos, strict=False)
        for name, body in bodies(node):
            more = tensors(body, inside(prefix, node, name))
            if both := sorted(found.keys() & more.keys()):
                raise OnnxError(
                    f"two tensors are called {both[0]!r} here: one of the graph, one of a subgraph. Rename one of them."
                )
            found |= more
    return found


def within(node: Any) -> Iterator[Any]:
    """Every TensorProto in a node's attributes and subgraphs."""
    for attribute in node.attribute:
        yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
    for _, body in bodies(node):
        yield from body.initializer
        for part in body.node:
            yield from within(part)


def captured(graph: Any) -> set[str]:
    """Names from outside that a subgraph reads."""
    known = {value.name for value in graph.input} | {proto.name for proto in graph.initializer}
    read = {value.name for value in graph.output}
    for node in graph.node:
        read |= {name for name in node.input if name}
        for _, body in bodies(node):
            read |= captured(body)
        known |= set(node.output)
    return read - known
