"""Operations that only move entries, or fill with constants: the same operation, run on the ids."""

from typing import Any

import torch
from torch import Tensor

from equinorm.discovery.classes import PINNED, ZERO
from equinorm.discovery.labels import Label, move
from equinorm.discovery.rules.registry import Call, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, Chosen, Constant, Source, View

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
    if isinstance(call.input, (Source, View)) and trace.is_unlabelled(call.input):
        (name, parameter), *others = call.arguments.items()
        view = View.of(parameter, lambda given: call.operator(**{name: given, **dict(others)}))
        if view is not None:
            return view
    if call.operator.overloadpacket.__name__ in _RESHAPES:
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

    def run(*ids: Tensor) -> Any:
        def fill(place: Any) -> Any:
            return [ids[i] for i in place] if isinstance(place, list) else ids[place]

        return operator(**{name: fill(place) if name in tensors else place for name, place in places.items()})

    return move(run, labels)


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
    name = call.operator.overloadpacket.__name__.removesuffix("_as")
    if name in ("view", "reshape"):
        return trace.label(call.input).reshape(call.shape)
    return move(lambda ids: ids.expand(call.shape), [trace.label(call.input)])


@rule("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d")
def padded(trace: Trace, call: Call) -> Label | list[Label]:
    """Padding by reflection, replication or a constant: 0 and ±inf fit any scale, other constants are pinned."""
    mode, value = call.get("mode", "constant"), call.get("value") or 0
    reflects = "reflection" in call.operator.overloadpacket.__name__ or mode != "constant"
    fill = ZERO if value in (0, float("inf"), float("-inf")) else PINNED
    amounts = call.get("pad") or call.get("padding")

    def run(ids: Tensor) -> Tensor:
        if not reflects:
            return torch.constant_pad_nd(ids, amounts, fill)
        return torch.nn.functional.pad(ids.double(), amounts, "reflect" if mode == "constant" else mode).long()

    return move(run, [trace.label(call.input)])


@rule("index index_select gather take_along_dim embedding")
def indexed(trace: Trace, call: Call) -> Label | Chosen | list[Label]:
    """Indexing: movement if the indices are constants; otherwise any entry along the indexed axes may be read.

    Rows that one index chooses keep labels of their own for as long as they stay apart.
    """
    name = call.operator.overloadpacket.__name__
    rows = _rows(trace, call, name)
    if rows is not None:
        return rows
    if name == "embedding":
        table, dim, indices = call.weight, 0, [call.indices]
        if trace.is_unlabelled(table):
            trace.assign(table, trace.fresh(table.shape, [1]))
    else:
        table, dim = call.input, call.get("dim")
        indices = list(call.indices) if name == "index" else [call.get("index", call.get("indices"))]
    label = trace.label(table)
    known = all(index is None or (isinstance(index, Constant) and not index.value.is_meta) for index in indices)
    if known and name != "embedding":
        values = [None if index is None else index.value.cpu() for index in indices]
    elif any(isinstance(index, Constant) and index.value.dtype == torch.bool for index in indices):
        trace.pin(label, "mixes a mask with indices that depend on data")
        return Label(call.shape)
    else:
        axes = [dim] if name != "index" else [axis for axis, index in enumerate(indices) if index is not None]
        axes = list(range(len(label.shape))) if axes == [None] else axes
        label = trace.merge(label, axes).expand(label.shape)
        values = [None if index is None else torch.zeros(trace.label(index).shape, dtype=torch.long) for index in indices]
    if name == "index":
        return move(lambda ids: torch.ops.aten.index(ids, values), [label])
    if name == "embedding":
        return move(lambda ids: ids[values[0]], [label])
    if name == "take_along_dim":
        return move(lambda ids: ids.take_along_dim(values[0], dim), [label])
    return move(lambda ids: call.operator(ids, dim, values[0]), [label])


def _rows(trace: Trace, call: Call, name: str) -> Chosen | None:
    """Rows that a list of indices chooses, if they scale apart."""
    if name not in ("index", "index_select"):
        return None
    table, indices = call.input, call.get("indices", [call.get("index")])
    places = [axis for axis, index in enumerate(indices) if index is not None]
    if len(places) != 1 or not isinstance(index := indices[places[0]], Label) or isinstance(table, (Constant, Chosen)):
        return None
    axis = places[0] if name == "index" else call.dim % len(table.shape)
    if len(index.shape) != 1 or table.shape[axis] < 2:
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
