"""Running a graph with the numbers of a model, to see what its values are."""

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from equinorm.discovery.graph.aliasing import GraphAliases
from equinorm.modules.choosing import tensors_of
from equinorm.modules.running import without_cache


class _Runner(fx.Interpreter):
    """Keeps copies of tensors under the names that discovery gives them.

    Args:
        graph: to be run.
        found: takes the copies.
        wanted: names of those to keep; None for all.
        prefix: of the names, in a graph that runs inside of another one.
    """

    def __init__(self, graph: fx.GraphModule, found: dict[str, Tensor], wanted: Set[str] | None, prefix: str = "") -> None:
        super().__init__(graph)
        self.found, self.wanted, self.prefix = found, wanted, prefix

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, and keep what it gives."""
        result, name = super().run_node(n), self.prefix + n.name
        if isinstance(result, Tensor) and (self.wanted is None or name in self.wanted):
            self.found[name] = result.detach().clone()
        return result

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Graphs that an operation runs are looked into."""
        return super().call_function(target, tuple(map(self._within, args)), kwargs)

    def _within(self, part: Any) -> Any:
        if not isinstance(part, fx.GraphModule):
            return part
        name = next(name for name, child in self.module.named_children() if child is part)
        return _Runner(part, self.found, self.wanted, f"{self.prefix}{name}.").run


@torch.no_grad()
def graph_values(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    wanted: Set[str] | None = None,
) -> dict[str, Tensor]:
    """Copies of the values of a graph by name, on some inputs and with a model's weights.

    Args:
        program: the graph.
        model: from which it was exported, or one of the same architecture; what a graph writes into its tensors is lost.
        args: positional inputs, of the shapes that it was exported for.
        kwargs: keyword inputs.
        wanted: names of the values; None for all.
    """
    stored = tensors_of(model)
    leaves = iter(pytree.tree_leaves((args, without_cache(model, args, dict(kwargs or {})))))
    given: dict[str, Any] = {}
    written = GraphAliases(program.graph_module).written_inputs()
    for spec in program.graph_signature.input_specs:
        name, target = spec.arg.name, spec.target or ""
        if spec.kind == InputKind.USER_INPUT:
            given[name] = next(leaves)
        else:
            given[name] = stored[target] if target in stored else program.constants[target]
        if isinstance(given[name], Tensor) and (spec.kind != InputKind.PARAMETER or name in written):
            given[name] = given[name].detach().clone()
    found: dict[str, Tensor] = {}
    entering = [given[node.name] for node in program.graph.nodes if node.op == "placeholder"]
    _Runner(program.graph_module, found, wanted).run(*entering)
    return found
