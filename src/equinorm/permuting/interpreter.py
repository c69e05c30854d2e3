"""Abstract interpretation of an exported graph: run every operation on axes instead of numbers."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from equinorm.discovery.any_size import CUTS, OF_DATA
from equinorm.discovery.graph.aliasing import GraphAliases, written
from equinorm.discovery.graph.nodes import (
    bind,
    fill_value,
    is_computable,
    is_small,
    is_static,
    is_unknown_number,
    mapped,
    operator_name,
    results_of,
    subgraph,
)
from equinorm.discovery.graph.sizes import Sizes
from equinorm.discovery.interpreter import reason_of
from equinorm.discovery.operation import MARKS
from equinorm.discovery.rules import key
from equinorm.permuting.atoms import is_pinned
from equinorm.permuting.equal_entries import why_equal
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws import ON_NAMES, ON_STACKS, Call, find
from equinorm.permuting.laws.registry import WHICH, Law
from equinorm.permuting.made_of import made_of
from equinorm.permuting.reshaping import unpacked
from equinorm.permuting.selected_rows import follow
from equinorm.permuting.trail import Trail
from equinorm.permuting.tried_scores import ROUNDED, made_from, why_equal_by_nature
from equinorm.permuting.values import Chosen, Laid, Stacked, Value, constant, flat, pinned

_SHAPES_ONLY = "rand_like randn_like randint_like sym_size"
"""Operations that read no entry of what they are given."""

_EMPTY = "empty empty_like new_empty new_empty_strided empty_strided"
"""Operations whose entries nobody may read before they are written: any permutation leaves them as they are."""

_CARRIERS = """view reshape flatten unflatten _unsafe_view view_copy unsqueeze squeeze permute transpose t expand select slice
narrow clone contiguous detach alias repeat_interleave to _to_copy"""
"""Operations that move whole numbers, which go on naming what they named."""

_RESHAPES = "view reshape unflatten _unsafe_view view_copy"

_OF_SIZES = f"{_RESHAPES} flatten expand"
"""Operations whose numbers are sizes of what they return."""


class Interpreter:
    """Propagates axes through one graph; subgraphs get interpreters of their own.

    Args:
        aliases: the graph, and what its values share.
        book: gathers the laws.
        unsteady: roots of memory that is read after it was changed in place; nothing in it may be permuted.
        trail: where values come from, in all graphs.
    """

    def __init__(self, aliases: GraphAliases, book: LawBook, unsteady: frozenset[fx.Node], trail: Trail) -> None:
        self.graph, self.roots, self.book, self.unsteady = aliases.graph, aliases.roots, book, unsteady
        self.sizes, self.values, self.trail = Sizes(), dict[fx.Node, Any](), trail
        self.bodies: dict[fx.Node, tuple[str, Interpreter, Any]] = {}
        self.returned: dict[fx.Node, Any] = {}  # what graphs return that nodes stand for

    def propagate(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Run every operation on axes; return what the graph returns.

        Args:
            inputs: the value of every placeholder by its name.
        """
        for node in self.graph.graph.nodes:
            self.book.reason = reason_of(node) if node.op == "call_function" else self.book.reason
            if node.op == "placeholder":
                self.values[node] = inputs[node.name]
            elif node.op == "get_attr":
                attribute = operator.attrgetter(node.target)(self.graph)
                if isinstance(attribute, Tensor):
                    attribute = constant(attribute.detach().clone(), self.book.because("a constant"))
                self.values[node] = attribute
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                return list(self._arguments(results_of(node.args[0])))
            self._settle(node)
        raise ValueError("graph without output")

    def constant(self, node: fx.Node) -> Tensor | None:
        """The numbers of a value, here or in a subgraph, that no input and no weight can change."""
        value = self.trail.values.get(node)
        return value.number if isinstance(value, Laid) else None

    def _settle(self, node: fx.Node) -> None:
        """Note which axes a value has; pin what is changed in place while others look at it."""
        if self.roots[node] in self.unsteady:
            self.book.reason = self.book.reason if node.op != "call_function" else reason_of(node)
            self.book.pin(self.values[node], "shares memory that is changed in place")
            self.values[node] = pinned(self.sizes.known(node.meta.get("val")), self.book.reason)
        self.trail.values[node] = self.values[node]
        for value in flat(self.values[node]):
            for part in value.parts:
                self.book.see(part.axes)

    def _arguments(self, arguments: Any) -> Any:
        return map_arg(arguments, self.values.__getitem__)

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, place = self._arguments(node.args)
            if node.args[0] in self.returned:
                self.trail.sources[node] = self.returned[node.args[0]][place]
            part = source[place]
            return self._places(node.args[0], part()) if callable(part) else part
        body, given = subgraph(node)
        if body is not None:
            name = next(name for name, part in self.graph.named_children() if part is body)
            value, inner = self._inside(node, body, given)
            self.bodies[node] = name, inner, given
            return value
        args, kwargs = self._arguments((node.args, node.kwargs))
        value = self._value(node, args, kwargs)
        if operator_name(node) in ("argmax", "argmin"):
            value = self._places(node, value)
        is_kept = isinstance(node.target, torch._ops.OpOverload) and "batch_norm" in key(node.target)
        for target in written(node):
            if self.roots[target].op == "placeholder" and not is_kept:  # running statistics follow their channels
                self.book.pin([value, self.values[self.roots[target]]], "writes into a tensor of the model or an input")
        return value

    def _inside(self, node: fx.Node, body: fx.GraphModule, given: Sequence[fx.Node]) -> tuple[list[Any], "Interpreter"]:
        """What a graph returns that an operation stands for, and what has run it."""
        inside = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        aliases = GraphAliases(body)
        inputs = {inner.name: self.values[value] for inner, value in zip(inside, given, strict=True)}
        self.trail.sources |= dict(zip(inside, given, strict=True))
        inner = Interpreter(aliases, self.book, aliases.visibly_written(), self.trail)
        value, self.returned[node] = inner.propagate(inputs), _results(body)
        return value, inner

    def _places(self, node: Any, value: Any) -> Any:
        """Places of entries along an axis, which is pinned where several may be the largest."""
        if not isinstance(value, Laid) or value.names is None:
            return value
        if why := why_equal_by_nature(node, self.trail) or why_equal(node, self.trail):
            self.book.reason = reason_of(node)
            self.book.pin_axis(value.names, why)
            if why == ROUNDED:
                self.book.pin(made_from(node, self.trail), why)
        return value

    def _value(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Computed where it is constant, by its law where it has one, pinned where nothing is known."""
        target: Any = node.target
        tensors = flat([args, kwargs])
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        if not isinstance(target, torch._ops.OpOverload):
            return self._unknown(node, tensors) if tensors else target(*args, **kwargs)
        numbers = [value.number if isinstance(value, Laid) else None for value in tensors]
        if all(number is not None for number in numbers) and is_computable(node):
            with torch.no_grad():
                return self._constants(target(*mapped(args, _number), **mapped(kwargs, _number)))
        result: Any = self.sizes.known(node.meta.get("val"))
        fill = fill_value(node)
        if fill is not None and is_small(node):
            return self._constants(torch.full(result.shape, fill, dtype=result.dtype))
        name = key(target)
        if (fill is not None or name in _EMPTY.split()) and is_static(result):
            return Laid(tuple(map(self.book.free, result.shape)))
        if name in _SHAPES_ONLY.split():
            return pinned(result, self.book.because("made anew"))
        if is_static(result) and all(not part.numel() for part in results_of(result)):
            return pinned(result, self.book.because("has no entries"))
        law = find(target)
        if law is None and (made := made_of(node)) is not None:
            value, _ = self._inside(node, *made)
            if isinstance(result, (list, tuple)):
                return value
            self.trail.sources[node] = self.returned[node][0]
            return value[0]
        if law is None or not is_static(result) or not _is_plain(result, tensors, name):
            return self._unknown(node, tensors)
        if name not in _OF_SIZES.split() and _is_symbolic([args, kwargs]):
            given = tensors[0] if tensors else None
            if name in CUTS.split() and isinstance(given, Laid) and given.names is None:
                return self._cut(given, bind(target, args, kwargs)["dim"], result)
            return self._unknown(node, tensors)
        value = self._by_law(law, node, Call(target, bind(target, args, kwargs), result), tensors)
        if isinstance(value, Chosen) and any(self.roots[part] in self.unsteady for part in node.all_input_nodes):
            value = self.book.whole(value)  # another choice may be read there later
        return value if _fits(value, result) else self._unknown(node, tensors)

    def _cut(self, value: Laid, dim: int, result: Any) -> Any:
        """What an axis gives that is cut at places that data decide: nothing along it is permuted, all else is."""
        place = dim % len(value.shape)
        self.book.pin_axis(value.axes[place], OF_DATA)
        self.book.mixes(value.axes, [place])
        found = [
            value.with_axis(place, *([self.book.fixed(part.shape[place])] if len(part.shape) == len(value.shape) else []))
            for part in results_of(result)
        ]
        return found if isinstance(result, list) else found[0]

    def _by_law(self, law: Law, node: fx.Node, call: Call, tensors: list[Value]) -> Any:
        """What a law makes of a call; a stack where an axis is taken apart later, rows where data choose them."""
        if any(isinstance(value, Laid) and value.names is not None for value in tensors):
            return self._of_names(law, call, tensors)
        if (rows := follow(self.book, law, call)) is not None:
            return rows
        call = _of_wholes(self.book, call, Chosen)
        if key(call.operator) in _RESHAPES.split() and isinstance(call.input, Laid):
            parts = unpacked(call.input.axes, call.shape, node, self.book.because("looks at an axis in parts that do not fit"))
            if parts is not None:
                return Stacked(parts[0], tuple(Laid(tuple(axes)) for axes in parts[1]))
        if law not in ON_STACKS:
            call = _of_wholes(self.book, call, Stacked)
        return law(self.book, call)

    def _of_names(self, found: Law, call: Call, tensors: list[Value]) -> Any:
        """What an operation makes of values that name places along an axis."""
        call = _of_wholes(self.book, call, (Stacked, Chosen))
        if key(call.operator) in _CARRIERS.split() and len(tensors) == 1 and call.result.dtype in (torch.int32, torch.int64):
            return replace(found(self.book, call), names=call.input.names)
        indices = flat([call.get(name) for name in ON_NAMES.get(found, ())])
        for value in tensors:
            if isinstance(value, Laid) and value.names is not None and not any(value is index for index in indices):
                self.book.pin_axis(value.names, WHICH)
        return found(self.book, call)

    def _constants(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return constant(output, self.book.because("a constant that varies along the axis"))
        return [self._constants(part) for part in output]

    def _unknown(self, node: fx.Node, tensors: list[Value]) -> Any:
        """Pin everything that goes in, and what comes out."""
        no_law = "no law: taken to tell positions apart" if is_static(node.meta.get("val")) else OF_DATA
        detail = MARKS.get(getattr(node.target, "__name__", "")) or no_law
        for value in tensors:
            if not is_pinned(value.touched):
                self.book.pin(value, detail)
        return pinned(self.sizes.known(node.meta.get("val")), self.book.because(detail))


def _results(body: fx.GraphModule) -> list[Any]:
    """What a graph returns."""
    return results_of(next(node.args[0] for node in body.graph.nodes if node.op == "output"))


def _is_symbolic(arguments: Any) -> bool:
    """Is there a number among arguments that data decides?"""
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, (list, tuple)):
        return any(map(_is_symbolic, arguments))
    return is_unknown_number(arguments)


def _fits(value: Any, result: Any) -> bool:
    """Does a value, or each of several, have the shape that the exporter saw? One that is made when asked for may not."""
    if isinstance(value, (list, tuple)):
        return len(value) == len(results_of(result)) and all(map(_fits, value, results_of(result)))
    return callable(value) or tuple(value.shape) == tuple(result.shape)


def _is_plain(result: Any, tensors: list[Value], name: str) -> bool:
    """Are there entries in everything? Tensors that are joined may have none."""
    return all(0 not in part.shape for part in (*results_of(result), *(tensors if name != "cat" else ())))


def _of_wholes(book: LawBook, call: Call, kinds: Any) -> Call:
    """The same with every stack, or all chosen rows, as one value."""

    def whole(argument: Any) -> Any:
        return book.whole(argument) if isinstance(argument, kinds) else argument

    return replace(call, arguments=mapped(call.arguments, whole))


def _number(argument: Any) -> Any:
    return argument.number if isinstance(argument, Laid) else argument
