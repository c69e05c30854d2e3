"""Entries written to, or added at, places that an index names: whatever may land at one place must scale alike."""

from equinorm.discovery.labels import Label
from equinorm.discovery.rules.registry import Call, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES


@rule("index_add index_copy index_reduce index_fill scatter scatter_add scatter_reduce")
def placed(trace: Trace, call: Call) -> Label:
    """Entries to places along `dim`, in place of what is there or joined with it; zeros fit any scale."""
    source = call.get("source", call.get("src", call.get("value")))
    here = trace.label(source)
    if here.is_zero:
        return trace.label(call.input)
    rank = len(call.shape)
    axes = [call.dim % rank] if rank else []
    sizes = [here.shape, trace.label(call.index).shape]
    fits = all(
        len(shape) in (0, 1) or (len(shape) == rank and all(shape[i] == call.shape[i] for i in range(rank) if i not in axes))
        for shape in sizes
    )
    if not fits or call.get("reduce") in ("prod", "multiply") or isinstance(call.get("alpha"), VALUES):
        detail = "" if fits else "a part of its axes other than the indexed one"
        return _all_pinned(trace, call, detail)
    there = trace.merge(call.input, axes)
    here = trace.merge(here, axes) if len(here.shape) == rank else trace.merge(here, range(len(here.shape)))
    return trace.add(there, here.reshape((1,) * rank) if len(here.shape) < rank else here).expand(call.shape)


@rule("index_put _unsafe_index_put")
def assigned(trace: Trace, call: Call) -> Label:
    """x[…, index, …] = values: all axes up to the last that is indexed count as one; zeros fit any scale."""
    values = trace.label(call.values)
    if values.is_zero:
        return trace.label(call.input)
    rank = len(call.shape)
    # A mask covers as many axes as it has, an index one; which of both it is does not show: at most so many are covered.
    indexed = [place + 1 for place, index in enumerate(call.indices) if index is not None]
    before = call.indices[: max(indexed, default=0)]
    covered = sum(1 if index is None else max(1, len(trace.label(index).shape)) for index in before)
    tail = max(0, rank - covered)
    lead = max(0, len(values.shape) - tail)
    there, here = trace.merge(call.input, range(rank - tail)), trace.merge(values, range(lead))
    return trace.add(there, here.reshape(here.shape[lead:])).expand(call.shape)


@rule("masked_scatter put")
def scattered(trace: Trace, call: Call) -> Label:
    """Where a mask or an index into all entries says so, entries of another tensor, instead of what is there or added to it."""
    there, here = (trace.merge(value, range(len(trace.label(value).shape))) for value in (call.input, call.source))
    return trace.add(there, here.reshape(())).expand(call.shape)


@rule("take")
def taken(trace: Trace, call: Call) -> Label:
    """Entries of the flattened input."""
    label = trace.label(call.input)
    return trace.merge(label, range(len(label.shape))).reshape(()).expand(call.shape)


@rule("diff")
def differences(trace: Trace, call: Call) -> Label:
    """Differences of neighbours along `dim`."""
    ends = [value for value in (call.get("prepend"), call.get("append")) if value is not None]
    label = trace.merge(call.input, [call.dim])
    for end in ends:
        label = trace.add(label, trace.merge(end, [call.dim]))
    return label.expand(call.shape)


@rule("cdist _cdist_forward")
def distances(trace: Trace, call: Call) -> Label:
    """Norms of the differences of all rows, up to the rounding of matrix products that may compute them; "norm" 0 counts."""
    label = trace.add(trace.merge(call.x1, [-2, -1]), trace.merge(call.x2, [-2, -1]))
    return label.power(0 if call.p == 0 else 1).expand(call.shape)


@rule("dist")
def distance(trace: Trace, call: Call) -> Label:
    """The norm of a difference; the "norm" of order 0 counts."""
    label = trace.add(call.input, call.other)
    return trace.merge(label, range(len(label.shape))).power(0 if call.p == 0 else 1).reshape(())


@rule("pdist _pdist_forward")
def pairwise_distances(trace: Trace, call: Call) -> Label:
    """Norms of the differences of all pairs of rows; "norm" 0 counts."""
    return trace.merge(call.input, [0, 1]).power(0 if call.p == 0 else 1).reshape((1,)).expand(call.shape)


@rule("pairwise_distance")
def row_distances(trace: Trace, call: Call) -> Label:
    """Norms of the differences of rows, of which each entry is a sum with eps."""
    label = trace.add(trace.add(call.x1, call.x2), call.eps)
    merged = trace.merge(label, [-1]).power(0 if call.p == 0 else 1)
    return (merged if call.keepdim else merged.reshape(merged.shape[:-1])).expand(call.shape)


def _all_pinned(trace: Trace, call: Call, detail: str) -> Label:
    for value in call.arguments.values():
        if isinstance(value, VALUES):
            trace.pin(value, detail)
    return Label(call.shape)
