"""Scores of which many may be equal, as zeros of ReLU are: the place of the largest then tells which of them came first."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from equinorm.discovery.graph.nodes import bind, is_static, operator_name
from equinorm.permuting.atoms import Axis, atoms, size_of
from equinorm.permuting.trail import Atoms, Trail
from equinorm.permuting.values import Laid

MOVED = """view reshape flatten unflatten _unsafe_view unsqueeze squeeze permute transpose t numpy_T mT movedim moveaxis
swapaxes swapdims clone contiguous detach alias to _to_copy"""

_INCREASING = f"{MOVED} softmax log_softmax _softmax _log_softmax sigmoid exp log"

ENTRYWISE = f"""{_INCREASING} select slice split split_with_sizes chunk unbind cat stack maximum minimum neg tanh log1p
expm1 sqrt rsqrt reciprocal square abs silu gelu softplus elu selu celu erf mish log_sigmoid sin cos atan"""

_REDUCED = "sum mean amax amin max min topk sort logsumexp prod var std norm linalg_vector_norm"

PRODUCTS = """linear matmul mm bmm mv dot addmm addbmm baddbmm addmv einsum conv1d conv2d conv3d convolution cdist
_cdist_forward scaled_dot_product_attention"""

_NORMALIZED = "layer_norm native_layer_norm rms_norm batch_norm group_norm instance_norm"

_POSITIVE = "softmax _softmax sigmoid exp"

_OF_MASKS = "logical_not bitwise_not eq ne to _to_copy"
"""Operations on masks, entry by entry."""

_COPIED = f"{MOVED} expand"

CAME_FIRST = "tells which of equal entries came first"
_MASKED = "may choose among masked entries, which are equal"

DEEPEST = 200
"""Operations that are followed back from a choice."""


def why_equal(chosen: fx.Node, trail: Trail) -> str | None:
    """Why several entries that an operation chooses from may be equal; None if only by accident.

    Weights, what they are multiplied with, and what keeps different entries different: whatever else entries come from, they
    may be equal.

    Args:
        chosen: a maximum, topk, sort.
        trail: what was before it.
    """
    given = bind(chosen.target, chosen.args, chosen.kwargs)
    scores, along = trail.back(chosen.all_input_nodes[0]), chosen_along(chosen, trail)
    is_largest = operator_name(chosen) in ("max", "argmax", "topk") and bool(given.get("largest", True))
    return _Choice(trail, along, given.get("k", 1), is_largest).why(scores)


def chosen_along(chosen: fx.Node, trail: Trail) -> Atoms:
    """Parts of the axis along which an operation chooses."""
    given = bind(chosen.target, chosen.args, chosen.kwargs)
    place, axes = given.get("dim") if given.get("dim") is not None else -1, trail.axes(chosen.all_input_nodes[0])
    return frozenset(atoms(axes[place])) if isinstance(place, int) and axes else frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """What chooses: along which parts of axes, how many entries, and whether the largest."""

    trail: Trail
    along: Atoms
    count: int
    is_largest: bool

    def why(self, node: fx.Node, is_increasing: bool = True, is_masked: bool = False, depth: int = 0) -> str | None:
        """Why entries of a value may be equal.

        Args:
            node: the value.
            is_increasing: do larger entries stay larger until they are chosen from?
            is_masked: has a mask been seen on the way?
            depth: of operations between.
        """
        node, value = self.trail.back(node), node.meta.get("val")
        if depth > DEEPEST or not isinstance(value, Tensor) or not value.is_floating_point():
            return CAME_FIRST
        if node.op == "placeholder":
            return None if node.name in self.trail.parameters else CAME_FIRST
        if node.target is operator.getitem:
            node = self.trail.back(node.all_input_nodes[0])
        if not isinstance(node.target, torch._ops.OpOverload):
            return CAME_FIRST
        name = operator_name(node).removesuffix("_")
        given = bind(node.target, node.args, node.kwargs)
        if (found := masked(node, self.trail)) is not None:
            scores, mask, closed, fill = found
            is_least = fill <= torch.finfo(value.dtype).min or (fill == 0 and _is_positive(scores, self.trail))
            is_plain = self.is_largest and is_increasing and not is_masked
            if not (is_plain and is_least and _open(mask, closed, self.along, self.trail) >= self.count):
                return _MASKED
            return self.why(scores, is_increasing, True, depth + 1)
        read = _operands(node, given, name)
        if name in ("add", "sub", "rsub"):
            read = [operand for operand in read if self._varies(operand, value)]
            reasons = [self.why(operand, False, is_masked, depth + 1) for operand in _weights_first(read)]
            return CAME_FIRST if not reasons else None if None in reasons else reasons[0]
        if name in PRODUCTS.split():
            read = [operand for operand in read if self.trail.meets(operand, self.along)] or read
        elif not _is_one_to_one(name, given):
            return CAME_FIRST
        elif name == "div" and read[0] is given["self"] and self._varies(read[0], value):
            read = read[:1]  # which no divisor makes equal, as a norm that is bounded from below
        stays = is_increasing and name in _INCREASING.split()
        reasons = (self.why(operand, stays, is_masked, depth + 1) for operand in _weights_first(read))
        return next((reason for reason in reasons if reason is not None), None) if read else CAME_FIRST

    def _varies(self, node: fx.Node, result: Tensor) -> bool:
        """Does a summand have an entry of its own in each place of the axis?"""
        own = self.trail.atoms(node)
        return self.along <= own if self.along else node.meta["val"].shape == result.shape


def _operands(node: fx.Node, given: Mapping[str, Any], name: str) -> list[fx.Node]:
    """What decides whether entries of a result differ."""
    if name in _NORMALIZED.split():
        return [given["input"]]
    if name == "where":
        return [part for part in (given.get("self"), given.get("other")) if isinstance(part, fx.Node)]
    if name == "gather":
        return [given["self"]]
    return [part for part in node.all_input_nodes if isinstance(part.meta.get("val"), Tensor)]


def _weights_first(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return sorted(nodes, key=lambda node: node.op != "placeholder")


def _is_one_to_one(name: str, given: Mapping[str, Any]) -> bool:
    """Are results of different entries different?"""
    if name in ("mul", "div"):
        return given.get("rounding_mode") is None and given.get("other") != 0
    if name == "pow":
        return isinstance(given.get("exponent"), (int, float)) and given["exponent"] != 0
    if name == "where":
        return all(isinstance(given.get(part), fx.Node) for part in ("self", "other"))
    if name == "gather":
        return _are_different(given["index"], given["dim"])
    return name in f"{ENTRYWISE} {_REDUCED} {_NORMALIZED}".split()


def masked(node: fx.Node, trail: Trail) -> tuple[fx.Node, fx.Node, bool, float] | None:
    """Of scores where a mask puts one number: the scores, the mask, its entry where it does so, and the number."""
    name = operator_name(node).removesuffix("_")
    if name not in ("masked_fill", "where"):
        return None
    given = bind(node.target, node.args, node.kwargs)
    if name == "masked_fill":
        mask, closed, scores, fill = given["mask"], True, given["self"], _one_number(given["value"], trail)
    else:
        mask, closed, scores, fill = given["condition"], False, given.get("self"), _one_number(given.get("other"), trail)
        if fill is None:
            closed, scores, fill = True, given.get("other"), _one_number(given.get("self"), trail)
    return None if fill is None or not isinstance(scores, fx.Node) else (scores, mask, closed, fill)


def _one_number(argument: Any, trail: Trail) -> float | None:
    """The number that an argument is everywhere."""
    if isinstance(argument, fx.Node):
        value = trail.values.get(trail.back(argument))
        number = value.number if isinstance(value, Laid) else None
        if number is None or not number.numel() or not bool((number == number.flatten()[0]).all()):
            return None
        return float(number.flatten()[0])
    return float(argument) if isinstance(argument, (bool, int, float)) else None


def _is_positive(node: fx.Node, trail: Trail) -> bool:
    """Are scores more than zero?"""
    node = trail.back(node)
    while operator_name(node) in MOVED.split():
        node = trail.back(node.all_input_nodes[0])
    return operator_name(node) in _POSITIVE.split()


def _open(mask: fx.Node, closed: bool, along: Atoms, trail: Trail) -> int:
    """Entries at least, in every row, that a mask leaves: known where an index of different places has written it."""
    node = trail.back(mask)
    axis = next((axis for axis in trail.axes(node) if {*atoms(axis)} == along), None)
    operations: list[fx.Node] = []
    while operator_name(node) in f"{_OF_MASKS} {_COPIED}".split():
        if len(node.all_input_nodes) != 1:
            return 0
        operations.insert(0, node)
        node = trail.back(node.all_input_nodes[0])
    if axis is None or operator_name(node) not in ("scatter", "scatter_"):
        return 0
    given = bind(node.target, node.args, node.kwargs)
    numbers = [_one_number(given[name], trail) if name in given else None for name in ("self", "value")]
    named: Axis = trail.axes(node)[given["dim"]] if trail.axes(node) else ()
    if (
        None in numbers
        or not is_static(node.meta["val"])
        or not {*atoms(named)} <= along
        or not _are_different(given["index"], given["dim"])
    ):
        return 0
    entries = torch.tensor(numbers, dtype=node.meta["val"].dtype)  # of places that are not named, and of those that are
    for operation in operations:
        if isinstance(operation.target, torch._ops.OpOverload) and operator_name(operation) in _OF_MASKS.split():
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
    return operator_name(source) == "topk" and given.get("dim", -1) % rank == dim % rank
