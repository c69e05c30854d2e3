"""Activations of two networks on the same data, at the values that layers read: what their channels do, not what they weigh."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equinorm._arguments import batches_of, positional
from equinorm._errors import EquivalenceError, describe, describe_inputs
from equinorm.joining.moves import Moves
from equinorm.modules.copying import duplicate
from equinorm.modules.running import own_random
from equinorm.permuting.points import Points


@dataclass(eq=False)
class Activations:
    """Standardized activations of a network, whatever its signs, and of another.

    Attributes:
        model: the first network.
        moves: what may be moved in it.
        points: where to look.
        batches: positional inputs, of the shapes of the graph.
        kwargs: keyword inputs.
        theirs: activations of the other network by name.
    """

    model: nn.Module
    moves: Moves
    points: Points
    batches: list[tuple]
    kwargs: Mapping[str, Any] | None
    theirs: dict[str, Tensor] = field(default_factory=dict)

    def of(self, signs: Tensor) -> dict[str, Tensor]:
        """Those of the first network after flips of sign."""
        model = self.model
        if bool((signs < 0).any()):
            model = duplicate(model, "to flip the copy")
            replace(self.moves.flips, model=model).flip_(signs)
        return self._measured(model)

    def _measured(self, model: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {name: [] for name in self.points.axes}
        for batch in self.batches:
            with own_random(model):
                for name, value in self.points.run(model, batch, self.kwargs).items():
                    seen[name].append(value)
        if broken := [name for name, parts in seen.items() if not all(bool(part.isfinite().all()) for part in parts)]:
            raise EquivalenceError(f"activations of {describe(model)} hold NaN or inf on these data: {broken[0]} of its graph.")
        return {name: self.points.standardized(name, torch.stack(parts)) for name, parts in seen.items()}


def measured(
    both: tuple[nn.Module, nn.Module],
    moves: Moves,
    data: Iterable[tuple | Tensor],
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None,
) -> Activations:
    """Activations of two networks on data.

    Args:
        both: the networks.
        moves: of the first, with its points.
        data: batches of positional inputs, each of the shapes of args.
        args: positional inputs of the graph.
        kwargs: keyword inputs, the same for all batches.

    Raises:
        EquivalenceError: if data hold no batch, or one of other shapes, or activations are NaN or inf.
    """
    batches, wanted = [*batches_of(data)], positional(args)
    for number, batch in enumerate(batches):
        if _kinds(batch) != _kinds(wanted):
            raise EquivalenceError(
                f"batch {number} of data has inputs {describe_inputs(batch, {})}: activations are looked up in the graph of "
                f"{describe_inputs(wanted, {})}, so that every batch must have these shapes. "
                + ("Leave out labels: [x for x, _ in data]." if len(batch) > len(wanted) else "Give a batch as args too.")
            )
    points = moves.group.points
    assert points is not None
    found = Activations(both[0], moves, points, batches, kwargs)
    found.theirs = found._measured(both[1])
    return found


def _kinds(inputs: tuple) -> list[Any]:
    """Shapes and dtypes of tensors, and all other inputs."""
    return [(part.shape, part.dtype) if isinstance(part, Tensor) else part for part in pytree.tree_leaves(inputs)]
