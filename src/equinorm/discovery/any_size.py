"""Operations on tensors of sizes that data decide, as of what a mask leaves: a law at one size that holds at every other.

x[mask] has as many rows as the mask has ones. Each such size is taken to be a prime (`Sizes`), and along an axis of such a size
all entries are asked to scale alike: then it does not matter how many there are. Along an axis that is cut at a place that data
decide, as by x[:n], all entries are asked to scale alike, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.fx.node import map_arg

from equinorm.discovery.graph.nodes import bind, is_static, is_unknown_number, mapped, operator_name, results_of
from equinorm.discovery.graph.sizes import Sizes
from equinorm.discovery.labels import Label
from equinorm.discovery.trace import Trace

OF_DATA = "of a size that data decide"

_ASK_FOR_SIZES = "sym_size sym_numel sym_stride sym_storage_offset"
"""Operations that read no entry of what they are given."""

_OF_SIZES = """view reshape view_copy _unsafe_view flatten unflatten expand broadcast_to repeat
new_zeros new_ones new_full new_empty zeros ones full"""
"""Operations whose numbers are sizes of what they return, or how often it repeats what they read."""

CUTS = "slice narrow select split_with_sizes split split_copy split_with_sizes_copy slice_copy narrow_copy unsafe_split"
"""Operations whose numbers say where an axis is cut."""

_MASKED = "index index_put index_put_ _unsafe_index_put"


def asks_for_size(node: fx.Node) -> bool:
    """Does a node return a size, and read no entry?"""
    return operator_name(node) in _ASK_FOR_SIZES.split()


def has_unknown_size(node: fx.Node) -> bool:
    """Do data decide a size, or a number, of what goes into an operation or comes out?"""
    return any(_is_unknown(part) for near in (node, *node.all_input_nodes) for part in results_of(near.meta.get("val")))


def cut(trace: Trace, node: fx.Node, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
    """What a cut makes at a place that data decide: any entry along that axis may be there; None if a node is no such cut.

    Args:
        trace: gathers that law.
        node: calls an operator.
        args: values of its positional arguments.
        kwargs: values of the others.
        result: its results, with numbers for sizes.
    """
    if operator_name(node) not in CUTS.split() or not is_static(result):
        return None
    if not any(is_unknown_number(near.meta.get("val")) for near in node.all_input_nodes):
        return None
    named = bind(node.target, args, kwargs)
    value, axis = named["self"], named["dim"] % len(named["self"].shape)
    if any(isinstance(size, SymInt) for size in value.shape):
        return None
    label = trace.merge(value, [axis])
    if operator_name(node) == "select":
        label = label.reshape([size for other, size in enumerate(label.shape) if other != axis])
    return [label.expand(part.shape) for part in result] if isinstance(result, list) else label.expand(result.shape)


def at_one_size(
    node: fx.Node, args: tuple, kwargs: dict[str, Any], result: Any, sizes: Sizes
) -> tuple[tuple, dict[str, Any]] | None:
    """Arguments of an operation with numbers for such sizes; None if it does not give at them what the exporter says.

    Args:
        node: calls an operator.
        args: values of its positional arguments. Masks in an index come back as the indices of what they leave.
        kwargs: values of the others.
        result: its results, with numbers for sizes.
        sizes: the number for each unknown.
    """
    name = operator_name(node)
    if not name or not is_static(result):
        return None
    if name not in _OF_SIZES.split() and any(is_unknown_number(near.meta.get("val")) for near in node.all_input_nodes):
        return None

    def shown(argument: fx.Node) -> Any:
        value = sizes.known(argument.meta.get("val"))
        if isinstance(value, Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return mapped(value, sizes.number)

    given: Any
    given, named = map_arg((node.args, node.kwargs), shown)  # pyright: ignore[reportGeneralTypeIssues]
    args, kwargs = mapped((args, kwargs), sizes.number)
    if name in _MASKED.split():
        count = _count(given[1], result) if name == "index" else _count([], given[2])
        index = torch.empty(count, dtype=torch.long, device="meta")
        given, args = _unmasked(given, given, index), _unmasked(given, args, Label((count,)))
    if "device" in named:
        named = {**named, "device": torch.device("meta")}
    try:
        with torch.no_grad():
            seen = node.target(*given, **named)  # pyright: ignore[reportCallIssue]
    except (RuntimeError, IndexError, ValueError, TypeError):  # these numbers fit no other size that meets them
        return None
    return (args, kwargs) if _shapes(seen) == _shapes(result) else None


def alike(trace: Trace, value: Any, result: Any) -> Any:
    """Labels whose entries scale alike along axes of sizes that data decide.

    Args:
        trace: gathers that law.
        value: what a rule says of each result.
        result: the results, as the exporter saw them.
    """
    if isinstance(value, list):
        return [alike(trace, one, part) for one, part in zip(value, result, strict=True)]
    if not isinstance(value, Label):
        return value
    return trace.merge(value, [axis for axis, size in enumerate(result.shape) if isinstance(size, SymInt)]).expand(value.shape)


def _is_unknown(value: Any) -> bool:
    return not is_static(value) if isinstance(value, Tensor) else is_unknown_number(value)


def _shapes(results: Any) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in results_of(results)]


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _count(indices: Sequence[Any], rows: Tensor) -> int:
    """How many entries a mask leaves: as many as there are rows in their place, behind axes without an index."""
    place = next((place for place, index in enumerate(indices) if index is not None), 0)
    return rows.shape[place] if rows.dim() > place else 1


def _unmasked(given: tuple, arguments: tuple, index: Any) -> tuple:
    """Arguments with an index for each axis that a mask covers."""
    indices = []
    for shown, value in zip(given[1], arguments[1], strict=True):
        indices += [index] * shown.dim() if _is_mask(shown) else [value]
    return (arguments[0], indices, *arguments[2:])
