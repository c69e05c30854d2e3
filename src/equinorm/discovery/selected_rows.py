"""Rows of a table that data choose, as in mixtures of experts: one label for each choice, for as long as choices stay apart.

In table[index] with an index that depends on data, any entry may hold any row. Where a row meets only rows that the same
index chose (entry by entry, or in batched products), the laws are those of each row by itself, and `Chosen` keeps one label
for each. Everything else, such as a sum over entries, reads the label of a `Chosen`, which asks that all rows scale alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equinorm.discovery.labels import Label, compact, numbered
from equinorm.discovery.rules import SIGNS, TABLE, Call, key
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, Chosen, Value

_EACH_ENTRY = """add sub mul div neg abs relu leaky_relu square sqrt reciprocal pow clamp clamp_min clamp_max maximum minimum
where masked_fill clone detach alias contiguous dropout to _to_copy tanh sin cos erf sinh cosh"""
_BATCHED = "bmm matmul baddbmm"
_MOVED = """unsqueeze squeeze transpose permute t mT movedim swapaxes slice select narrow split split_with_sizes chunk
unbind"""


def follow(trace: Trace, call: Call) -> Any:
    """The result of an operation on chosen rows, choice by choice; None if they do not stay apart."""
    name, rules = key(call.operator).removesuffix("_"), SIGNS if trace.signs else TABLE
    arguments = {key: value for key, value in call.arguments.items() if isinstance(value, VALUES)}
    chosen = [value for value in arguments.values() if isinstance(value, Chosen)]
    if name not in rules or not chosen or any(_differ(value, chosen[0]) for value in chosen):
        return None
    if name in ("_grouped_mm", "transformers::grouped_mm_fallback.default"):
        return rules[name](trace, call)
    if name in _MOVED.split():
        return _moved(trace, call, chosen[0], rules[name])
    if not isinstance(call.result, Tensor) or name not in [*_EACH_ENTRY.split(), *_BATCHED.split()]:
        return None
    place = chosen[0].axis - len(chosen[0].shape)  # from the right, as shapes are broadcast
    if any(value.axis - len(value.shape) != place for value in chosen):
        return None
    if name in _BATCHED.split() and (place != -3 or any(len(value.shape) != 3 for value in chosen)):
        return None
    inner = {key: _steady(trace, value, place) for key, value in arguments.items()}
    if any(value is None for value in inner.values()):
        return None
    axis = len(call.shape) + place
    result = torch.empty(_with(call.shape, axis, chosen[0].options), dtype=call.result.dtype, device="meta")
    found = rules[name](trace, replace(call, arguments={**call.arguments, **inner}, result=result))
    found = found if trace.is_unlabelled(found) else trace.label(found)
    result = replace(chosen[0], value=found, axis=axis, length=call.shape[axis])
    return result if result.shape == call.shape else None


def _steady(trace: Trace, value: Value, place: int) -> Value | None:
    """What a choice sees of an argument: its own rows, or what is the same at every entry; None if neither."""
    if isinstance(value, Chosen):
        return value.value
    if len(value.shape) < -place:
        return value
    if trace.is_unlabelled(value):
        return None
    label = trace.label(value)
    axis = len(label.shape) + place
    return None if any(f.varies([axis]) for f in label.factors) else Label(_with(label.shape, axis, 1), label.factors)


def _differ(one: Chosen, other: Chosen) -> bool:
    return one.index is not other.index or one.by != other.by or one.options != other.options


def _moved(trace: Trace, call: Call, chosen: Chosen, rule: Any) -> Any:
    """Movement of other axes: numberings of the entries and of the choices must both come out whole, along one axis."""
    if chosen.length < 2:
        return None
    (name, _), *others = call.arguments.items()

    def axes(count: int) -> list[int | None]:
        shape = (*chosen.shape[: chosen.axis], count, *chosen.shape[chosen.axis + 1 :])
        moved = call.operator(**{name: numbered(count, chosen.axis, len(shape)).expand(shape), **dict(others)})
        return [_axis_of(part, count) for part in ([moved] if isinstance(moved, Tensor) else moved)]

    found = axes(chosen.length)
    if None in found:
        return None
    try:
        if axes(chosen.options) != found:
            return None
    except (RuntimeError, IndexError):  # sizes of the entries, not of the choices
        return None
    moved = call.operator(**{name: torch.empty(chosen.value.shape, device="meta"), **dict(others)})
    inner = rule(trace, replace(call, arguments={name: chosen.value, **dict(others)}, result=moved))
    inner = inner if isinstance(inner, list) else [inner]
    parts = [replace(chosen, value=part, axis=axis) for part, axis in zip(inner, found, strict=True) if axis is not None]
    results = [call.result] if isinstance(call.result, Tensor) else list(call.result)
    if [part.shape for part in parts] != [tuple(result.shape) for result in results]:
        return None
    return parts[0] if isinstance(call.result, Tensor) else parts


def _axis_of(numbers: Tensor, count: int) -> int | None:
    """The axis along which these are 0, 1, …, count − 1 at every entry."""
    for axis, size in enumerate(numbers.shape):
        if size == count and torch.equal(compact(numbers), numbered(count, axis, numbers.dim())):
            return axis
    return None


def _with(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
