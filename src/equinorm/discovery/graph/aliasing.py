"""What operations share, change and fill: aliases and in-place writes in a graph."""

import operator
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx

from equinorm._errors import ExportError
from equinorm._memory import storage_of

CONSTANT_LIMIT = 1 << 24
"""Largest constant, in entries, that is computed while looking at a graph."""

_DROPOUTS = "dropout feature_dropout alpha_dropout feature_alpha_dropout"

_SOMETIMES_ALIASES = f"{_DROPOUTS} type_as atleast_1d atleast_2d atleast_3d meshgrid"
"""Operations that may return their input itself although neither schema nor trace says so."""


_LIFTED = "lift_fresh_copy"
"""Makes a fresh copy of a constant, although the trace shows it in the constant's own memory."""


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


def is_static(result: Any) -> bool:
    """Are these tensors of sizes that no data decides?"""
    parts = result if isinstance(result, (list, tuple)) else [result]
    return all(isinstance(part, Tensor) and all(isinstance(size, int) for size in part.shape) for part in parts)


def fill_value(node: fx.Node) -> float | None:
    """The number that an operation fills a new tensor with, whatever its input holds; None for other operations."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _is_small(node):
        return None
    name = node.target.overloadpacket.__name__
    if name in ("full_like", "new_full"):
        value = bind(node.target, node.args, node.kwargs)["fill_value"]
        return value if isinstance(value, (bool, int, float)) else None
    return {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}.get(name)


def is_computable(node: fx.Node) -> bool:
    """Can this operation be computed once its inputs are constants? Not if it draws numbers, is sparse, or makes too much."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return _is_small(node) and all(_is_dense(part.meta.get("val")) for part in (node, *node.all_input_nodes))


def _is_dense(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.layout == torch.strided


def _is_small(node: fx.Node) -> bool:
    result: Any = node.meta.get("val")
    parts = result if isinstance(result, (list, tuple)) else [result]
    return is_static(result) and all(part.numel() <= CONSTANT_LIMIT and not part.is_meta for part in parts)


def written(node: fx.Node) -> list[fx.Node]:
    """Arguments that the operation changes in place; all of them, if it runs a subgraph that changes anything."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        owner = node.graph.owning_module
        bodies = [getattr(owner, str(inner.target), None) for inner in node.all_input_nodes if inner.op == "get_attr"]
        if any(written(inner) for body in bodies if isinstance(body, fx.GraphModule) for inner in body.graph.nodes):
            return [inner for inner in node.all_input_nodes if inner.op != "get_attr"]
    if _packet(node) == "detach_":  # changes no entry
        return []
    return [value for argument, value in _named(node) if argument.alias_info is not None and argument.alias_info.is_write]


class GraphAliases:
    """Which values of one graph share memory, and what its operations change in it; looked at once.

    Attributes:
        graph: the graph; its subgraphs have aliases of their own.
        roots: the node that first owned the memory of each node.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, self.roots = graph, _roots(graph)

    def written_inputs(self) -> set[str]:
        """Names of the placeholders whose memory some operation changes."""
        return {self.roots[target].name for node in self.graph.graph.nodes for target in written(node)}

    def visibly_written(self, constants: Set[str] = frozenset()) -> frozenset[fx.Node]:
        """Roots of memory that some operation reads after another has changed it, other than through that one's result.

        Writes of constants into constants do not count: they are carried out.

        Args:
            constants: names of the placeholders that hold constants.
        """
        order = {node: position for position, node in enumerate(self.roots)}
        aliases: dict[fx.Node, list[fx.Node]] = {}
        for node, root in self.roots.items():
            aliases.setdefault(root, []).append(node)
        constant = self._constants(constants)
        visible: set[fx.Node] = set()
        for node in self.roots:
            for target in written(node) if node not in constant else ():
                earlier = [alias for alias in aliases[self.roots[target]] if order[alias] < order[node]]
                if any(order[user] > order[node] for alias in earlier for user in alias.users):
                    visible.add(self.roots[target])
        return frozenset(visible)

    def _constants(self, names: Set[str]) -> set[fx.Node]:
        """Nodes whose values depend on nothing but placeholders of these names and attributes of the graph."""
        found: set[fx.Node] = set()
        for node in self.roots:
            computed = node.op == "get_attr" or (
                is_computable(node) and all(argument in found for argument in node.all_input_nodes)
            )
            if computed or node.name in names or fill_value(node) is not None:
                found.add(node)
        return found


def _roots(graph: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The node that first owned the memory of each node: by the operators' schemas, and by the memory seen while tracing."""
    found: dict[fx.Node, fx.Node] = {}
    owners: dict[int, fx.Node] = {}
    for node in graph.graph.nodes:
        shared = [value for argument, value in _named(node) if argument.alias_info is not None]
        if node.target is operator.getitem:
            shared = [] if _is_fresh(node, found) else [_within(node) or node.all_input_nodes[0]]
        elif _packet(node) in _SOMETIMES_ALIASES.split():
            shared = node.all_input_nodes
        memory = memory_of(node.meta.get("val"), node)
        owner = owners.get(memory) if memory is not None else None
        if _packet(node) == _LIFTED and memory is not None and owner is not None:
            owner = owners[memory] = owner if _packet(owner) == _LIFTED else node
        found[node] = owner or (found[shared[0]] if shared else node)
        if memory is not None:
            owners.setdefault(memory, found[node])
    return found


def _is_fresh(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> bool:
    """Is this one of several results that the operator's schema makes anew, as the values and places of topk are?"""
    call, place = node.args
    if not isinstance(call, fx.Node) or not isinstance(call.target, torch._ops.OpOverload) or not isinstance(place, int):
        return False
    returns = call.target._schema.returns
    is_own = roots[call] is call and _packet(call) not in _SOMETIMES_ALIASES.split() and len(returns) > 1
    return is_own and isinstance(returns[place].type, torch.TensorType) and returns[place].alias_info is None


def _within(node: fx.Node) -> fx.Node | None:
    """What is given to a subgraph and comes back as this one of its results."""
    call, place = node.args
    body, given = subgraph(call) if isinstance(call, fx.Node) else (None, ())
    if body is None or not isinstance(place, int):
        return None
    results = next(inner for inner in body.graph.nodes if inner.op == "output").args[0]
    result = results[place] if isinstance(results, (list, tuple)) else results
    root = _roots(body).get(result) if isinstance(result, fx.Node) else None
    names = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    operand = given[names.index(root)] if root in names else None
    return operand if isinstance(operand, fx.Node) else None


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


def has_writing_subgraph(graph: fx.GraphModule) -> bool:
    """Does a subgraph change anything in place?"""
    return any(written(node) for body in _graphs(graph) if body is not graph for node in body.graph.nodes)


def mend_users(graph: fx.GraphModule) -> None:
    """Enter anew who uses each node: the exporter forgets some where a region without gradients drops what it was given."""
    for part in _graphs(graph):
        for node in part.graph.nodes:
            node.users.clear()
        for node in part.graph.nodes:
            for used in node.all_input_nodes:
                used.users[node] = None


def remove_idle_dropouts(graph: fx.GraphModule) -> None:
    """Replace each dropout that does nothing by its input, which is what it returns; not where a graph returns the result."""
    for part in _graphs(graph):
        for node in list(part.graph.nodes):
            if _packet(node) not in _DROPOUTS.split():
                continue
            named = bind(node.target, node.args, node.kwargs)
            if (named["p"] == 0 or named["train"] is False) and all(user.op != "output" for user in node.users):
                node.replace_all_uses_with(named["input"])
                part.graph.erase_node(node)
        part.recompile()


def has_hidden_aliases(graph: fx.GraphModule) -> bool:
    """Does any operation return the memory of its input although its schema denies it (einsum does)?"""
    return any(_hides_aliases(part) for part in _graphs(graph))


def _hides_aliases(graph: fx.GraphModule) -> bool:
    if any(_packet(node) in _SOMETIMES_ALIASES.split() for node in graph.graph.nodes):
        return True
    owners = {memory_of(node.meta.get("val")) for node in graph.graph.nodes if node.op == "placeholder"}
    for node in graph.graph.nodes:
        memory = memory_of(node.meta.get("val"))
        if isinstance(node.target, torch._ops.OpOverload) and memory is not None and _packet(node) != _LIFTED:
            if memory in owners and not any(argument.alias_info is not None for argument, _ in _named(node)):
                return True
            owners.add(memory)
    return False


def _graphs(graph: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph and those that it runs."""
    return [part for part in graph.modules() if isinstance(part, fx.GraphModule)]


def _packet(node: fx.Node) -> str:
    """Name of a node's operator."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def memory_of(value: Any, node: fx.Node | None = None) -> int | None:
    """Identity of a tensor's memory; the node that makes it is named in the error.

    Raises:
        ExportError: for tensors of torch.vmap, torch.func.jvp, FlexAttention and the like, which have none.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(value):  # pyright: ignore[reportAttributeAccessIssue]
        module = module_of(node) if node is not None else ""
        where = f" in {module}" if module else ""
        raise ExportError(
            f"the network uses torch.vmap, torch.func.jvp, FlexAttention or the like{where}, inside of which what shares "
            f"memory cannot be followed. Declare the submodule that does opaque (opaque={module or 'its.name'!r}), or write it "
            "without."
        )
    return storage_of(value)


def module_of(node: fx.Node) -> str:
    """Dotted path of the innermost module that an operation belongs to; empty for the model itself."""
    modules = [module for module, _ in (node.meta.get("nn_module_stack") or {}).values() if module]
    return modules[-1] if modules else ""


def _named(node: fx.Node) -> Iterator[tuple[torch.Argument, fx.Node]]:
    """Arguments of an operation that are graph nodes, alone or in lists, with their entries in the schema."""
    if isinstance(node.target, torch._ops.OpOverload):
        for position, argument in enumerate(node.target._schema.arguments):
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            for entry in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(entry, fx.Node):
                    yield argument, entry
