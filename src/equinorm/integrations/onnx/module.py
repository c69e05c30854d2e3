"""A module that computes what an ONNX graph does: each node in PyTorch's operations, sizes and settings in numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equinorm._display import count
from equinorm.integrations.onnx.errors import OnnxError
from equinorm.integrations.onnx.files import ONNX_DOMAINS, Stored, bodies, inside, tensors
from equinorm.integrations.onnx.names import free, legal, place
from equinorm.integrations.onnx.nodes import Node, captured_by, static_value
from equinorm.integrations.onnx.numbers import FLOATS, to_tensor, weight
from equinorm.integrations.onnx.preparing import Preparing
from equinorm.integrations.onnx.roles import roles

Value = Tensor | np.ndarray | None
"""What flows along an edge: a tensor, or a number that is known from sizes and settings alone."""


class Body(nn.Module):
    """One graph: the main one, or a branch of an If.

    Args:
        graph: its GraphProto.
        stored: the file.
        held: where each weight and statistic of the file is held, by key.
        prefix: of the keys of this graph's tensors.
    """

    def __init__(self, graph: Any, stored: Stored, held: Mapping[str, tuple[nn.Module, str]], prefix: str = "") -> None:
        super().__init__()
        self.outputs = [value.name for value in graph.output]
        self.held: dict[str, tuple[nn.Module, str]] = {}
        self.known: dict[str, np.ndarray] = {}
        self.order: list[tuple[str, list[str], list[str]]] = []
        for proto in graph.initializer:
            self._store(proto.name, proto, stored, held, prefix)
        read = {*self.outputs}.union(*map(captured_by, graph.node))
        for number, node in enumerate(graph.node):
            if node.op_type == "Constant" and node.domain in ONNX_DOMAINS:
                proto = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
                if proto is None:
                    self.known[node.output[0]] = static_value(node, [], stored)[0]
                else:
                    self._store(node.output[0], proto, stored, held, prefix)
                continue
            name = free(self, legal(node.name or f"{node.op_type}_{number}"))
            if node.op_type == "If" and node.domain in ONNX_DOMAINS:
                parts = {key: Body(body, stored, held, inside(prefix, node, key)) for key, body in bodies(node)}
                self.add_module(name, Branch(prefix + node.output[0], node, stored, parts))
            else:
                self.add_module(name, Node(node, stored, read))
            self.order.append((name, captured_by(node), list(node.output)))

    def _store(self, name: str, proto: Any, stored: Stored, held: Mapping[str, tuple[nn.Module, str]], prefix: str) -> None:
        if prefix + name in held:
            self.held[name] = held[prefix + name]
        else:
            self.known[name] = stored.numbers(proto)

    def run(self, values: dict[str, Value], floating: torch.dtype) -> list[Value]:
        """What the graph returns.

        Args:
            values: what is known by name: the inputs, or all that is around a branch.
            floating: the dtype that float32 has by now.
        """
        values = {**values, **self.known, **{name: getattr(*where) for name, where in self.held.items()}}
        for name, inputs, outputs in self.order:
            node = getattr(self, name)
            if isinstance(node, Branch):
                found = node(values, floating)
            else:
                found = node([values[given] if given else None for given in inputs], floating)
            values.update(zip(outputs, found, strict=False))
        return [values[name] for name in self.outputs]


class Branch(nn.Module):
    """An If: the branch that is taken, where sizes and settings decide; else the whole of it, unread.

    Args:
        key: of its first output.
        node: its NodeProto.
        stored: the file.
        parts: both branches by name.
    """

    def __init__(self, key: str, node: Any, stored: Stored, parts: Mapping[str, Body]) -> None:
        super().__init__()
        self.key, self.taken = key, ""
        self.condition = node.input[0]
        self.then_branch, self.else_branch = parts["then_branch"], parts["else_branch"]
        self.whole = Node(node, stored)
        self.inputs = captured_by(node)

    def forward(self, values: dict[str, Value], floating: torch.dtype) -> list[Value]:
        """What the node returns."""
        condition = values[self.condition]
        if isinstance(condition, np.ndarray):
            taken = "then_branch" if bool(condition) else "else_branch"
            if self.taken not in ("", taken):
                raise OnnxError(
                    f"for inputs of these sizes {self.whole.opaque.name} takes another branch: read the file for them."
                )
            self.taken = taken
            return getattr(self, taken).run(values, floating)
        return self.whole([values[name] for name in self.inputs], floating)


class OnnxModule(nn.Module):
    """What an ONNX file computes, as a module like any other; its weights have the file's names.

    Args:
        stored: the file.
        fixed: inputs that always have these numbers: settings such as a sampling rate, by which an If chooses its branch.
        taken: the branches that were taken before, as `branches` tells them; what others read stays as it is.

    Attributes:
        path: the file.
        keys: place in the file of every parameter and buffer, by its name in the module.
        inputs: names of the inputs, in order.
        fed: initializers that are also inputs, which a caller may replace: they stay as they are.
        tiny: how many entries of weights are so small that they count as zero.
        preparing: what is done to the file's graph before; None: nothing.
        rounding: how far the module and onnxruntime were apart, when it was read.
    """

    def __init__(
        self,
        stored: Stored,
        fixed: Mapping[str, np.ndarray] | None = None,
        taken: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        graph, found = stored.graph, tensors(stored.graph)
        initializers = {proto.name for proto in graph.initializer}
        self.path = stored.path
        self.fixed = dict(fixed or {})
        self.inputs = [value.name for value in graph.input if value.name not in initializers | self.fixed.keys()]
        self.fed = sorted(stored.fed)
        self.preparing: Preparing | None = None
        kinds = roles(graph, found, (found.keys() - stored.own) | set(self.fed), self.fixed.keys(), taken or {})
        self.rounding = 0.0
        self.keys: dict[str, str] = {}
        self.tiny = 0
        self.nodes = nn.Module()  # names are taken before tensors get theirs
        self._single: list[str] = []
        held: dict[str, tuple[nn.Module, str]] = {}
        for key in (key for key in found if key in kinds.weights | kinds.statistics):
            tensor, tiny = weight(stored.numbers(found[key]))
            self.tiny += tiny
            holder, name = place(self, key)
            if key in kinds.weights:
                holder.register_parameter(name, nn.Parameter(tensor))
            else:
                holder.register_buffer(name, tensor)
            held[key] = holder, name
        places = {id(holder): name for name, holder in self.named_modules()}
        for key, (holder, name) in held.items():
            self.keys[".".join(filter(None, (places[id(holder)], name)))] = key
        self._single = [name for name, key in self.keys.items() if FLOATS[found[key].data_type] == torch.float32]
        self.nodes = Body(graph, stored, held)

    def floating(self) -> torch.dtype:
        """The dtype that the file's float32 has: another one after `double()`."""
        return self.get_parameter_or_buffer(self._single[0]).dtype if self._single else torch.float32

    def branches(self) -> dict[str, str]:
        """The branch that each If took, by the key of its first output."""
        return {part.key: part.taken for part in self.modules() if isinstance(part, Branch) and part.taken}

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        """A tensor of the module by its name."""
        holder, _, last = name.rpartition(".")
        return getattr(self.get_submodule(holder), last)

    def forward(self, *args: Tensor) -> Any:
        """The outputs of the graph: one tensor, or a tuple."""
        if len(args) != len(self.inputs):
            raise OnnxError(
                f"{self.path} takes {count(len(self.inputs), 'input')} ({', '.join(self.inputs)}), not {len(args)}."
            )
        floating = self.floating()
        assert isinstance(self.nodes, Body)
        found = self.nodes.run({**self.fixed, **dict(zip(self.inputs, args, strict=True))}, floating)
        results = [to_tensor(value, floating) if isinstance(value, np.ndarray) else value for value in found]
        return results[0] if len(results) == 1 else tuple(results)
