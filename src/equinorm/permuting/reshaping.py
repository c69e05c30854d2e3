"""Other shapes of the same entries: which axes become which, and where a packed axis will be taken apart."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from equinorm._scaling import Reason
from equinorm.discovery.graph.nodes import is_static, operator_name
from equinorm.discovery.labels import axis_runs, numbered
from equinorm.permuting.atoms import Axis, cut, is_pinned, split_front

_MOST = 8
"""Most values that are packed into one axis."""

_RESHAPES = "view reshape flatten unflatten _unsafe_view"
_FOLLOWED = f"{_RESHAPES} permute transpose movedim unsqueeze squeeze contiguous clone to _to_copy alias detach"
_TAKEN = "select unbind split split_with_sizes chunk slice narrow"


def reshaped(axes: Sequence[Axis], sizes: Sequence[int], reason: Reason) -> list[Axis]:
    """Axes of the same entries in another shape."""
    found: list[Axis] = []
    for inputs, outputs in axis_runs([math.prod(f.size for f in axis) for axis in axes], sizes):
        rest: Axis = tuple(factor for place in inputs for factor in axes[place])
        if len(outputs) == 1:
            found.append(rest)
            continue
        for place in outputs:
            front, rest = split_front(rest, sizes[place], reason)
            found.append(front)
    return found


def unpacked(axes: Sequence[Axis], sizes: Sequence[int], node: fx.Node, reason: Reason) -> tuple[int, list[list[Axis]]] | None:
    """Axes of each part where the new shape has an axis that is taken apart later: its place, and the parts without it."""
    for inputs, outputs in axis_runs([math.prod(f.size for f in axis) for axis in axes], sizes):
        whole: Axis = tuple(factor for place in inputs for factor in axes[place])
        if len(outputs) < 2 or is_pinned([whole]):
            continue
        for place in outputs:
            if not 2 <= sizes[place] <= _MOST or not _is_taken_apart(node, place):
                continue
            lead = sizes[outputs[0] : place]
            front, rest = split_front(whole, math.prod(lead), reason)
            pieces = cut(rest, [math.prod(sizes[place + 1 : outputs[-1] + 1])] * sizes[place], reason)
            if pieces is not None:
                before = reshaped(axes[: inputs[0]], sizes[: outputs[0]], reason) + reshaped([front], lead, reason)
                after = reshaped(axes[inputs[-1] + 1 :], sizes[outputs[-1] + 1 :], reason)
                inner = sizes[place + 1 : outputs[-1] + 1]
                return place, [[*before, *reshaped([piece], inner, reason), *after] for piece in pieces]
    return None


def _is_taken_apart(node: fx.Node, place: int) -> bool:
    """Do all users read entries of one place along this axis only, once they have moved them?"""
    shape = list(node.meta["val"].shape)
    if not is_static(node.meta["val"]):
        return False
    places = numbered(shape[place], place, len(shape)).expand(shape)
    return bool(node.users) and all(_takes_apart(user, places) for user in node.users)


def _takes_apart(node: fx.Node, places: Tensor) -> bool:
    """Does this operation, or do those behind it, read entries of one place only?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = operator_name(node)
    if name not in (*_FOLLOWED.split(), *_TAKEN.split()) or len(node.all_input_nodes) != 1:
        return False
    if name in ("to", "_to_copy", "contiguous", "clone", "alias", "detach"):
        result = places
    elif name in _RESHAPES.split():
        result = places.reshape(node.meta["val"].shape)
    else:
        result = node.target(places, *node.args[1:], **node.kwargs)
    if name in _TAKEN.split():
        pieces = [result] if isinstance(result, Tensor) else result
        if all(piece.numel() and bool((piece == piece.flatten()[0]).all()) for piece in pieces):
            return True
        return isinstance(result, Tensor) and bool(node.users) and all(_takes_apart(user, result) for user in node.users)
    return bool(node.users) and all(_takes_apart(user, result) for user in node.users)
