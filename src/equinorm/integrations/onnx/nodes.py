"""One node: by the table of operators; computed in numbers where these are known; or as a whole, unread."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equinorm._errors import first_line
from equinorm.integrations.onnx.errors import OnnxError, library
from equinorm.integrations.onnx.files import ONNX_DOMAINS, Stored, bodies, captured
from equinorm.integrations.onnx.numbers import to_tensor
from equinorm.integrations.onnx.opaque import Opaque
from equinorm.integrations.onnx.operators import TABLE, NodeCall, Operator, UnreadError
from equinorm.integrations.onnx.operators.registry import NEWEST

RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")

_BROADCAST = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Equal", "Less", "Greater", "PRelu")

OLDEST = {**dict.fromkeys(_BROADCAST, 7), "Cast": 6}
"""Versions from which definitions are those of the table: before them operands were broadcast, and dtypes named, otherwise."""

_SMALL = 1 << 12
"""Bytes of inputs up to which results are remembered."""


def captured_by(node: Any) -> list[str]:
    """Inputs of a node, then what its subgraphs read beside them."""
    return [*node.input, *sorted(set().union(*(captured(body) for _, body in bodies(node))) - set(node.input))]


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes as Python values."""
    helper = library("onnx.helper")
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, str) or not isinstance(value, Sequence) else [_plain(part) for part in value]


def static_value(node: Any, values: Sequence[np.ndarray | None], stored: Stored) -> list[np.ndarray]:
    """What a node makes of numbers, by onnx's own evaluator."""
    return _evaluated(_evaluator(node, stored), node, values)


def _evaluator(node: Any, stored: Stored) -> Any:
    helper = library("onnx.helper")
    inputs = [helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(filter(None, node.input))]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    imports = [helper.make_opsetid(domain, version) for domain, version in stored.opsets.items()]
    model = helper.make_model(helper.make_graph([node], "node", inputs, outputs), opset_imports=imports)
    return library("onnx.reference").ReferenceEvaluator(model)


def _evaluated(evaluator: Any, node: Any, values: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    feed = {name: value for name, value in zip(node.input, values, strict=True) if name}
    try:
        found = iter(evaluator.run(None, feed))
    except Exception as error:
        raise OnnxError(f"the node {node.name or node.output[0]!r} ({node.op_type}) fails: {first_line(error)}.") from error
    return [np.asarray(next(found)) if name else np.empty(0) for name in node.output]


class Node(nn.Module):
    """One node of a graph.

    Args:
        node: its NodeProto.
        stored: the file that it is of.
        read: names of what is read in its graph; None: of everything.
    """

    def __init__(self, node: Any, stored: Stored, read: Collection[str] | None = None) -> None:
        super().__init__()
        self.proto, self.stored = node, stored
        needed = [place for place, name in enumerate(node.output, 1) if name and (read is None or name in read)]
        outputs = len(node.output), max(needed, default=1)
        self.call = NodeCall(node.op_type, stored.opsets.get("", 1), attributes(node), *outputs)
        self.operator, self.unread = _found(self.call, node)
        self.opaque = Opaque(node, [*dict.fromkeys(filter(None, captured_by(node)))], stored)
        self._memory: dict[Any, list[np.ndarray]] = {}
        self._reference: Any = None

    def __deepcopy__(self, memo: Any) -> "Node":
        return self  # it holds no weights

    def forward(self, values: Sequence[Tensor | np.ndarray | None], floating: torch.dtype) -> list[Any]:
        """Its outputs, for inputs in order; those that its subgraphs read come last."""
        given = [value for value in values if value is not None]
        if self.proto.op_type in ("Shape", "Size") and isinstance(values[0], Tensor):
            return self._sizes(values[0])
        numbers = bool(given) and all(isinstance(value, np.ndarray) for value in given)
        is_known = self.proto.domain in ONNX_DOMAINS and self.proto.op_type not in RANDOM and not bodies(self.proto)
        if numbers and is_known:
            return self._known(values)
        if self.operator is not None:
            try:
                return self._read(self.operator, values, floating)
            except UnreadError as error:
                self.unread = str(error)
            except (RuntimeError, IndexError, TypeError) as error:  # a dtype, or an empty axis, that PyTorch's operation lacks
                self.unread = f"PyTorch: {first_line(error)}"
        if not given:
            raise OnnxError(f"the node {self.opaque.name} reads nothing and is not read: it may draw random numbers.")
        named = dict(zip(captured_by(self.proto), values, strict=True))
        return _named(self.opaque([_tensor(named[name], floating) for name in self.opaque.inputs], floating), self.proto)

    def _sizes(self, value: Tensor) -> list[np.ndarray]:
        if self.proto.op_type == "Size":
            return [np.asarray(value.numel(), dtype=np.int64)]
        start, end = self.call.get("start", 0), self.call.get("end")
        return [np.asarray(tuple(value.shape)[start:end], dtype=np.int64)]

    def _known(self, values: Sequence[Any]) -> list[np.ndarray]:
        """Computed in numbers; remembered where they are few."""
        small = sum(value.nbytes for value in values if value is not None) <= _SMALL
        key = tuple(None if v is None else (v.dtype.str, v.shape, v.tobytes()) for v in values) if small else None
        if key not in self._memory or key is None:
            self._reference = self._reference or _evaluator(self.proto, self.stored)
            self._memory[key] = _evaluated(self._reference, self.proto, values)
        return self._memory[key]

    def _read(self, operator: Operator, values: Sequence[Any], floating: torch.dtype) -> list[Any]:
        """Its outputs, by the table of operators."""
        given: list[Any] = []
        for place, value in enumerate(values):
            if place in operator.settings and isinstance(value, Tensor):
                raise UnreadError(f"input {place} depends on data")
            given.append(value if value is None or place in operator.settings else _tensor(value, floating))
        while given and given[-1] is None:
            given.pop()
        call = self.call if floating == torch.float32 else replace(self.call, floating=floating)
        found = operator.function(call, *given)
        return list(found) if isinstance(found, (list, tuple)) else [found]


def _found(call: NodeCall, node: Any) -> tuple[Operator | None, str]:
    """The operator of a node in the table, or why it is not read."""
    if node.domain not in ONNX_DOMAINS:
        return None, f"of the domain {node.domain}"
    operator = TABLE.get(node.op_type)
    if operator is None or bodies(node):
        return None, "not in the table"
    defs = library("onnx.defs")
    try:
        since = defs.get_schema(node.op_type, call.opset, "").since_version
    except Exception:
        return None, f"unknown in version {call.opset}"
    if not OLDEST.get(node.op_type, 1) <= since <= NEWEST:
        return None, f"its definition is of version {since}"
    if strange := sorted(set(call.attributes) - operator.attributes):
        return None, f"attribute {strange[0]}"
    return operator, ""


def _named(found: Sequence[Any], node: Any) -> list[Any]:
    """Results at the places of the outputs that have names."""
    results = iter(found)
    return [next(results) if name else None for name in node.output]


def _tensor(value: Any, floating: torch.dtype) -> Tensor:
    return to_tensor(value, floating) if isinstance(value, np.ndarray) else value
