"""Entries that an index names: it tells them apart along the axes that it names, and along no other."""

import torch

from equinorm.permuting.book import Book
from equinorm.permuting.laws.movement import along, segment
from equinorm.permuting.laws.registry import Call, law
from equinorm.permuting.values import Laid


@law("embedding")
def embedding(book: Book, call: Call) -> Laid:
    """Rows of a table."""
    table = along(book, call.weight, [0], [1], "an index tells its rows apart")
    return Laid((*call.indices.axes, *table.axes[1:]))


@law("index_select")
def rows(book: Book, call: Call) -> Laid:
    """Entries along one axis, in the order of an index."""
    book.pin(call.index, "an index tells its entries apart")
    return along(book, call.input, [call.dim], call.shape, "an index tells its entries apart")


@law("gather take_along_dim")
def gathered(book: Book, call: Call) -> Laid:
    """Entries along one axis that an index of the same rank chooses."""
    index = call.get("index", call.get("indices"))
    if call.get("dim") is None or len(index.axes) != len(call.input.axes):
        book.pin(call.arguments, "an index tells its entries apart")
        return Laid(tuple(map(book.fixed, call.shape)))
    place = call.dim % len(call.shape)
    for value in (call.input, index):
        for at, axis in enumerate(value.axes):
            if at != place and value.shape[at] != call.shape[at]:
                book.pin_axis(axis, "an index tells its entries apart")
    moved = along(book, call.input, [place], call.shape, "an index tells its entries apart")
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


@law("index")
def indexed(book: Book, call: Call) -> Laid:
    """Entries at indices of one axis or more; the other axes keep their order."""
    indices = [*call.indices, *[None] * (len(call.input.shape) - len(call.indices))]
    named = [place for place, index in enumerate(indices) if index is not None]
    for index in (indices[place] for place in named):
        book.pin(index, "an index tells its entries apart")
    if len(named) != 1 or len(indices) != len(call.input.shape):
        book.pin(call.input, "an index tells its entries apart")
        return Laid(tuple(map(book.fixed, call.shape)))
    place = named[0]
    number = indices[place].number
    if number is not None and number.dim() == 1 and len(number) and not number.dtype.is_floating_point:
        first = int(number[0]) % call.input.shape[place] if number.dtype != torch.bool else -1
        if first >= 0 and number.tolist() == list(range(int(number[0]), int(number[0]) + len(number))):
            return segment(book, call.input, place, first, len(number))
    new = len(call.shape) - len(indices) + 1
    value = call.input.axes
    book.pin_axis(value[place], "an index tells its entries apart")
    book.mixes(value, [place])
    return Laid((*value[:place], *map(book.fixed, call.shape[place : place + new]), *value[place + 1 :]))
