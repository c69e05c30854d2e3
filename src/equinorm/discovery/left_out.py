"""Entries of a model's tensors that no operation of a graph reads: with a longer input, say, others are cut out of a table."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from equinorm._scaling import Reason
from equinorm.discovery.graph.aliasing import bind, subgraph
from equinorm.discovery.graph.export import Exported
from equinorm.discovery.rules import key
from equinorm.discovery.values import Source

LEFT_OUT = Reason("no operation", "inputs of this size leave these entries out, others may not")

_CARRIERS = "alias detach clone contiguous _to_copy to"
"""Operations that hand on every entry at its place."""


def left_out(graphs: Iterable[Exported]) -> dict[Source, list[Tensor]]:
    """For each tensor that graphs read in part, and each of its axes, a mask of places at which nothing is read."""
    read: dict[Source, list[Tensor]] = {}
    for exported in graphs:
        for node in exported.aliases.graph.graph.nodes:
            source = exported.inputs[node.name][0] if node.op == "placeholder" and node.users else None
            if isinstance(source, Source):
                masks = read.setdefault(source, [torch.zeros(size, dtype=torch.bool) for size in source.shape])
                _follow(node, range(len(masks)), dict(enumerate(map(torch.arange, source.shape))), masks)
    return {source: [~mask for mask in masks] for source, masks in read.items() if not all(map(torch.all, masks))}


def _follow(node: fx.Node, axes: Sequence[int], places: Mapping[int, Tensor], masks: Sequence[Tensor]) -> None:
    """Enter what is read of a part of a tensor.

    Args:
        node: the part.
        axes: of the tensor, as the part has them.
        places: along each axis of the tensor, where the part lies.
        masks: of what is read.
    """
    for user in node.users:
        body, given = subgraph(user)
        cut = _cut(user, node)
        if body is not None:
            inside = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
            for inner in (inner for inner, value in zip(inside, given, strict=True) if value is node):
                _follow(inner, axes, places, masks)
        elif cut is None:
            for axis, own in places.items():
                masks[axis][own] = True
        elif cut:
            dim, kept, stays = cut
            axis = axes[dim]
            left = [own for own in axes if stays or own != axis]
            _follow(user, left, {**places, axis: places[axis][kept]}, masks)
        else:
            _follow(user, axes, places, masks)


def _cut(user: fx.Node, node: fx.Node) -> tuple[int, slice, bool] | tuple[()] | None:
    """The axis that an operation cuts, what it keeps, and whether the axis stays; () if it keeps all; None if it computes."""
    if user.op != "call_function" or not isinstance(user.target, torch._ops.OpOverload):
        return None
    name, given = key(user.target), bind(user.target, user.args, user.kwargs)
    if name in _CARRIERS.split():
        return ()
    if user.all_input_nodes != [node]:  # data say where
        return None
    if name == "slice":
        return given["dim"], slice(given["start"], given["end"], given["step"]), True
    if name == "narrow":
        return given["dim"], slice(given["start"], given["start"] + given["length"]), True
    if name == "select":
        return given["dim"], slice(given["index"], given["index"] + 1 or None), False
    return None
