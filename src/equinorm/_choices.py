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

from equinorm._labels import Label, compact
from equinorm._trace import Trace
from equinorm._values import VALUES, Chosen, Constant, Value
from equinorm.rules import TABLE, Call, key

_EACH_ENTRY = """add sub mul div neg abs relu leaky_relu square sqrt reciprocal pow clamp clamp_min clamp_max maximum minimum
where masked_fill clone detach alias contiguous dropout to _to_copy"""
_BATCHED = "bmm matmul baddbmm"
_MOVED = """unsqueeze squeeze transpose permute t mT movedim swapaxes slice select narrow split split_with_sizes chunk
unbind"""


def follow(trace: Trace, call: Call) -> Any:
    """The result of an operation on chosen rows, choice by choice; None if they do not stay apart."""
    name = key(call.operator).removesuffix("_")
    arguments = {key: value for key, value in call.arguments.items() if isinstance(value, VALUES)}
    chosen = [value for value in arguments.values() if isinstance(value, Chosen)]
    if name not in TABLE or not chosen or any(value.index is not chosen[0].index for value in chosen):
        return None
    if name in ("_grouped_mm", "transformers::grouped_mm_fallback"):
        return TABLE[name](trace, call)
    if name in _MOVED.split():
        return _moved(trace, call, chosen[0], TABLE[name])
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
    found = TABLE[name](trace, replace(call, arguments={**call.arguments, **inner}, result=result))
    found = found if trace.is_unlabelled(found) else trace.label(found)
    return Chosen(found, axis, chosen[0].index, call.shape[axis])


def _steady(trace: Trace, value: Value, place: int) -> Value | None:
    """What a choice sees of an argument: its own rows, or what is the same at every entry; None if neither."""
    if isinstance(value, Chosen):
        return value.value
    if len(value.value.shape if isinstance(value, Constant) else value.shape) < -place:
        return value
    if trace.is_unlabelled(value):
        return None
    label = trace.label(value)
    axis = len(label.shape) + place
    return None if any(f.varies([axis]) for f in label.factors) else Label(_with(label.shape, axis, 1), label.factors)


def _moved(trace: Trace, call: Call, chosen: Chosen, rule: Any) -> Any:
    """Movement of other axes. A numbering of the choices says where their axis goes, and that nothing else happens to it."""
    shape = chosen.value.shape
    numbers = (
        torch.arange(chosen.options).reshape([-1 if axis == chosen.axis else 1 for axis in range(len(shape))]).expand(shape)
    )
    (name, _), *others = call.arguments.items()
    moved = call.operator(**{name: numbers, **dict(others)})
    axes = [_axis_of(part, chosen.options) for part in ([moved] if isinstance(moved, Tensor) else moved)]
    if None in axes:
        return None
    inner = rule(trace, replace(call, arguments={name: chosen.value, **dict(others)}, result=moved))
    parts = [
        replace(chosen, value=part, axis=axis)
        for part, axis in zip(inner if isinstance(inner, list) else [inner], axes, strict=True)
        if axis is not None
    ]
    return parts if isinstance(inner, list) else parts[0]


def _axis_of(numbers: Tensor, options: int) -> int | None:
    """The axis along which these are 0, 1, …, options − 1 at every entry."""
    for axis, size in enumerate(numbers.shape):
        if size == options and torch.equal(compact(numbers), _numbers(options, axis, numbers.dim())):
            return axis
    return None


def _numbers(options: int, axis: int, rank: int) -> Tensor:
    return torch.arange(options).reshape([-1 if other == axis else 1 for other in range(rank)])


def _with(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
