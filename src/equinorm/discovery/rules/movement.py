"""Operations that only move entries, or fill with constants: the same operation, run on the ids."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from equinorm.discovery.classes import PINNED, ZERO
from equinorm.discovery.labels import Label, move
from equinorm.discovery.rules.registry import Call, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, Chosen, Constant, Source, Value, View

_RESHAPES = ("view", "reshape", "flatten", "unflatten", "ravel", "_unsafe_view", "view_copy", "squeeze", "unsqueeze")


@rule(
    "view reshape permute transpose t numpy_T mT unsqueeze squeeze expand flatten unflatten "
    "split split_with_sizes chunk tensor_split hsplit vsplit dsplit unbind select slice narrow "
    "cat concat concatenate stack hstack vstack dstack column_stack atleast_1d atleast_2d atleast_3d "
    "roll flip fliplr flipud rot90 repeat tile movedim moveaxis swapaxes swapdims "
    "pixel_shuffle pixel_unshuffle channel_shuffle unfold im2col diagonal diag_embed diag tril triu "
    "slice_scatter select_scatter diagonal_scatter meshgrid view_copy _unsafe_view ravel unsafe_chunk unsafe_split "
    "broadcast_to broadcast_tensors block_diag cartesian_prod diagflat linalg_diagonal fft_fftshift fft_ifftshift "
    "narrow_copy unfold_copy mH matrix_H adjoint"
)
def moved(trace: Trace, call: Call) -> Label | View | list[Label]:
    """Data movement. Zeros that it brings in come out as the constant zero, whose id is 0."""
    if call.operator._overloadname == "dtype":  # view(dtype) reinterprets bits
        trace.pin(call.input, "reinterprets the bits of its input")
        return Label(call.shape)
    if isinstance(call.get("start", call.get("tensor_indices_or_sections")), VALUES):
        trace.pin(call.input, "a tensor says where to cut")
        return Label(call.shape) if isinstance(call.result, Tensor) else [Label(tuple(part.shape)) for part in call.result]
    (name, parameter), *others = call.arguments.items()
    is_alone = not any(_holds_tensor(value) for _, value in others)
    if is_alone and isinstance(parameter, (Source, View)) and trace.is_unlabelled(parameter):
        view = View.of(parameter, lambda given: call.operator(**{name: given, **dict(others)}))
        if view is not None:
            return view
    if call.operator_name in _RESHAPES:
        return trace.label(call.input).reshape(call.shape)
    labels: list[Label] = []

    def gather(value: Any) -> Any:
        if isinstance(value, VALUES):
            labels.append(trace.label(value))
            return len(labels) - 1
        if isinstance(value, (list, tuple)) and any(isinstance(item, VALUES) for item in value):
            return [gather(item) for item in value]
        return value

    places = {name: gather(value) for name, value in call.arguments.items()}
    tensors = {name for name, value in call.arguments.items() if _holds_tensor(value)}
    operator = _on_ids(call.operator)

    def rearranged(*ids: Tensor) -> Any:
        def fill(place: Any) -> Any:
            return [ids[i] for i in place] if isinstance(place, list) else ids[place]

        return operator(**{name: fill(place) if name in tensors else place for name, place in places.items()})

    return move(rearranged, labels)


@rule("repeat_interleave")
def repeated(trace: Trace, call: Call) -> Label | list[Label]:
    """Each entry a fixed number of times; numbers that a tensor holds are unknown."""
    if not isinstance(call.get("repeats"), int):
        for value in (call.input, call.get("repeats")):
            if isinstance(value, VALUES):
                trace.pin(value, "repeats entries as often as a tensor says")
        return Label(call.shape)
    return move(lambda ids: ids.repeat_interleave(call.repeats, call.dim), [trace.label(call.input)])


@rule("view_as reshape_as expand_as")
def shaped_as(trace: Trace, call: Call) -> Label | list[Label]:
    """Movement to the shape of another tensor, whose entries do not matter."""
    name = call.operator_name.removesuffix("_as")
    if name in ("view", "reshape"):
        return trace.label(call.input).reshape(call.shape)
    return move(lambda ids: ids.expand(call.shape), [trace.label(call.input)])


@rule("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d")
def padded(trace: Trace, call: Call) -> Label | list[Label]:
    """Padding by reflection, replication or a constant: 0 and ±inf fit any scale, other constants are pinned."""
    mode, value = call.get("mode", "constant"), call.get("value") or 0
    reflects = "reflection" in call.operator_name or mode != "constant"
    fill = ZERO if value in (0, float("inf"), float("-inf")) else PINNED
    amounts = call.get("pad") or call.get("padding")

    def padded_ids(ids: Tensor) -> Tensor:
        if not reflects:
            return torch.constant_pad_nd(ids, amounts, fill)
        return torch.nn.functional.pad(ids.double(), amounts, "reflect" if mode == "constant" else mode).long()

    return move(padded_ids, [trace.label(call.input)])


@rule("index")
def indexed(trace: Trace, call: Call) -> Label | Chosen | list[Label]:
    """Entries at indices of one axis or more: movement if these are constants; otherwise any entry there may be read."""
    axes = [axis for axis, index in enumerate(call.indices) if index is not None]
    if len(axes) == 1 and (rows := _rows(trace, call.input, axes[0], call.indices[axes[0]])) is not None:
        return rows
    return _entries(trace, call, call.indices, axes, torch.ops.aten.index)


@rule("index_select")
def rows_selected(trace: Trace, call: Call) -> Label | Chosen | list[Label]:
    """Rows in the order of an index; if data choose them, each choice scales as its row for as long as choices stay apart."""
    rows = _rows(trace, call.input, call.dim % max(len(call.input.shape), 1), call.index)
    if rows is not None:
        return rows
    return _entries(trace, call, [call.index], [call.dim], lambda ids, index: ids.index_select(call.dim, index[0]))


@rule("gather")
def gathered(trace: Trace, call: Call) -> Label | list[Label]:
    """An entry along `dim` for each place: movement if the index is a constant; otherwise any entry there may be read."""
    return _entries(trace, call, [call.index], [call.dim], lambda ids, index: ids.gather(call.dim, index[0]))


@rule("take_along_dim")
def taken(trace: Trace, call: Call) -> Label | list[Label]:
    """As `gather`; without `dim`, of all entries in a row."""
    axes = range(len(call.input.shape)) if call.dim is None else [call.dim]
    return _entries(trace, call, [call.indices], axes, lambda ids, index: ids.take_along_dim(index[0], call.dim))


@rule("embedding")
def embedded(trace: Trace, call: Call) -> Label | list[Label]:
    """Rows of a table: any row may be read, so that all scale alike."""
    label = trace.merge(call.weight, [0]).expand(call.weight.shape)
    index = torch.zeros(call.indices.shape, dtype=torch.long)
    return move(lambda ids: ids[index], [label])


def _entries(
    trace: Trace, call: Call, indices: Sequence[Value | None], axes: Sequence[int], read: Callable[[Tensor, list[Any]], Tensor]
) -> Label | list[Label]:
    """What `read` makes of ids and indices; where these are no constants, of ids that are alike along the axes."""
    if all(index is None or (isinstance(index, Constant) and not index.value.is_meta) for index in indices):
        label = trace.label(call.input)
        values = [index.value.cpu() if isinstance(index, Constant) else None for index in indices]
    elif any(isinstance(index, Constant) and index.value.dtype == torch.bool for index in indices):
        trace.pin(call.input, "mixes a mask with indices that depend on data")
        return Label(call.shape)
    else:
        label = trace.merge(call.input, axes).expand(call.input.shape)
        values = [None if index is None else torch.zeros(index.shape, dtype=torch.long) for index in indices]
    return move(lambda ids: read(ids, values), [label])


def _rows(trace: Trace, table: Value, axis: int, index: Value) -> Chosen | None:
    """Rows that a list of indices chooses, if data choose them and they scale apart."""
    if not isinstance(index, Label) or isinstance(table, (Constant, Chosen)):
        return None
    if len(index.shape) != 1 or not table.shape or table.shape[axis] < 2:
        return None
    if not trace.is_unlabelled(table):
        table = trace.label(table)
        if not any(factor.varies([axis]) for factor in table.factors):
            return None
    return Chosen(table, axis, index, index.shape[0])


def _on_ids(operator: Any) -> Any:
    """The form of an operator to run on ids: out of place, and free to copy, since the strides of ids are their own."""
    name = operator.overloadpacket.__name__
    if operator._schema.is_mutable:
        return getattr(getattr(torch.ops.aten, name.removesuffix("_")), operator._overloadname)
    return operator


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, VALUES) or (isinstance(value, (list, tuple)) and any(isinstance(v, VALUES) for v in value))
