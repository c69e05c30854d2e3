"""Entries that only move: axes are reordered, merged, split, cut and joined."""

from typing import Any

from equinorm.discovery.labels import axis_runs
from equinorm.permuting.atoms import Axis, Sum, cut, size_of, split_front
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.registry import Call, law
from equinorm.permuting.reshaping import reshaped
from equinorm.permuting.values import Laid, Stacked

_Columns = list[tuple[Axis, ...] | None]
"""Each axis in every part of a stack; None for the axis along which it is stacked."""


def _columns(value: Laid | Stacked) -> _Columns:
    if isinstance(value, Laid):
        return [(axis,) for axis in value.axes]
    columns: _Columns = list(zip(*(part.axes for part in value.parts), strict=True))
    return [*columns[: value.dim], None, *columns[value.dim :]]


def _of_columns(columns: _Columns) -> Laid | Stacked:
    kept = [column for column in columns if column is not None]
    if None not in columns:
        return Laid(tuple(column[0] for column in kept))
    return Stacked(columns.index(None), tuple(Laid(axes) for axes in zip(*kept, strict=True)))


@law("permute transpose t numpy_T mT movedim moveaxis swapaxes swapdims unsqueeze squeeze", on_stacks=True)
def reordered(book: LawBook, call: Call) -> Laid | Stacked:
    """Axes in another order, and axes of size 1 that come and go."""
    columns, shape = _columns(call.input), call.input.shape
    name, rank = call.operator_name.removesuffix("_"), len(shape)
    if name == "permute":
        columns = [columns[place] for place in call.dims]
    elif name in ("transpose", "swapaxes", "swapdims"):
        first, second = (place % rank for place in list(call.arguments.values())[1:3]) if rank else (0, 0)
        if rank:
            columns[first], columns[second] = columns[second], columns[first]
    elif name in ("t", "numpy_T"):
        columns = columns[::-1]
    elif name == "mT":
        columns[-2], columns[-1] = columns[-1], columns[-2]
    elif name == "unsqueeze":
        copies = len(call.input.parts) if isinstance(call.input, Stacked) else 1
        columns.insert(call.dim % (rank + 1), ((),) * copies)
    elif name == "squeeze":
        given = call.get("dim")
        places = range(rank) if given is None else [given] if isinstance(given, int) else given
        dropped = {place % rank for place in places if shape[place % rank] == 1} if rank else set()
        columns = [column for place, column in enumerate(columns) if place not in dropped]
    else:
        sources, targets = list(call.arguments.values())[1:3]
        sources, targets = ([part] if isinstance(part, int) else part for part in (sources, targets))
        moving = dict(sorted((to % rank, of % rank) for of, to in zip(sources, targets, strict=True)))
        rest = iter([place for place in range(rank) if place not in moving.values()])
        columns = [columns[moving[place] if place in moving else next(rest)] for place in range(rank)]
    return _of_columns(columns)


@law("view reshape flatten unflatten _unsafe_view ravel view_copy view_as reshape_as", on_stacks=True)
def other_shape(book: LawBook, call: Call) -> Laid | Stacked:
    """The same entries in another shape."""
    if call.operator._overloadname == "dtype":
        book.pin(call.input, "reinterprets the bits of its input")
        return book.all_fixed(call.shape)
    reason = book.because("looks at an axis in parts that do not fit")
    if isinstance(call.input, Stacked):
        for before, after in axis_runs(call.input.shape, call.shape):
            if list(before) == [call.input.dim] and len(after) == 1:
                sizes = [size for place, size in enumerate(call.shape) if place != after[0]]
                return Stacked(after[0], tuple(Laid(tuple(reshaped(p.axes, sizes, reason))) for p in call.input.parts))
    return Laid(tuple(reshaped(book.whole(call.input).axes, call.shape, reason)))


@law("expand broadcast_to expand_as")
def expanded(book: LawBook, call: Call) -> Laid:
    """New axes along which nothing varies."""
    given = call.input.axes
    lead = len(call.shape) - len(given)
    axes = [() if place < lead else given[place - lead] for place in range(len(call.shape))]
    return Laid(tuple(axis if size_of(axis) == size else book.free(size) for axis, size in zip(axes, call.shape, strict=True)))


@law("repeat tile")
def repeated(book: LawBook, call: Call) -> Laid:
    """Copies one after the other: an axis of n becomes (copies, n)."""
    given = ((),) * (len(call.shape) - len(call.input.axes)) + call.input.axes
    return Laid(tuple((*book.free(size // size_of(axis)), *axis) for axis, size in zip(given, call.shape, strict=True)))


@law("repeat_interleave")
def repeated_each(book: LawBook, call: Call) -> Laid:
    """Copies of each entry: an axis of n becomes (n, copies)."""
    if not isinstance(call.get("repeats"), int) or call.get("dim") is None:
        book.pin(call.arguments, "repeats entries as often as a tensor says")
        return book.all_fixed(call.shape)
    return call.input.with_axis(call.dim, (*call.input.axes[call.dim], *book.free(call.repeats)))


@law("cat")
def joined(book: LawBook, call: Call) -> Laid:
    """Axes one after the other; the others are permuted alike."""
    values = [value for value in call.tensors if 0 not in value.shape]
    place = call.dim % len(call.shape)
    others = Laid(book.join(*(value.with_axis(place, ()) for value in values)))
    axis = (Sum(tuple(value.axes[place] for value in values)),) if len(values) > 1 else values[0].axes[place]
    return others.with_axis(place, axis)


@law("stack")
def stacked(book: LawBook, call: Call) -> Laid | Stacked:
    """A new axis; until it is known whether it is taken apart again, each part keeps its own."""
    place = call.dim % len(call.shape)
    if len(call.tensors) == 1:
        axes = call.tensors[0].axes
        return Laid((*axes[:place], (), *axes[place:]))
    return Stacked(place, tuple(call.tensors))


def pieces(book: LawBook, value: Laid | Stacked, place: int, sizes: list[int]) -> list[Laid | Stacked]:
    """A value cut along an axis; a stack that is cut along its own is taken apart."""
    if isinstance(value, Stacked) and place == value.dim and set(sizes) == {1}:
        return [Laid((*part.axes[:place], (), *part.axes[place:])) for part in value.parts]
    value = book.whole(value)
    axis = value.axes[place]
    parts = cut(axis, sizes, book.reason) if 0 not in sizes else None
    if parts is None:
        book.pin_axis(axis, "cuts an axis in pieces that are no parts of it")
        book.mixes(value.axes, [place])
        parts = [book.fixed(size) for size in sizes]
    return [value.with_axis(place, part) for part in parts]


@law("split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split", on_stacks=True)
def cut_up(book: LawBook, call: Call) -> list[Laid | Stacked]:
    """Consecutive pieces of an axis."""
    place = call.dim % len(call.input.shape)
    return pieces(book, call.input, place, [int(part.shape[place]) for part in call.result])


@law("unbind", on_stacks=True)
def unbound(book: LawBook, call: Call) -> list[Laid]:
    """Every entry of an axis by itself."""
    place = call.dim % len(call.input.shape)
    return [book.whole(piece).with_axis(place) for piece in pieces(book, call.input, place, [1] * call.input.shape[place])]


@law("select", on_stacks=True)
def selected(book: LawBook, call: Call) -> Laid:
    """One entry of an axis."""
    place = call.dim % len(call.input.shape)
    index = call.get("index") % call.input.shape[place]
    if isinstance(call.input, Stacked) and place == call.input.dim:
        return call.input.parts[index]
    return book.whole(segment(book, call.input, place, index, 1)).with_axis(place)


@law("slice narrow", on_stacks=True)
def sliced(book: LawBook, call: Call) -> Laid | Stacked:
    """Consecutive entries of an axis, or one of every few."""
    place = call.dim % len(call.input.shape)
    size, length, step = call.input.shape[place], int(call.shape[place]), call.get("step", 1)
    if size == length:
        return call.input
    if step != 1 or not length:
        value = book.whole(call.input)
        if length * step == size and _start(call, size) < step:  # of (length, step) one column
            rows, columns = split_front(value.axes[place], length, book.because("its steps are no parts of its channels"))
            column = segment(book, value.with_axis(place, rows, columns), place + 1, _start(call, size), 1)
            return column.with_axis(place + 1)
        book.pin_axis(value.axes[place], "takes every other entry")
        book.mixes(value.axes, [place])
        return value.with_axis(place, book.fixed(length))
    return segment(book, call.input, place, _start(call, size), length)


def _start(call: Call, size: int) -> int:
    """Where a slice of an axis begins."""
    start = int(call.get("start") or 0)
    return min(start + size if start < 0 else start, size)


def segment(book: LawBook, value: Laid | Stacked, place: int, start: int, length: int) -> Any:
    """Consecutive entries of an axis."""
    sizes = [part for part in (start, length, value.shape[place] - start - length) if part]
    return pieces(book, value, place, sizes)[1 if start else 0]


@law("slice_scatter select_scatter")
def written_into(book: LawBook, call: Call) -> Laid:
    """Consecutive entries of an axis, or one, put in the place of others."""
    value, source, place = call.input, call.src, (call.get("dim") or 0) % len(call.shape)
    size, before = call.shape[place], _start(call, call.shape[place])
    if call.operator_name == "select_scatter":
        source, before = Laid((*source.axes[:place], (), *source.axes[place:])), call.get("index") % size
    length = int(source.shape[place])
    if size == length:
        return Laid(book.join(Laid(tuple(() if n == 1 else book.free(n) for n in call.shape)), source))
    if call.get("step", 1) != 1 or not length:
        book.pin([value, source], "writes every other entry")
        return book.all_fixed(call.shape)
    after = size - before - length
    cuts = pieces(book, value, place, [part for part in (before, length, after) if part])
    kept = [book.whole(piece) for piece in cuts[: before > 0] + cuts[len(cuts) - (after > 0) :]]
    terms = [piece.axes[place] for piece in kept]
    terms.insert(before > 0, source.axes[place])
    others = Laid(book.join(*(part.with_axis(place, ()) for part in (*kept, source))))
    return others.with_axis(place, (Sum(tuple(terms)),))


@law("roll flip fliplr flipud rot90 tril triu fft_fftshift fft_ifftshift")
def rearranged(book: LawBook, call: Call) -> Laid:
    """Entries that change places along some axes: these are pinned, and axes of one size may change places."""
    given = call.get("dims", call.get("dim"))
    rank = len(call.shape)
    places = range(rank) if not given else [given] if isinstance(given, int) else given
    return along(book, call.input, places, call.shape)


def along(book: LawBook, value: Any, places: Any, sizes: Any, detail: str = "tells positions apart") -> Laid:
    """Entries that change, or meet those at other places, along some axes: nothing is permuted there."""
    value = book.whole(value)
    places = {place % len(value.axes) for place in places}
    for place in places:
        book.pin_axis(value.axes[place], detail)
    book.mixes(value.axes, places)
    axes = [book.fixed(sizes[place], detail) if place in places else axis for place, axis in enumerate(value.axes)]
    return Laid(tuple(axes))


@law("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d")
def padded(book: LawBook, call: Call) -> Laid:
    """New entries around an axis: constant ones may be permuted among themselves."""
    amounts = list(call.get("pad") or call.get("padding"))
    is_constant = call.operator_name in ("pad", "constant_pad_nd") and call.get("mode", "constant") == "constant"
    rank = len(call.shape)
    changed = [rank - 1 - place // 2 for place in range(0, len(amounts), 2) if amounts[place] or amounts[place + 1]]
    if not is_constant or min(amounts, default=0) < 0:
        return along(book, call.input, changed, call.shape)
    axes = list(call.input.axes)
    for place in changed:
        before, after = amounts[2 * (rank - 1 - place)], amounts[2 * (rank - 1 - place) + 1]
        terms = [book.free(before)] * (before > 0) + [axes[place]] + [book.free(after)] * (after > 0)
        axes[place] = (Sum(tuple(terms)),)
    return Laid(tuple(axes))


@law("unfold")
def windows(book: LawBook, call: Call) -> Laid:
    """Windows along an axis, whose entries become a new last one."""
    place = call.dimension % max(len(call.input.shape), 1)
    if not len(call.input.shape):
        return Laid(((),))
    moved = along(book, call.input, [place], call.shape)
    return Laid((*moved.axes, book.fixed(call.shape[-1])))


@law("im2col")
def patches(book: LawBook, call: Call) -> Laid:
    """Windows of an image as columns: channels become (channels, places in a window)."""
    *lead, channels, _, _ = along(book, call.input, [-2, -1], call.input.shape).axes
    inner = call.shape[-2] // size_of(channels)
    return Laid((*lead, (*channels, *book.fixed(inner)), book.fixed(call.shape[-1])))


@law("col2im")
def from_patches(book: LawBook, call: Call) -> Laid:
    """Columns of (channels, places in a window), summed where windows meet."""
    *lead, columns, windows = call.input.axes
    channels, inside = split_front(columns, call.shape[-3], book.because("its windows are no parts of its columns"))
    for axis in (inside, windows):
        book.pin_axis(axis, "tells positions apart")
    book.see((*lead, channels))
    return Laid((*lead, channels, *map(book.fixed, call.shape[-2:])))


@law("channel_shuffle native_channel_shuffle")
def interleaved(book: LawBook, call: Call) -> Laid:
    """Channels of (groups, n) become (n, groups)."""
    lead, channels, *rest = call.input.axes
    group, inside = split_front(channels, call.groups, book.because("its groups are no parts of its channels"))
    return Laid((lead, (*inside, *group), *rest))


@law("pixel_shuffle pixel_unshuffle")
def shuffled(book: LawBook, call: Call) -> Laid:
    """Channels of (c, r, r) become c with r times the height and width, or back."""
    *lead, channels, _, _ = call.input.axes
    rest = (*map(book.fixed, call.shape[-2:]),)
    book.mixes(call.input.axes, [-2, -1])
    if call.operator_name == "pixel_unshuffle":
        inner = call.shape[-3] // size_of(channels)
        return Laid((*lead, (*channels, *book.fixed(inner)), *rest))
    front, inner = split_front(channels, call.shape[-3], book.reason)
    book.pin_axis(inner, "becomes places of an image")
    book.see((*lead, front))
    return Laid((*lead, front, *rest))
