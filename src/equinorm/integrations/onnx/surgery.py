"""A graph that changes: who reads what, and numbers that are put in and taken out."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from equinorm.integrations.onnx.errors import library
from equinorm.integrations.onnx.files import ONNX_DOMAINS, Stored, bodies, captured, tensors
from equinorm.integrations.onnx.numbers import FLOATS, store, to_array, to_tensor


def _inside(graph: Any) -> Iterator[str]:
    """Names of the values that a subgraph has, and those within it."""
    yield from (value.name for held in (graph.input, graph.initializer) for value in held)
    for node in graph.node:
        yield from node.output
        for _, body in bodies(node):
            yield from _inside(body)


class Surgery:
    """The main graph of a file, while nodes come and go.

    Args:
        file: is changed; `done` makes it follow.
    """

    def __init__(self, file: Stored) -> None:
        self.file, self.graph = file, file.model.graph
        self.protos = {name: proto for name, proto in tensors(self.graph).items() if name not in file.fed}
        self.order = list(self.graph.node)
        self.swaps: dict[int, list[Any]] = {}
        self.outputs = {value.name for value in self.graph.output}
        self.readers: dict[str, list[Any]] = {}
        self.makers: dict[str, Any] = {}
        self.names = {value.name for value in self.graph.input} | self.outputs | self.protos.keys() | file.fed
        for node in self.order:
            for name in filter(None, [*node.input, *set().union(*(captured(body) for _, body in bodies(node)))]):
                self.readers.setdefault(name, []).append(node)
            self.makers |= dict.fromkeys(filter(None, node.output), node)
        self.names |= self.makers.keys() | {name for node in self.order for _, body in bodies(node) for name in _inside(body)}

    def nodes(self, kind: str) -> Iterator[Any]:
        """Nodes of ONNX's own operator of this name, as they are now."""
        yield from [node for node in self.order if node.op_type == kind and node.domain in ONNX_DOMAINS]

    def numbers(self, name: str) -> Tensor | None:
        """Stored floats that no caller may replace; None for anything else."""
        proto = self.protos.get(name)
        return None if proto is None or proto.data_type not in FLOATS else to_tensor(self.file.numbers(proto))

    def is_alone(self, name: str) -> bool:
        """Does one node alone read it?"""
        return len(self.readers.get(name, ())) == 1 and name not in self.outputs

    def change(self, name: str, tensor: Tensor) -> None:
        """Give a stored tensor other numbers."""
        proto = self.protos[name]
        if proto.data_location == proto.EXTERNAL:
            proto.ClearField("external_data")
            proto.data_location, proto.raw_data = proto.DEFAULT, b""
            self.file.moved.add(name)
        store(proto, tensor.to(FLOATS[proto.data_type]))

    def add(self, stem: str, tensor: Tensor) -> str:
        """Store a tensor; returns its name."""
        name = self.free(stem)
        self.graph.initializer.append(library("onnx.numpy_helper").from_array(to_array(tensor), name))
        if self.file.model.ir_version < 4:  # all initializers were inputs then
            kind = self.graph.initializer[-1].data_type
            self.graph.input.append(library("onnx.helper").make_tensor_value_info(name, kind, list(tensor.shape)))
        self.protos[name] = self.graph.initializer[-1]
        return name

    def free(self, stem: str) -> str:
        """A name that nothing has."""
        name, number = stem, 0
        while name in self.names:
            number += 1
            name = f"{stem}_{number}"
        self.names.add(name)
        return name

    def swap(self, node: Any, by: list[Any]) -> None:
        """Put nodes in the place of one, once it is `done`."""
        self.swaps[id(node)] = by  # the list of all keeps it

    def done(self, unread: Iterable[str] = ()) -> None:
        """Change the graph, and take out stored tensors, of these, that nothing reads any more."""
        nodes = [part for node in self.order for part in self.swaps.get(id(node), [node])]
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        now = Surgery(self.file)
        idle = {name for name in unread if name in now.protos and name not in now.readers and name not in now.outputs}
        gone = idle | (self.makers.keys() - now.makers.keys())
        for held in (self.graph.initializer, self.graph.input, self.graph.value_info):
            for entry in [entry for entry in held if entry.name in gone]:
                held.remove(entry)
        for node in [node for node in now.nodes("Constant") if node.output[0] in idle]:
            self.graph.node.remove(node)
        self.file.refresh()
