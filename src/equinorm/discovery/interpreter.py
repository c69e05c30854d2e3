"""Abstract interpretation of an exported graph: run every operation on labels instead of numbers."""

import hashlib
import operator
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from equinorm._scaling import Reason
from equinorm.discovery.graph.aliasing import (
    GraphAliases,
    bind,
    fill_value,
    is_computable,
    is_static,
    module_of,
    subgraph,
    written,
)
from equinorm.discovery.labels import Label
from equinorm.discovery.rules import Call, find, key, why_not
from equinorm.discovery.selected_rows import follow
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, Chosen, Constant, Origin, Source, Value, loses, source_of

_TORCH = os.path.dirname(torch.__file__)

_JOINS = """add sub rsub subtract cat concat concatenate stack where maximum minimum lerp masked_fill copy
select_scatter slice_scatter"""
"""Operations through which a parameter meets an activation as an addend, not as a factor."""

_MANY = 4
"""Factors of a label from which on it pays to look which of them still say something."""

_MARKS = {"opaque.default": "declared opaque", "observed.default": "kept for later, or read by a hook"}
"""What operations of our own in a graph stand for."""

_CONVERSIONS = "to _to_copy type_as copy"
"""Operations by which a network itself asks for another dtype."""

_NO_RULE = "no rule: taken to fit no scale"


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
                self.values[node] = Constant(attribute.detach()) if isinstance(attribute, Tensor) else attribute
                self.origins[node] = Origin(parameters=frozenset())
            elif node.op == "call_function":
                self.trace.reason = reason_of(node)
                self._call(node)
            if self.roots[node] in self.unsteady:
                self.trace.reason = reason_of(node)
                for value in flat(self.values[node]):
                    self.trace.pin(value, "shares memory that is changed in place")
                self.values[node] = pinned(node.meta.get("val"))
            if node.op == "output":
                return list(self._arguments(node.args[0])), self._joined(node)
        raise ValueError("graph without output")

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
            self.values[node], self.origins[node] = self._inside(body, given)
        elif name == "cond" and is_static(node.meta.get("val")) and not written(node):
            (ones, first), (others, second) = (self._inside(body, node.args[3]) for body in args[1:3])
            self.trace.reason = reason_of(node)
            self.values[node] = [self.trace.add(one, other) for one, other in zip(ones, others, strict=True)]
            self.origins[node] = max(first, second, key=lambda origin: (origin.parameters is None, origin.depth))
        else:
            self.values[node] = _apply(node, args, kwargs, self.trace)
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
                if lossy is not None and not _is_pinned(value, self.trace):
                    detail = f"rounds to {str(lossy).removeprefix('torch.')}"
                    self.trace.casts.append((value, lossy, replace(self.trace.reason, detail=detail), by_autocast))

    def _inside(self, body: fx.GraphModule, given: Any) -> tuple[list[Any], Origin]:
        """What a subgraph returns, run on the values of these nodes."""
        names = [inner.name for inner in body.graph.nodes if inner.op == "placeholder"]
        inputs = {name: (self.values[node], self.origins[node]) for name, node in zip(names, given, strict=True)}
        aliases = GraphAliases(body)
        return Interpreter(aliases, self.trace, aliases.visibly_written()).propagate(inputs)

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


def flat(values: Any) -> Iterable[Value]:
    """Every tensor value in nested lists and dicts."""
    if isinstance(values, VALUES):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from flat(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from flat(value)


def _apply(node: fx.Node, args: tuple, kwargs: dict, trace: Trace) -> Any:
    """The value of one operation: computed if constant, otherwise by its rule."""
    target: Any = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if target is torch.ops.aten._assert_tensor_metadata.default:  # stands before every conversion; reads no entry
        return None
    tensors = list(flat((args, kwargs)))
    if not all(_is_known(argument.meta.get("val")) for argument in node.all_input_nodes):
        return _unknown(node, tensors, trace)
    if not isinstance(target, torch._ops.OpOverload):
        return _unknown(node, tensors, trace) if tensors else target(*args, **kwargs)
    if all(isinstance(value, Constant) for value in tensors) and (constant := _constant(node, args, kwargs)) is not None:
        return constant
    value = fill_value(node)
    result: Any = node.meta.get("val")
    if value is not None:
        return Constant(torch.full(result.shape, value, dtype=result.dtype))
    call = Call(target, bind(target, args, kwargs), result)
    if any(isinstance(value, Chosen) for value in tensors) and (followed := follow(trace, call)) is not None:
        return followed
    if all(_is_pinned(value, trace) for value in tensors):
        return pinned(result)
    rule = find(target)
    if rule is None or not is_static(result):
        return _unknown(node, tensors, trace)
    label = rule(trace, call)
    _note_reads(tensors, label, trace)
    if isinstance(label, VALUES) and not (result.dtype.is_floating_point or result.dtype.is_complex):
        return trace.pin(label, "rounds to integers")  # for example a sum with dtype=torch.int64
    if isinstance(label, VALUES) and result.dtype.itemsize == 1:
        return trace.pin(label, "rounds to eight bits, which saturate")
    if isinstance(label, Label) and len(label.factors) > _MANY:
        return trace.reduced(label)
    return label


def _note_reads(tensors: Iterable[Value], result: Any, trace: Trace) -> None:
    """Remember parameters whose entries were read although nothing asked how they scale, as by sign(w)."""
    shown = source_of(result)
    for source in filter(None, map(source_of, tensors)):
        if source.label is None and shown not in (source, *trace.shifted.get(source, {}).values()):
            trace.read.add(source)


def _floats(values: Any) -> list[Tensor]:
    parts = values if isinstance(values, (list, tuple)) else [values]
    return [part for part in parts if isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex())]


def _is_known(result: Any) -> bool:
    """Does this input have a shape, or a value, that no data decides?"""
    if isinstance(result, Tensor):
        return is_static(result)
    return not isinstance(result, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _unknown(node: fx.Node, tensors: Iterable[Value], trace: Trace) -> Any:
    """Pin everything that goes in; what comes out does not scale."""
    target: Any = node.target
    why = _MARKS.get(getattr(target, "__name__", "")) or _NO_RULE
    if isinstance(target, torch._ops.OpOverload):
        why = why_not(key(target)) or why
    for value in tensors:
        trace.pin(value, why)
    return pinned(node.meta.get("val"))


def _is_pinned(value: Value, trace: Trace) -> bool:
    if isinstance(value, Chosen):
        return _is_pinned(value.value, trace)
    if trace.is_unlabelled(value):
        return False
    if isinstance(value, Source) and value.label is None:
        return trace.batch_norm == "affine"
    label = trace.label(value)
    return not label.factors


def pinned(result: Any) -> Any:
    """Labels of results that do not scale."""
    if isinstance(result, Tensor):
        return Label(tuple(result.shape))  # sizes that data decides stay symbols: no rule looks at them
    if isinstance(result, (list, tuple)):
        return [pinned(part) for part in result]
    return result


def _constant(node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """Compute what depends on constants only, in-place updates included; None where that is not possible."""
    target: Any = node.target
    if not is_computable(node):
        return None

    def value(argument: Any) -> Any:
        if isinstance(argument, Constant):
            return argument.value
        return type(argument)(value(item) for item in argument) if isinstance(argument, (list, tuple)) else argument

    def wrapped(output: Any) -> Any:
        return Constant(output) if isinstance(output, Tensor) else [wrapped(part) for part in output]

    with torch.no_grad():
        return wrapped(target(*(value(a) for a in args), **{k: value(v) for k, v in kwargs.items()}))


def fingerprint(graph: fx.GraphModule, inputs: Mapping[str, tuple[Value, Origin]]) -> str:
    """A hash of the operations, their arguments and the constants among the inputs."""
    digest = hashlib.sha256()
    for body in (graph, *(child for child in graph.children() if isinstance(child, fx.GraphModule))):
        for node in body.graph.nodes:
            digest.update(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}\n".encode())
    used = {node.name for node in graph.graph.nodes if node.users}
    for name, (value, _) in inputs.items():
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
    users = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    path, line, code = users[-1] if users else ("", "", "")
    source = f"{path.rsplit('/', 1)[-1]}:{line}" if path else ""
    return Reason(name, "", source, code.strip(), module_of(node))
