"""Diagonals: two axes are permuted alike where one place of both is looked at."""

from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.contraction import contract
from equinorm.permuting.laws.movement import along
from equinorm.permuting.laws.registry import Call, law
from equinorm.permuting.values import Laid


@law("trace")
def trace(book: LawBook, call: Call) -> Laid:
    """The sum along a diagonal."""
    rows, columns = call.input.axes
    if call.input.shape[0] != call.input.shape[1]:
        book.pin(call.input, "is not square")
        return Laid(())
    return contract(book, "X,X->", (rows,), (columns,))


@law("diagonal diagonal_copy")
def diagonal(book: LawBook, call: Call) -> Laid:
    """Entries at equal places of two axes, which become a new last one."""
    first, second = (place % len(call.input.shape) for place in (call.dim1, call.dim2))
    axes, is_whole = list(call.input.axes), call.input.shape[first] == call.input.shape[second] and not call.get("offset")
    if is_whole:
        axis = book.same(axes[first], axes[second])
    else:
        along(book, call.input, [first, second], call.input.shape)
        axis = book.fixed(call.shape[-1])
    return Laid((*(axis for place, axis in enumerate(axes) if place not in (first, second)), axis))


@law("diag_embed")
def on_diagonal(book: LawBook, call: Call) -> Laid:
    """The last axis becomes two, with zeros at unequal places."""
    first, second = sorted(place % len(call.shape) for place in (call.dim1, call.dim2))
    axes, last = list(call.input.axes[:-1]), call.input.axes[-1]
    if call.get("offset"):
        along(book, call.input, [-1], call.input.shape)
    for place in (first, second):
        axes.insert(place, book.fixed(call.shape[place]) if call.get("offset") else last)
    return Laid(tuple(axes))
