"""What the numbers of a graph are: weights, statistics, or settings such as shapes, exponents and bounds.

Weights may be rescaled. Settings are known while the graph is read, and stay as they are.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from equinorm.integrations.onnx.files import ONNX_DOMAINS, bodies, captured, inside
from equinorm.integrations.onnx.numbers import FLOATS
from equinorm.integrations.onnx.operators import TABLE

SIZES = ("Shape", "Size")
"""Operators whose results follow from sizes alone."""


@dataclass(eq=False)
class Roles:
    """Keys of a graph's stored tensors, by what they are; all others are settings."""

    weights: set[str] = field(default_factory=set)
    statistics: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Scope:
    """Names of one graph: of stored tensors by key, and of static values by the node that makes them."""

    stored: dict[str, str] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    static: set[str] = field(default_factory=set)


class _Reader:
    def __init__(self, tensors: Mapping[str, Any], taken: Mapping[str, str]) -> None:
        self.tensors, self.taken = tensors, taken
        self.weights: set[str] = set()
        self.statistics: set[str] = set()
        self.single: set[str] = set()
        self.settings: set[str] = set()

    def graph(self, graph: Any, prefix: str, outer: _Scope | None, known: Set[str] = frozenset()) -> None:
        """Gather what every node asks of the stored tensors that it reads."""
        scope = _Scope() if outer is None else _Scope({**outer.stored}, {**outer.made}, {*outer.static})
        for proto in graph.initializer:
            scope.stored[proto.name] = prefix + proto.name
        for node in graph.node:
            if node.op_type == "Constant" and prefix + node.output[0] in self.tensors:
                scope.stored[node.output[0]] = prefix + node.output[0]
        scope.static |= scope.stored.keys() | known
        for node in graph.node:
            self._node(node, prefix, scope)
        for value in graph.output if outer is not None else ():
            self._use(value.name, scope, "")

    def _node(self, node: Any, prefix: str, scope: _Scope) -> None:
        inner = bodies(node)
        if not inner and (node.op_type in (*SIZES, "Constant") or all(n in scope.static for n in node.input if n)):
            scope.static |= set(node.output)
            scope.made |= dict.fromkeys(node.output, node)
        known = TABLE.get(node.op_type) if node.domain in ONNX_DOMAINS else None
        for place, name in enumerate(node.input):
            if name and known is not None and place in known.settings:
                self._demand(name, scope)
            elif name:
                self._use(name, scope, "" if known is None else known.role(place))
        for name, body in inner:
            if self.taken.get(prefix + node.output[0]) != name:  # a branch that is not taken here may be taken elsewhere
                for outside in captured(body):
                    self._demand(outside, scope)
            self.graph(body, inside(prefix, node, name), scope)

    def _use(self, name: str, scope: _Scope, role: str) -> None:
        key = scope.stored.get(name)
        if key is not None:
            (self.statistics if role == "statistics" else self.weights).add(key)
            if role:
                self.single.add(key)

    def _demand(self, name: str, scope: _Scope) -> None:
        """A number must be known: so must all that it is made from, up to sizes."""
        if name in scope.stored:
            self.settings.add(scope.stored[name])
        elif name in scope.made and scope.made[name].op_type not in SIZES:
            for source in filter(None, scope.made.pop(name).input):
                self._demand(source, scope)


def roles(graph: Any, tensors: Mapping[str, Any], settled: Set[str], known: Set[str], taken: Mapping[str, str]) -> Roles:
    """Tell weights and statistics from settings.

    A stored tensor of floats is a weight if it has several entries or stands where an operator has its weight, and if nothing
    needs its numbers for a shape, an exponent or a bound. One that only batch normalization reads as mean or variance is a
    statistic.

    Args:
        graph: the GraphProto.
        tensors: its stored tensors by key.
        settled: keys of those that stay as they are whatever they are.
        known: names of inputs whose numbers are known.
        taken: the branch that each If takes, by the key of its first output. What others read stays as it is.
    """
    reader = _Reader(tensors, taken)
    reader.graph(graph, "", None, known)
    found = Roles()
    for key in (reader.weights | reader.statistics) - reader.settings - settled:
        proto = tensors[key]
        if proto.data_type in FLOATS and (math.prod(proto.dims) > 1 or key in reader.single):
            (found.weights if key in reader.weights else found.statistics).add(key)
    return found
