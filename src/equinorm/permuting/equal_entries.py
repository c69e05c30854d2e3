"""Scores of which many may be equal, as zeros of ReLU are: the place of the largest then tells which of them came first."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from equinorm.discovery.graph.aliasing import bind, is_static
from equinorm.discovery.rules import key
from equinorm.permuting.atoms import Axis, atoms, size_of
from equinorm.permuting.values import Laid

_MANY_TO_ONE = """relu relu6 hardtanh hardsigmoid hardswish hardshrink softshrink threshold clamp clamp_min clamp_max round
floor ceil trunc sign sgn heaviside dropout expand broadcast_to expand_as repeat tile repeat_interleave"""

_MOVED = """view reshape flatten unflatten _unsafe_view unsqueeze squeeze permute transpose t clone contiguous detach alias
to _to_copy"""

_ONE_TO_ONE = f"""{_MOVED} select slice split split_with_sizes chunk unbind softmax log_softmax
_softmax _log_softmax sigmoid tanh exp log neg add sub mul div"""

_POSITIVE = "softmax _softmax sigmoid exp"

_OF_MASKS = "logical_not bitwise_not eq ne to _to_copy"
"""Operations on masks, entry by entry."""

_COPIED = f"{_MOVED} expand"

_CAME_FIRST = "tells which of equal entries came first"
_MASKED = "may choose among masked entries, which are equal"


def why_equal(chosen: fx.Node, values: Mapping[fx.Node, Any]) -> str | None:
    """Why several entries that an operation chooses from may be equal; None if only by accident.

    Args:
        chosen: a maximum, topk, sort.
        values: axes of everything before it.
    """
    node = chosen.all_input_nodes[0]
    given = bind(chosen.target, chosen.args, chosen.kwargs)
    is_largest = key(chosen.target) in ("max", "argmax", "topk") and given.get("largest", True)
    place = given.get("dim") if given.get("dim") is not None else -1
    along = {*atoms(values[node].axes[place])} if isinstance(place, int) and values[node].axes else set()
    while True:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point():
            return _CAME_FIRST
        if node.target is operator.getitem:
            node = node.all_input_nodes[0]
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        name = key(node.target).removesuffix("_")
        if name in _MANY_TO_ONE.split():
            return _CAME_FIRST
        masked = _masked(node, values)
        if masked is not None:
            node, mask, closed, fill = masked
            is_least = fill <= torch.finfo(node.meta["val"].dtype).min or (fill == 0 and _is_positive(node))
            if not (is_largest and is_least and _open(mask, closed, along, values) >= given.get("k", 1)):
                return _MASKED
            continue
        if name not in _ONE_TO_ONE.split() or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]


def _masked(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[fx.Node, fx.Node, bool, float] | None:
    """Of scores where a mask puts one number: the scores, the mask, its entry where it does so, and the number."""
    name = key(node.target).removesuffix("_")
    if name not in ("masked_fill", "where"):
        return None
    given = bind(node.target, node.args, node.kwargs)
    if name == "masked_fill":
        mask, closed, scores, fill = given["mask"], True, given["self"], _one_number(given["value"], values)
    else:
        mask, closed, scores, fill = given["condition"], False, given.get("self"), _one_number(given.get("other"), values)
        if fill is None:
            closed, scores, fill = True, given.get("other"), _one_number(given.get("self"), values)
    return None if fill is None or not isinstance(scores, fx.Node) else (scores, mask, closed, fill)


def _one_number(argument: Any, values: Mapping[fx.Node, Any]) -> float | None:
    """The number that an argument is everywhere."""
    if isinstance(argument, fx.Node):
        value = values[argument]
        number = value.number if isinstance(value, Laid) else None
        if number is None or not number.numel() or not bool((number == number.flatten()[0]).all()):
            return None
        return float(number.flatten()[0])
    return float(argument) if isinstance(argument, (bool, int, float)) else None


def _is_positive(node: fx.Node) -> bool:
    """Are scores more than zero?"""
    while isinstance(node.target, torch._ops.OpOverload) and key(node.target) in _MOVED.split():
        node = node.all_input_nodes[0]
    return isinstance(node.target, torch._ops.OpOverload) and key(node.target) in _POSITIVE.split()


def _open(mask: fx.Node, closed: bool, along: set[Any], values: Mapping[fx.Node, Any]) -> int:
    """Entries at least, in every row, that a mask leaves: known where an index of different places has written it."""
    axis = next((axis for axis in values[mask].axes if {*atoms(axis)} == along), None)
    operations: list[fx.Node] = []
    node = mask
    while isinstance(node.target, torch._ops.OpOverload) and key(node.target) in f"{_OF_MASKS} {_COPIED}".split():
        if len(node.all_input_nodes) != 1:
            return 0
        operations.insert(0, node)
        node = node.all_input_nodes[0]
    if axis is None or not isinstance(node.target, torch._ops.OpOverload) or key(node.target) not in ("scatter", "scatter_"):
        return 0
    given = bind(node.target, node.args, node.kwargs)
    numbers = [_one_number(given[name], values) if name in given else None for name in ("self", "value")]
    named: Axis = values[node].axes[given["dim"]]
    if (
        None in numbers
        or not is_static(node.meta["val"])
        or not {*atoms(named)} <= along
        or not _are_different(given["index"], given["dim"])
    ):
        return 0
    entries = torch.tensor(numbers, dtype=node.meta["val"].dtype)  # of places that are not named, and of those that are
    for operation in operations:
        if isinstance(operation.target, torch._ops.OpOverload) and key(operation.target) in _OF_MASKS.split():
            entries = operation.target(entries, *operation.args[1:], **operation.kwargs)
    count = given["index"].meta["val"].shape[given["dim"]]
    if not isinstance(count, int):
        return 0
    rest, chosen = (int(bool(entry) != closed) for entry in entries)
    return (chosen * count + rest * (size_of(named) - count)) * (size_of(axis) // size_of(named))


def _are_different(index: fx.Node, dim: int) -> bool:
    """Are the places of an index, along its axis, those that topk returned?"""
    source = index.args[0] if index.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.target, torch._ops.OpOverload):
        return False
    given = bind(source.target, source.args, source.kwargs)
    rank = index.meta["val"].dim()
    return key(source.target) == "topk" and given.get("dim", -1) % rank == dim % rank
