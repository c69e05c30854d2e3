"""Entries of a model's tensors that no operation of a graph reads: with a longer input, say, others are cut out of a table."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from equinorm._scaling import Reason
from equinorm.discovery.graph.aliasing import subgraph
from equinorm.discovery.graph.export import Exported
from equinorm.discovery.graph.nodes import bind
from equinorm.discovery.rules import key
from equinorm.discovery.values import Source

LEFT_OUT = Reason("no operation", "inputs of this size leave these entries out, others may not")

_ENTRYWISE = "alias detach clone contiguous _to_copy to dropout relu neg mul add sub div"
"""Operations that, of one tensor, hand on something of every entry at its place."""

_PARTS = "split split_with_sizes chunk unbind"
"""Operations that return parts along an axis."""


def left_out(graphs: Iterable[Exported]) -> dict[Source, list[Tensor]]:
    """For each tensor that graphs read in part, and each of its axes, a mask of places at which nothing is read."""
    read: dict[Source, list[Tensor]] = {}
    for exported in graphs:
        for node in exported.aliases.graph.graph.nodes:
            source = exported.inputs[node.name][0] if node.op == "placeholder" and node.users else None
            if isinstance(source, Source):
                masks = read.setdefault(source, [torch.zeros(size, dtype=torch.bool) for size in source.shape])
                _follow(node, _Part([*range(len(masks))], dict(enumerate(map(torch.arange, source.shape)))), masks)
    return {source: [~mask for mask in masks] for source, masks in read.items() if not all(map(torch.all, masks))}


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a tensor.

    Attributes:
        axes: of the tensor, as the part has them; None for an axis that it has not.
        places: along each axis of the tensor, where the part lies.
    """

    axes: Sequence[int | None]
    places: Mapping[int, Tensor]

    def cut(self, dim: int, kept: slice, *, stays: bool = True) -> "_Part":
        """What is left of it along one axis; without the axis, if that goes."""
        dim %= len(self.axes)
        axis = self.axes[dim]
        axes = [*self.axes] if stays else [*self.axes[:dim], *self.axes[dim + 1 :]]
        return _Part(axes, self.places if axis is None else {**self.places, axis: self.places[axis][kept]})


def _follow(node: fx.Node, part: _Part, masks: Sequence[Tensor], callers: tuple[fx.Node, ...] = ()) -> None:
    """Enter in masks what is read of a part of a tensor, in the graph of a node that these have called, the last one it."""
    for user in node.users:
        body, given = subgraph(user)
        if body is not None:
            inside = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
            for inner in (inner for inner, value in zip(inside, given, strict=True) if value is node):
                _follow(inner, part, masks, (*callers, user))
        elif user.op == "output" and callers:
            for inner in _returned(node, user, callers[-1]):
                _follow(inner, part, masks, callers[:-1])
        elif (parts := _parts(user, node, part)) is not None:
            for inner, own in parts:
                _follow(inner, own, masks, callers)
        else:
            for axis, own in part.places.items():
                masks[axis][own] = True


def _returned(node: fx.Node, output: fx.Node, caller: fx.Node) -> list[fx.Node]:
    """What a value of a subgraph is outside of it."""
    places = [place for place, value in enumerate(output.args[0]) if value is node]  # pyright: ignore[reportArgumentType]
    return [user for user in caller.users if user.target is operator.getitem and user.args[1] in places]


def _parts(user: fx.Node, node: fx.Node, part: _Part) -> list[tuple[fx.Node, _Part]] | None:
    """What an operation makes of a part, with the values that it is; None where it may read all of it."""
    if user.op != "call_function" or not isinstance(user.target, torch._ops.OpOverload) or user.all_input_nodes != [node]:
        return None
    name, given = key(user.target), bind(user.target, user.args, user.kwargs)
    if name in _PARTS.split():
        results = [inner for inner in user.users if inner.target is operator.getitem]
        return [(inner, _result(name, given, part, inner.args[1])) for inner in results] if [*user.users] == results else None
    found = _moved(name, given, part)
    return None if found is None else [(user, found)]


def _result(name: str, given: Mapping[str, Any], part: _Part, number: Any) -> _Part:
    """One of the parts that an operation returns."""
    if name == "unbind":
        return part.cut(given["dim"], slice(number, number + 1), stays=False)
    if name in ("split", "chunk"):
        axis = part.axes[given["dim"]]
        size = given["split_size"] if name == "split" else 1 if axis is None else -(-len(part.places[axis]) // given["chunks"])
        return part.cut(given["dim"], slice(number * size, (number + 1) * size))
    start = sum(given["split_sizes"][:number])
    return part.cut(given["dim"], slice(start, start + given["split_sizes"][number]))


def _moved(name: str, given: Mapping[str, Any], part: _Part) -> _Part | None:
    """A part after an operation that cuts it, or turns its axes."""
    axes, dim = [*part.axes], given.get("dim")
    if name in _ENTRYWISE.split():
        return part
    if name == "slice":
        return part.cut(given["dim"], slice(given["start"], given["end"], given["step"]))
    if name == "narrow":
        return part.cut(given["dim"], slice(given["start"], given["start"] + given["length"]))
    if name == "select":
        return part.cut(given["dim"], slice(given["index"], given["index"] + 1 or None), stays=False)
    if name == "unsqueeze":
        axes.insert(given["dim"] % (len(axes) + 1), None)
    elif name == "squeeze" and isinstance(dim, int):
        axis = axes[dim]
        return part if axis is not None and len(part.places[axis]) > 1 else part.cut(dim, slice(None), stays=False)
    elif name == "transpose":
        one, other = given["dim0"], given["dim1"]
        axes[one], axes[other] = axes[other], axes[one]
    elif name == "t":
        axes.reverse()
    elif name == "expand":
        new = len(given["size"]) - len(axes)
        axes = [None] * new + [None if axis is None or len(part.places[axis]) == 1 else axis for axis in axes]
    elif name == "permute":
        axes = [axes[place] for place in given["dims"]]
    else:
        return None
    return replace(part, axes=axes)
