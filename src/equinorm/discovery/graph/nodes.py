"""What one node of a graph says by itself: its operator, arguments, module, and how large its result is."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

CONSTANT_LIMIT = 1 << 24
"""Largest constant, in entries, that is computed while looking at a graph."""


def operator_name(node: fx.Node) -> str:
    """Name of the ATen operator that a node calls; empty for all other nodes."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return ""
    return node.target.overloadpacket.__name__


def bind(target: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, defaults filled in."""
    bound = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def given_nodes(node: fx.Node) -> Iterator[tuple[torch.Argument, fx.Node]]:
    """Arguments of an operation that are graph nodes, alone or in lists, with their entries in the schema."""
    if isinstance(node.target, torch._ops.OpOverload):
        for position, argument in enumerate(node.target._schema.arguments):
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            for entry in results_of(value):
                if isinstance(entry, fx.Node):
                    yield argument, entry


def module_of(node: fx.Node) -> str:
    """Dotted path of the innermost module that an operation belongs to; empty for the model itself."""
    modules = [module for module, _ in (node.meta.get("nn_module_stack") or {}).values() if module]
    return modules[-1] if modules else ""


def results_of(value: Any) -> list[Any]:
    """The results of an operation, or the entries of an argument, of which there may be several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def mapped(argument: Any, change: Callable[[Any], Any]) -> Any:
    """What a function makes of an argument, of each in lists and dicts."""
    if isinstance(argument, dict):
        return {name: mapped(value, change) for name, value in argument.items()}
    if isinstance(argument, (list, tuple)):
        return type(argument)(mapped(item, change) for item in argument)
    return change(argument)


def is_static(result: Any) -> bool:
    """Are these tensors of sizes that no data decides?"""
    parts = results_of(result)
    return all(isinstance(part, Tensor) and all(isinstance(size, int) for size in part.shape) for part in parts)


def is_unknown_number(value: Any) -> bool:
    """Is this a number, or an answer, that data decide?"""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def fill_value(node: fx.Node) -> float | None:
    """The number that an operation fills a new tensor with, whatever its input holds; None for other operations."""
    name = operator_name(node)
    if name in ("full_like", "new_full", "full"):
        value = bind(node.target, node.args, node.kwargs)["fill_value"]
        return value if isinstance(value, (bool, int, float)) else None
    return {"zeros_like": 0, "new_zeros": 0, "zeros": 0, "ones_like": 1, "new_ones": 1, "ones": 1}.get(name)


def is_computable(node: fx.Node) -> bool:
    """Can this operation be computed once its inputs are constants? Not if it draws numbers, is sparse, or makes too much."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return is_small(node) and all(_is_dense(part.meta.get("val")) for part in (node, *node.all_input_nodes))


def _is_dense(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.layout == torch.strided


def is_small(node: fx.Node) -> bool:
    """Are the results of a node of known sizes, and no larger than constants may be?"""
    result: Any = node.meta.get("val")
    return is_static(result) and all(part.numel() <= CONSTANT_LIMIT and not part.is_meta for part in results_of(result))


_SUBGRAPHS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Higher-order operators that only run a subgraph, and how many arguments stand before it."""


def subgraph(node: fx.Node) -> tuple[fx.GraphModule | None, Sequence[Any]]:
    """The graph that a higher-order operator only runs, and what it gives to it; None for other nodes."""
    place = _SUBGRAPHS.get(getattr(node.target, "__name__", ""))
    if place is None:
        return None, ()
    name: Any = node.args[place]
    body = getattr(node.graph.owning_module, str(name.target), None)
    return (body, node.args[place + 1 :]) if isinstance(body, fx.GraphModule) else (None, ())


def graphs(graph: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph and those that it runs."""
    return [part for part in graph.modules() if isinstance(part, fx.GraphModule)]
