"""Abstract interpretation of an exported graph: run every operation on labels instead of numbers."""

import hashlib
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from equinorm._errors import dtype_name
from equinorm._scaling import Reason
from equinorm.discovery.graph.aliasing import GraphAliases, written
from equinorm.discovery.graph.nodes import bind, is_static, module_of, results_of, subgraph
from equinorm.discovery.operation import Operation, flat, is_pinned, pinned
from equinorm.discovery.rules import key
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, Constant, Origin, Source, Value, loses

_TORCH = os.path.dirname(torch.__file__)
_READERS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "integrations", "")
"""Where modules come from that nobody wrote a line of: their names say what they are."""

_JOINS = """add sub rsub subtract cat concat concatenate stack where maximum minimum lerp masked_fill copy
select_scatter slice_scatter"""
"""Operations through which a parameter meets an activation as an addend, not as a factor."""

_CONVERSIONS = "to _to_copy type_as copy"
"""Operations by which a network itself asks for another dtype."""


class Interpreter:
    """Propagates labels through one graph; subgraphs get interpreters of their own.

    Args:
        aliases: the graph, and what its values share.
        trace: gathers the laws.
        unsteady: roots of memory that is read after it was changed in place; nothing in it may scale.
    """

    def __init__(self, aliases: GraphAliases, trace: Trace, unsteady: frozenset[fx.Node]) -> None:
        self.graph, self.roots, self.trace, self.unsteady = aliases.graph, aliases.roots, trace, unsteady
        self.values: dict[fx.Node, Any] = {}
        self.origins: dict[fx.Node, Origin] = {}
        self.reasons: dict[fx.Node, Reason] = {}
        self.bodies: dict[fx.Node, dict[str, Interpreter]] = {}

    def propagate(self, inputs: Mapping[str, tuple[Value, Origin]]) -> tuple[list[Any], Origin]:
        """Run every operation on labels; return what the graph returns.

        Args:
            inputs: the value of every placeholder by its name, and where it comes from.
        """
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node], self.origins[node] = inputs[node.name]
            elif node.op == "get_attr":
                attribute = operator.attrgetter(node.target)(self.graph)
                self.values[node] = Constant(attribute.detach().clone()) if isinstance(attribute, Tensor) else attribute
                self.origins[node] = Origin(parameters=frozenset())
            elif node.op == "call_function":
                self.reasons[node] = self.trace.reason = reason_of(node)
                self._call(node)
            if self.roots[node] in self.unsteady:
                self.trace.reason = self.reasons.get(node) or reason_of(node)
                for value in flat(self.values[node]):
                    self.trace.pin(value, "shares memory that is changed in place")
                self.values[node] = pinned(self.trace.sizes.known(node.meta.get("val")))
            if node.op == "output":
                return list(self._arguments(node.args[0])), self._joined(node)
        raise ValueError("graph without output")

    def constant(self, node: fx.Node) -> Tensor | None:
        """The numbers of a value, here or in a subgraph, that no input and no weight can change."""
        value = self.values.get(node)
        inner = (part.constant(node) for parts in self.bodies.values() for part in parts.values()) if value is None else ()
        return value.value if isinstance(value, Constant) else next((found for found in inner if found is not None), None)

    def _arguments(self, arguments: Any) -> Any:
        return map_arg(arguments, self.values.__getitem__)

    def _joined(self, node: fx.Node, also: int = 0) -> Origin:
        """Origin of a result of these inputs."""
        origins = [self.origins[argument] for argument in node.all_input_nodes]
        if all(origin.parameters is not None for origin in origins):
            return Origin(parameters=frozenset().union(*(origin.parameters or () for origin in origins)))
        return Origin(also + max(origin.depth for origin in origins if origin.parameters is None))

    def _call(self, node: fx.Node) -> None:
        args, kwargs = self._arguments((node.args, node.kwargs))
        name = getattr(node.target, "__name__", "")
        body, given = subgraph(node)
        if body is not None:
            self.values[node], self.origins[node] = self._inside(node, body, given)
        elif name == "cond" and is_static(node.meta.get("val")) and not written(node):
            (ones, first), (others, second) = (self._inside(node, body, node.args[3]) for body in args[1:3])
            self.trace.reason = reason_of(node)
            self.values[node] = [self.trace.add(one, other) for one, other in zip(ones, others, strict=True)]
            self.origins[node] = max(first, second, key=lambda origin: (origin.parameters is None, origin.depth))
        else:
            self.values[node] = Operation(node, args, kwargs, self.trace).value()
            self._note_casts(node)
            self.origins[node] = self._meet(node)
            for target in written(node):
                if self.roots[target].op == "placeholder":  # the next call reads what is written into a buffer or an input
                    for value in flat([self.values[node], self.values[self.roots[target]]]):
                        self.trace.pin(value, "writes into a tensor of the model or an input")

    def _note_casts(self, node: fx.Node) -> None:
        """Remember the values that lose bits here: by a conversion, or in an operation that autocast runs in fewer bits."""
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.overloadpacket.__name__.endswith("_like"):
            return
        results = [part.dtype for part in _floats(node.meta.get("val"))]
        asked = bind(node.target, node.args, node.kwargs).get("dtype") is not None or node.target._schema.is_mutable
        by_autocast = not asked and key(node.target) not in _CONVERSIONS.split()
        for argument in node.all_input_nodes if results else ():
            value = self.values[argument]
            for given in _floats(argument.meta.get("val")) if isinstance(value, VALUES) else ():
                lossy = next((dtype for dtype in results if loses(given.dtype, dtype)), None)
                if lossy is not None and not is_pinned(value, self.trace):
                    detail = f"rounds to {dtype_name(lossy)}"
                    self.trace.casts.append((value, lossy, replace(self.trace.reason, detail=detail), by_autocast))

    def _inside(self, node: fx.Node, body: fx.GraphModule, given: Any) -> tuple[list[Any], Origin]:
        """What a subgraph of this node returns, run on the values of these nodes."""
        names = [inner.name for inner in body.graph.nodes if inner.op == "placeholder"]
        inputs = {name: (self.values[node], self.origins[node]) for name, node in zip(names, given, strict=True)}
        aliases = GraphAliases(body)
        inner = Interpreter(aliases, self.trace, aliases.visibly_written())
        calls = (called for called in node.all_input_nodes if called.op == "get_attr")
        name = next(str(called.target) for called in calls if getattr(self.graph, str(called.target), None) is body)
        self.bodies.setdefault(node, {})[name] = inner
        return inner.propagate(inputs)

    def _meet(self, node: fx.Node) -> Origin:
        """Give parameters that meet an activation here for the first time their role and depth."""
        joined = self._joined(node)
        if joined.parameters is not None:
            return joined
        addends = _addends(node)
        met = {argument: self.origins[argument].parameters for argument in node.all_input_nodes}
        factors = any(parameters for argument, parameters in met.items() if argument not in addends)
        for argument, parameters in met.items():
            for source in parameters or ():
                if source.role is None and source.kind == "parameter":
                    source.role = "bias" if argument in addends else "weight"
                    source.depth = joined.depth + factors
        return Origin(joined.depth + factors)


def _addends(node: fx.Node) -> set[fx.Node]:
    """Arguments that are added, not multiplied."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return set()
    name = node.target.overloadpacket.__name__.removesuffix("_")
    if name in _JOINS.split():
        return set(node.all_input_nodes)
    named = bind(node.target, node.args, node.kwargs)
    found = [named.get("bias"), named.get("self") if name in ("addmm", "addmv", "baddbmm", "addcmul") else None]
    if "has_biases" in named or "b_ih" in named:  # recurrent layers and cells: all of one axis
        found += [argument for argument in node.all_input_nodes if argument.meta["val"].dim() == 1]
    return {argument for argument in found if isinstance(argument, fx.Node)}


def _floats(values: Any) -> list[Tensor]:
    return [part for part in results_of(values) if isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex())]


def fingerprint(graph: fx.GraphModule, inputs: Mapping[str, tuple[Value, Origin]]) -> str:
    """A hash of the operations, their arguments and the constants among the inputs.

    In whatever order tensors are listed, and whatever the network's code calls its inputs.
    """
    digest = hashlib.sha256()
    stored = {name for name, (value, _) in inputs.items() if isinstance(value, (Source, Constant))}
    whole = sorted(graph.graph.nodes, key=lambda node: node.name if node.name in stored else "")  # others keep their order
    for nodes in (whole, *(child.graph.nodes for child in graph.children() if isinstance(child, fx.GraphModule))):
        own = stored if nodes is whole else {}
        names = {node: node.name if node.name in own else f"value {number}" for number, node in enumerate(nodes)}
        for node, name in names.items():
            args, kwargs = map_arg((node.args, node.kwargs), names.__getitem__)
            target = "" if node.op == "placeholder" else node.target
            digest.update(f"{node.op} {name} {target} {args} {kwargs}\n".encode())
    used = {node.name for node in graph.graph.nodes if node.users}
    for name, (value, _) in sorted(inputs.items(), key=lambda item: item[0] if item[0] in stored else ""):
        if isinstance(value, Source):  # two names may be written alike in a graph
            digest.update(f"{name} {value.names[0]}".encode())
        if isinstance(value, Constant) and name in used:  # batch normalization's counter is in evaluation mode for nobody
            content = value.value.detach().cpu()
            content = (content if content.layout == torch.strided else content.to_dense()).contiguous()
            digest.update(f"{name} {content.dtype} {tuple(content.shape)}".encode())
            digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes() if content.numel() else b"")
    return digest.hexdigest()


def reason_of(node: fx.Node) -> Reason:
    """The operation, the user's innermost source line outside of torch, and the module."""
    target: Any = node.target
    name = str(getattr(target, "overloadpacket", getattr(target, "__name__", target)))
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n(?: *(.*))?', node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].startswith("<")]  # generated code
    if any(frame[0].startswith(_READERS) for frame in frames):
        frames = []
    users = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    path, line, code = users[-1] if users else ("", "", "")
    source = f"{path.rsplit('/', 1)[-1]}:{line}" if path else ""
    return Reason(name, "", source, code.strip(), module_of(node))
