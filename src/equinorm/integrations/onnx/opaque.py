"""Nodes that are not read: each runs as a whole in onnxruntime, and pins what it reads."""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equinorm._errors import first_line
from equinorm.integrations.onnx.errors import OnnxError, library
from equinorm.integrations.onnx.files import Stored, within
from equinorm.integrations.onnx.numbers import to_array, to_tensor

_NUMBERS = itertools.count()
_KNOWN: "weakref.WeakValueDictionary[int, Opaque]" = weakref.WeakValueDictionary()


class Opaque:
    """A node with everything that it reads from outside as an input.

    Args:
        node: its NodeProto.
        inputs: names of what it and its subgraphs read.
        stored: the file.
    """

    def __init__(self, node: Any, inputs: Sequence[str], stored: Stored) -> None:
        self.node, self.inputs, self.stored = node, list(inputs), stored
        self.number = next(_NUMBERS)
        self._shapes: dict[tuple, list[tuple[tuple[int, ...], torch.dtype]]] = {}
        _KNOWN[self.number] = self

    def __deepcopy__(self, memo: Any) -> "Opaque":
        return self  # nothing in it changes but what it remembers

    def __call__(self, values: Sequence[Tensor], floating: torch.dtype) -> list[Tensor]:
        """The outputs of the node, where float32 is `floating` by now."""
        return torch.ops.equinorm.onnx_node(list(values), self.number, floating)

    def run(self, values: Sequence[Tensor], floating: torch.dtype) -> list[Tensor]:
        """Its outputs, in onnxruntime; in onnx's own evaluator where float32 became float64, which the former often lacks."""
        arrays = [to_array(value) for value in values]
        try:
            found = self._results(arrays, floating)
        except OnnxError:
            raise
        except Exception as error:
            raise OnnxError(f"the node {self.name} cannot be run: {first_line(error)}.") from error
        if any(not isinstance(array, np.ndarray) and not np.isscalar(array) for array in found):
            raise OnnxError(
                f"the node {self.name} returns a sequence or an optional value, which is no tensor: it is not read."
            )
        results = [to_tensor(np.asarray(array), floating) for array in found]
        self._shapes[_key(values)] = [(tuple(r.shape), torch.float32 if r.dtype == floating else r.dtype) for r in results]
        return results

    def shaped(self, values: Sequence[Tensor], floating: torch.dtype) -> list[Tensor]:
        """Empty outputs of the shapes that it gave when it last ran on inputs of these."""
        known = self._shapes.get(_key(values))
        if known is None:
            raise OnnxError(f"run the module once on inputs of these sizes: those of {self.name} follow from numbers.")
        return [values[0].new_empty(shape, dtype=floating if dtype == torch.float32 else dtype) for shape, dtype in known]

    @property
    def has_run(self) -> bool:
        """Did the node run as a whole?"""
        return bool(self._shapes)

    @property
    def name(self) -> str:
        """Of the node, with its operator."""
        operator = f"{self.node.domain}::{self.node.op_type}" if self.node.domain else self.node.op_type
        return f"{self.node.name or self.node.output[0]!r} ({operator})"

    def _results(self, arrays: Sequence[np.ndarray], floating: torch.dtype) -> list[Any]:
        model, feed = self._model(arrays), dict(zip(self.inputs, arrays, strict=True))
        if floating == torch.float64:
            return library("onnx.reference").ReferenceEvaluator(model).run(None, feed)
        runtime = library("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)

    def _model(self, arrays: Sequence[np.ndarray]) -> Any:
        helper = library("onnx.helper")
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
            for name, array in zip(self.inputs, arrays, strict=True)
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in self.node.output if name]
        graph = helper.make_graph([self.node], "node", inputs, outputs)  # a copy
        for proto in [proto for proto in within(graph.node[0]) if proto.data_location == proto.EXTERNAL]:
            numbers = self.stored.raw(proto).tobytes()
            proto.ClearField("external_data")
            proto.data_location, proto.raw_data = proto.DEFAULT, numbers
        imports = [helper.make_opsetid(domain, version) for domain, version in self.stored.opsets.items()]
        return helper.make_model(graph, opset_imports=imports, ir_version=self.stored.model.ir_version)


def _key(values: Sequence[Tensor]) -> tuple:
    return tuple(tuple(value.shape) for value in values)


@torch.library.custom_op("equinorm::onnx_node", mutates_args=())
def _onnx_node(values: list[Tensor], number: int, floating: torch.dtype) -> list[Tensor]:
    return _KNOWN[number].run(values, floating)


@_onnx_node.register_fake
def _shapes(values: list[Tensor], number: int, floating: torch.dtype) -> list[Tensor]:
    return _KNOWN[number].shaped(values, floating)


def _noted(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.name = _KNOWN[inputs[1]].name


def _refused(ctx: Any, *_: Any) -> Any:
    raise OnnxError(
        f"no gradient passes the node {ctx.name}, which is not read but runs as a whole in onnxruntime: what rounding costs "
        "cannot be told. Balance the file instead: `equinorm balance FILE --p inf` evens out its channels."
    )


_onnx_node.register_autograd(_refused, setup_context=_noted)
