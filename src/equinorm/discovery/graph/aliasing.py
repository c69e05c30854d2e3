"""What operations share, change and fill: aliases and in-place writes in a graph."""

import operator
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, fx

from equinorm._errors import ExportError
from equinorm._memory import storage_of
from equinorm.discovery.graph.nodes import (
    bind,
    fill_value,
    given_nodes,
    graphs,
    is_computable,
    is_small,
    module_of,
    operator_name,
    subgraph,
)

_DROPOUTS = "dropout feature_dropout alpha_dropout feature_alpha_dropout"

_SOMETIMES_ALIASES = f"{_DROPOUTS} type_as atleast_1d atleast_2d atleast_3d meshgrid"
"""Operations that may return their input itself although neither schema nor trace says so."""


_LIFTED = "lift_fresh_copy"
"""Makes a fresh copy of a constant, although the trace shows it in the constant's own memory."""


def written(node: fx.Node) -> list[fx.Node]:
    """Arguments that the operation changes in place; all of them, if it runs a subgraph that changes anything."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        owner = node.graph.owning_module
        bodies = [getattr(owner, str(inner.target), None) for inner in node.all_input_nodes if inner.op == "get_attr"]
        if any(written(inner) for body in bodies if isinstance(body, fx.GraphModule) for inner in body.graph.nodes):
            return [inner for inner in node.all_input_nodes if inner.op != "get_attr"]
    if operator_name(node) == "detach_":  # changes no entry
        return []
    return [value for argument, value in given_nodes(node) if argument.alias_info is not None and argument.alias_info.is_write]


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
            if computed or node.name in names or (fill_value(node) is not None and is_small(node)):
                found.add(node)
        return found


def _roots(graph: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The node that first owned the memory of each node: by the operators' schemas, and by the memory seen while tracing."""
    found: dict[fx.Node, fx.Node] = {}
    owners: dict[int, fx.Node] = {}
    for node in graph.graph.nodes:
        shared = [value for argument, value in given_nodes(node) if argument.alias_info is not None]
        if node.target is operator.getitem:
            shared = [] if _is_fresh(node, found) else [_within(node) or node.all_input_nodes[0]]
        elif operator_name(node) in _SOMETIMES_ALIASES.split():
            shared = node.all_input_nodes
        memory = memory_of(node.meta.get("val"), node)
        owner = owners.get(memory) if memory is not None else None
        if operator_name(node) == _LIFTED and memory is not None and owner is not None:
            owner = owners[memory] = owner if operator_name(owner) == _LIFTED else node
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
    is_own = roots[call] is call and operator_name(call) not in _SOMETIMES_ALIASES.split() and len(returns) > 1
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


def has_writing_subgraph(graph: fx.GraphModule) -> bool:
    """Does a subgraph change anything in place?"""
    return any(written(node) for body in graphs(graph) if body is not graph for node in body.graph.nodes)


def mend_users(graph: fx.GraphModule) -> None:
    """Enter anew who uses each node: the exporter forgets some where a region without gradients drops what it was given."""
    for part in graphs(graph):
        for node in part.graph.nodes:
            node.users.clear()
        for node in part.graph.nodes:
            for used in node.all_input_nodes:
                used.users[node] = None


def remove_idle_dropouts(graph: fx.GraphModule) -> None:
    """Replace each dropout that does nothing by its input, which is what it returns; not where a graph returns the result."""
    for part in graphs(graph):
        for node in list(part.graph.nodes):
            if operator_name(node) not in _DROPOUTS.split():
                continue
            named = bind(node.target, node.args, node.kwargs)
            if (named["p"] == 0 or named["train"] is False) and all(user.op != "output" for user in node.users):
                node.replace_all_uses_with(named["input"])
                part.graph.erase_node(node)
        part.recompile()


def has_hidden_aliases(graph: fx.GraphModule) -> bool:
    """Does any operation return the memory of its input although its schema denies it (einsum does)?"""
    return any(_hides_aliases(part) for part in graphs(graph))


def _hides_aliases(graph: fx.GraphModule) -> bool:
    if any(operator_name(node) in _SOMETIMES_ALIASES.split() for node in graph.graph.nodes):
        return True
    owners = {memory_of(node.meta.get("val")) for node in graph.graph.nodes if node.op == "placeholder"}
    for node in graph.graph.nodes:
        memory = memory_of(node.meta.get("val"))
        if isinstance(node.target, torch._ops.OpOverload) and memory is not None and operator_name(node) != _LIFTED:
            if memory in owners and not any(argument.alias_info is not None for argument, _ in given_nodes(node)):
                return True
            owners.add(memory)
    return False


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
