"""Entries that an index names: it tells them apart along the axes that it names, and along no other."""

from collections.abc import Sequence

import torch

from equinorm.permuting.atoms import Axis, Sum, size_of
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.movement import along, segment
from equinorm.permuting.laws.registry import APART, WHICH, Call, law
from equinorm.permuting.values import Chosen, Laid


@law("embedding", on_names="indices")
def embedding(book: LawBook, call: Call) -> Laid | Chosen:
    """Rows of a table; those that the network itself chooses, as of a codebook, move with what it chooses by."""
    if call.indices.names is not None and call.get("padding_idx", -1) < 0:
        return _chosen(book, call.weight, 0, call.indices)
    if call.indices.names is not None:
        book.pin_axis(call.indices.names, "keeps one row without a gradient")
    table = along(book, call.weight, [0], [1], "an index tells its rows apart")
    return Laid((*call.indices.axes, *table.axes[1:]))


def _chosen(book: LawBook, table: Laid, place: int, index: Laid) -> Laid | Chosen:
    """Entries along one axis that an index names: those of the same channels, wherever they stand."""
    book.named(table.axes[place], index)
    return _rows(book, table, place, index, index.axes)


def _rows(book: LawBook, table: Laid, place: int, index: Laid, entries: Sequence[Axis]) -> Laid | Chosen:
    """Entries along one axis that data choose: rows apart where they stand along one axis too."""
    if len(entries) == 1 and size_of(table.axes[place]) > 1:
        return Chosen(table, place, entries[0], index)
    book.mixes(table.axes, [place])
    return table.with_axis(place, *entries)


@law("one_hot", on_names="self")
def one_hot(book: LawBook, call: Call) -> Laid:
    """One at the place that an index names; classes beyond those are never named."""
    names, classes = call.input.names, int(call.shape[-1])
    if names is None or classes < size_of(names):
        book.pin(call.input, WHICH)
        return Laid((*call.input.axes, book.fixed(classes)))
    book.see((names,))
    more = classes - size_of(names)
    return Laid((*call.input.axes, (Sum((names, book.free(more))),) if more else names))


@law("index_add index_copy index_reduce")
def added_at(book: LawBook, call: Call) -> Laid:
    """Entries that are added to, or take the place of, those at places along one axis that an index names."""
    place = call.dim % max(len(call.shape), 1)
    book.pin(call.index, APART)
    if not len(call.shape):
        return Laid(())
    into, added = (along(book, v, [place], call.shape, APART) for v in (call.input, call.source))
    return Laid(book.join(*(value.with_axis(place, ()) for value in (into, added)), into))


@law("index_fill")
def filled_at(book: LawBook, call: Call) -> Laid:
    """One number at places along one axis that an index names."""
    book.pin(call.index, APART)
    return along(book, call.input, [call.dim], call.shape, APART) if len(call.shape) else Laid(())


@law("scatter_add scatter_reduce")
def summed_at(book: LawBook, call: Call) -> Laid:
    """Sums, means, maxima of the entries that an index sends to each place of one axis, in whatever order these stand."""
    place, rank = call.dim % max(len(call.shape), 1), len(call.shape)
    into, source, index = call.input, call.src, call.index
    if not rank or index.shape != source.shape or any(index.shape[at] != call.shape[at] for at in range(rank) if at != place):
        book.pin(call.arguments, APART)
        return book.all_fixed(call.shape)
    sent = Laid(book.join(source, index))
    book.mixes(sent.axes, [place])
    kept = along(book, into, [place], call.shape, APART)
    others = Laid(book.join(kept.with_axis(place, ()), sent.with_axis(place, ())))
    return others.with_axis(place, kept.axes[place])


@law("index_select", on_names="index")
def rows(book: LawBook, call: Call) -> Laid | Chosen:
    """Entries along one axis, in the order of an index."""
    if call.index.names is not None:
        return _chosen(book, call.input, call.dim % len(call.shape), call.index)
    book.pin([call.index, Laid((call.input.axes[call.dim],))], APART)
    return _rows(book, call.input, call.dim % len(call.shape), call.index, [book.fixed(call.shape[call.dim])])


@law("gather take_along_dim", on_names="index indices")
def gathered(book: LawBook, call: Call) -> Laid:
    """Entries along one axis that an index of the same rank chooses."""
    index = call.get("index", call.get("indices"))
    if index.names is not None:
        return _named_along(book, call, index)
    if call.get("dim") is None or len(index.axes) != len(call.input.axes):
        book.pin(call.arguments, APART)
        return book.all_fixed(call.shape)
    place = call.dim % len(call.shape)
    for value in (call.input, index):
        for at, axis in enumerate(value.axes):
            if at != place and value.shape[at] != call.shape[at]:
                book.pin_axis(axis, APART)
    moved = along(book, call.input, [place], call.shape, APART)
    axes = [
        axis if moved.shape[at] == size else book.fixed(size)
        for at, (axis, size) in enumerate(zip(moved.axes, call.shape, strict=True))
    ]
    axes[place] = index.axes[place]
    others = [
        book.same(one, other) if at != place and index.shape[at] == call.shape[at] else one
        for at, (one, other) in enumerate(zip(axes, index.axes, strict=True))
    ]
    return Laid(tuple(others))


def _named_along(book: LawBook, call: Call, index: Laid) -> Laid:
    """Entries along one axis that an index of the same shape along all others names."""
    place = (call.dim or 0) % max(len(call.shape), 1)
    same = [at == place or call.input.shape[at] == index.shape[at] for at in range(len(index.axes))]
    if call.get("dim") is None or len(index.axes) != len(call.input.axes) or not all(same):
        book.pin(call.arguments, APART)
        return book.all_fixed(call.shape)
    book.named(call.input.axes[place], index)
    book.mixes(call.input.axes, [place])
    return Laid(book.join(call.input.with_axis(place, ()), index))


@law("scatter", on_names="index")
def scattered(book: LawBook, call: Call) -> Laid:
    """Entries to places along one axis that an index names; by any other index they are told apart."""
    index, source = call.index, call.get("src")
    place = call.dim % max(len(call.shape), 1)
    given = [index, *([source] if isinstance(source, Laid) else [])]
    fits = all(part.shape == index.shape for part in given) and all(
        at == place or size == index.shape[at] for at, size in enumerate(call.input.shape)
    )
    if index.names is None or not fits or call.get("reduce") is not None or not len(call.shape):
        book.pin(call.arguments, APART)
        return book.all_fixed(call.shape)
    named = book.named(call.input.axes[place], index)
    book.join(*given)
    if len(given) > 1:
        book.pin_axis(index.axes[place], "of entries for one place the last one stays")
    book.mixes(call.input.axes, [place])
    others = Laid(book.join(call.input.with_axis(place, ()), index.with_axis(place, ())))
    return others.with_axis(place, named)


@law("index_put")
def put_at(book: LawBook, call: Call) -> Laid:
    """Entries that take the place of those, or are added to them, at places of one axis that an index names."""
    named = [(place, index) for place, index in enumerate(call.indices) if index is not None]
    value, into = book.whole(call.get("values")), call.input
    if len(named) != 1 or len(named[0][1].axes) != 1 or (len(value.axes) == len(into.axes) and not call.shape):
        book.pin(call.arguments, APART)
        return book.all_fixed(call.shape)
    (place, index), lead = named[0], len(into.axes) - len(value.axes)
    book.pin(index, APART)
    kept = along(book, into, [place], call.shape, APART)
    if lead <= place:
        value = along(book, value, [place - lead], value.shape, APART).with_axis(place - lead, ())
    return Laid(book.join(kept, value))


def _one_of_each_row(call: Call, indices: list[Laid | None], named: list[int]) -> bool:
    """Is this x[arange(len(x)), index], with an index that names places?"""
    if named != [0, 1]:
        return False
    rows, chosen = indices[0], indices[1]
    size = call.input.shape[0]
    if rows is None or chosen is None or rows.number is None or chosen.names is None or chosen.shape != (size,):
        return False
    return rows.number.shape == (size,) and not rows.number.is_floating_point() and rows.number.tolist() == list(range(size))


@law("index", on_names="indices")
def indexed(book: LawBook, call: Call) -> Laid | Chosen:
    """Entries at indices of one axis or more; the other axes keep their order."""
    indices = [*call.indices, *[None] * (len(call.input.shape) - len(call.indices))]
    named = [place for place, index in enumerate(indices) if index is not None]
    if len(named) == 1 and len(indices) == len(call.input.shape) and indices[named[0]].names is not None:
        return _chosen(book, call.input, named[0], indices[named[0]])
    if _one_of_each_row(call, indices, named):
        axes = call.input.axes
        book.named(axes[1], indices[1])
        rows = book.same(axes[0], indices[1].axes[0])
        book.mixes(axes, [1])
        return Laid((rows, *axes[2:]))
    for index in (indices[place] for place in named):
        book.pin(index, APART)
    if len(named) != 1 or len(indices) != len(call.input.shape):
        book.pin(call.input, APART)
        return book.all_fixed(call.shape)
    place = named[0]
    number = indices[place].number
    if number is not None and number.dim() == 1 and len(number) and not number.dtype.is_floating_point:
        first = int(number[0]) % call.input.shape[place] if number.dtype != torch.bool else -1
        if first >= 0 and number.tolist() == list(range(int(number[0]), int(number[0]) + len(number))):
            return segment(book, call.input, place, first, len(number))
    new = len(call.shape) - len(indices) + 1
    book.pin_axis(call.input.axes[place], APART)
    return _rows(book, call.input, place, indices[place], [*map(book.fixed, call.shape[place : place + new])])


@law("grid_sampler grid_sampler_2d grid_sampler_3d")
def sampled(book: LawBook, call: Call) -> Laid:
    """Images looked at in places that a grid names, the same for all channels."""
    image = along(book, call.input, range(2, len(call.shape)), call.shape)
    grid = along(book, call.grid, range(1, len(call.grid.shape)), call.grid.shape)
    return image.with_axis(0, book.same(image.axes[0], grid.axes[0]))
