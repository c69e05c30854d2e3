"""From an interpreter that has run to the records of its values."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from equinorm._scaling import Reason
from equinorm.discovery.graph.nodes import bind, subgraph
from equinorm.discovery.inner_values import Held, InnerValue, InnerValues, SolvedClasses
from equinorm.discovery.interpreter import Interpreter
from equinorm.discovery.labels import Factor, Label
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import Chosen, Source, View


def recorded(interpreter: Interpreter, trace: Trace, solved: SolvedClasses) -> InnerValues:
    """Records of all values of a graph and of those that it runs, once every law is known."""
    return InnerValues([*_Recorder(interpreter, trace, solved).records()])


class _Recorder:
    """Records the values of one graph; those of subgraphs stand where these run.

    Args:
        interpreter: has run the graph.
        trace: what it gathered.
        solved: of all laws.
        prefix: of the names.
        given: names of what the graph is given, by its placeholders.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        trace: Trace,
        solved: SolvedClasses,
        prefix: str = "",
        given: dict[str, str] | None = None,
    ) -> None:
        self.interpreter, self.trace, self.solved, self.prefix, self.given = interpreter, trace, solved, prefix, given
        self.shifted = {source for shifts in trace.shifted.values() for source in shifts.values()}
        self.names: dict[fx.Node, str] = {}
        self.inside: dict[fx.Node, list[str | None]] = {}
        self.seen: dict[int, tuple[Label, Label]] = {}

    def records(self) -> Iterator[InnerValue]:
        """One record for each tensor, in the graph's order."""
        for node in self.interpreter.graph.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder" and self.given is not None:
                if node.name in self.given:
                    self.names[node] = self.given[node.name]
                continue
            yield from self._bodies(node)
            behind = node.args[0] if node.target is operator.getitem else node
            if isinstance(node.meta.get("val"), Tensor) and behind not in self.inside:
                self.names[node] = self.prefix + node.name
                yield self._record(node, behind)
            elif behind in self.inside and node is not behind and (name := self.inside[behind][node.args[1]]) is not None:
                self.names[node] = name

    def _bodies(self, node: fx.Node) -> Iterator[InnerValue]:
        """Records of the graphs that a node runs."""
        for name, inner in self.interpreter.bodies.get(node, {}).items():
            body, operands = subgraph(node)
            if body is None:  # cond
                operands = cast("Sequence[Any]", node.args[3])
            places = [part.name for part in inner.graph.graph.nodes if part.op == "placeholder"]
            given = {place: self.names[o] for place, o in zip(places, operands, strict=True) if o in self.names}
            recorder = _Recorder(inner, self.trace, self.solved, f"{self.prefix}{name}.", given)
            yield from recorder.records()
            if body is not None:
                results = next(part for part in inner.graph.graph.nodes if part.op == "output").args[0]
                self.inside[node] = [recorder.names.get(result) for result in results]

    def _record(self, node: fx.Node, behind: fx.Node) -> InnerValue:
        value, origin = self.interpreter.values[node], self.interpreter.origins[node]
        reason = self.interpreter.reasons.get(behind, Reason("constant"))
        source = value if node.op == "placeholder" and isinstance(value, Source) else None
        if source is not None:
            reason = Reason(source.kind)
        elif node.op == "placeholder" and origin.parameters is None:
            reason = Reason("input")
        result: Any = node.meta["val"]
        return InnerValue(
            *(self.names[node], reason.operation, reason.module, reason.source),
            *(tuple(size if isinstance(size, int) else -1 for size in result.shape), result.dtype, origin.depth),
            reads=dict(self._reads(behind)),
            tensor=source.names[0] if source else "",
            parameters=tuple(sorted(parameter.names[0] for parameter in origin.parameters or ())),
            is_returned=any(map(_is_end, node.users)),
            memory=self.names.get(self.interpreter.roots[node], self.names[node]),
            _held=self._held(value),
            _solved=self.solved,
        )

    def _reads(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        is_operator = hasattr(node.target, "_schema")
        named = (
            bind(node.target, node.args, node.kwargs) if is_operator else dict(enumerate([*node.args, *node.kwargs.values()]))
        )
        for key, argument in named.items():
            if isinstance(argument, fx.Node) and argument in self.names:
                yield str(key), self.names[argument]
            for place, part in enumerate(argument if isinstance(argument, (list, tuple)) else ()):
                if isinstance(part, fx.Node) and part in self.names:
                    yield f"{key}[{place}]", self.names[part]

    def _held(self, value: Any) -> Held:
        """What to keep of a value: not its numbers, and labels in memory of their own size."""
        if isinstance(value, Chosen):
            inside = self._held(value.value)
            return Held(inside.label, inside.offset, value.axis, inside.is_one)
        if not isinstance(value, (Label, Source, View)):
            return Held()
        label = value if isinstance(value, Label) else value.label
        if label is None or not label.factors:
            return Held()
        source = value.source if isinstance(value, View) else value
        offset = source.offset if isinstance(source, Source) and source not in self.shifted else 0.0
        if isinstance(value, View):
            return Held(self._kept(label), offset * value.factor, is_one=value.is_itself or not offset)
        return Held(self._kept(label), offset)

    def _kept(self, label: Label) -> Label:
        """The same label, trimmed; labels that several values share stay shared."""
        if id(label) not in self.seen:
            own = tuple(Factor(factor.exponent, _trimmed(factor.ids)) for factor in label.factors)
            self.seen[id(label)] = label, Label(label.shape, own)  # held, so that none is mistaken for another
        return self.seen[id(label)][1]


def _is_end(user: fx.Node) -> bool:
    """Does this end a graph, or read a value and make none?"""
    return user.op == "output" or (
        user.meta.get("val") is None and user.target is not torch.ops.aten._assert_tensor_metadata.default
    )


def _trimmed(ids: Tensor) -> Tensor:
    return ids.clone() if ids.untyped_storage().nbytes() > 2 * ids.numel() * ids.element_size() else ids
