"""Points of a graph at which two networks' channels can be compared: the values that layers read."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from equinorm._scaling import Reason
from equinorm.discovery.graph.running import graph_values
from equinorm.permuting.arrangement import Sides
from equinorm.permuting.atoms import Atom, Axis, atoms, fresh, resolved
from equinorm.permuting.interpreter import Interpreter
from equinorm.permuting.values import Laid, flat


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Values of a graph in which channels stand that some operation takes out, as the inputs of layers.

    Attributes:
        program: the graph.
        axes: of each value in parts, by its name.
    """

    program: torch.export.ExportedProgram
    axes: Mapping[str, tuple[Axis, ...]]

    @staticmethod
    def of(program: torch.export.ExportedProgram, interpreter: Interpreter) -> "Points":
        """Those of a graph, once all that may be permuted is known.

        Args:
            program: the graph.
            interpreter: has run it on axes.
        """
        found: dict[str, tuple[Axis, ...]] = {}
        _add(interpreter, {str(name) for name in program.graph_signature.user_inputs}, "", found)
        return Points(program, found)

    def run(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> dict[str, Tensor]:
        """The numbers of each with a model's weights, on the CPU, in float32 or float64."""
        seen = graph_values(self.program, model, args, kwargs, self.axes.keys())
        return {name: value.cpu().to(torch.promote_types(value.dtype, torch.float32)) for name, value in seen.items()}

    def sides(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Sides:
        """Standardized activations of two networks by name, batches along a first axis, to be matched as weights are."""
        one, other = ([tensors[name] for name in self.axes] for tensors in (ours, theirs))
        batches = fresh(len(one[0]) if one else 0, Reason("data", "a batch"))
        return Sides(one, other, [(batches, *axes) for axes in self.axes.values()])

    def standardized(self, name: str, batches: Tensor) -> Tensor:
        """Activations of mean 0 and norm 1 over all places that no channel tells apart; 0 where they do not vary.

        Args:
            name: of the value.
            batches: of shape (batches, *shape of the value).
        """
        along = [0] + [place for place, axis in enumerate(self.axes[name], 1) if not _free([Laid((axis,))])]
        size = batches.square().sum(along, keepdim=True).sqrt()
        centred = batches - batches.mean(along, keepdim=True)
        norm = centred.square().sum(along, keepdim=True).sqrt()
        return torch.where(norm > 1e-6 * size, centred / norm, 0.0)


def _add(interpreter: Interpreter, inputs: Set[str], prefix: str, found: dict[str, tuple[Axis, ...]]) -> None:
    """Add the points of a graph, and of those that it runs; what depends on no input is the same for all of them."""
    live: set[fx.Node] = set()
    for node in interpreter.graph.graph.nodes:
        if node.name in inputs if node.op == "placeholder" else not live.isdisjoint(node.all_input_nodes):
            live.add(node)
        if node in interpreter.bodies:
            name, inner, given = interpreter.bodies[node]
            places = [part.name for part in inner.graph.graph.nodes if part.op == "placeholder"]
            reached = {place for place, value in zip(places, given, strict=True) if value in live}
            _add(inner, reached, f"{prefix}{name}.", found)
    for node in live:
        value, numbers = interpreter.values.get(node), node.meta.get("val")
        if isinstance(value, Laid) and isinstance(numbers, Tensor) and numbers.is_floating_point():
            users = [user for user in node.users if user.op != "output" and user not in interpreter.bodies]
            own = _free([value])
            if any(flat([read := interpreter.values[user]]) and not own <= _free([read]) for user in users):
                found[prefix + node.name] = tuple(map(resolved, value.axes))


def _free(given: Any) -> set[Atom]:
    """Atoms of values that may be permuted."""
    axes = (axis for value in flat(given) for part in value.parts for axis in part.axes)
    return {atom for axis in axes for atom in atoms(axis) if atom.pinned is None}
