"""Each entry on its own: operands that meet are permuted alike."""

from torch import Tensor

from equinorm.permuting.atoms import cut
from equinorm.permuting.book import Book
from equinorm.permuting.laws.registry import Call, law
from equinorm.permuting.values import Laid, Stacked, flat


@law("add sub mul div rsub subtract multiply divide floor_divide true_divide where masked_fill hardswish log_sigmoid")
def pointwise(book: Book, call: Call) -> Laid | list[Laid]:
    """Any function of the entries at one place; axes of size 1 are broadcast."""
    result = Laid(book.join(*map(book.whole, flat(call.arguments))))
    return result if isinstance(call.result, Tensor) else [result for _ in call.result]


@law(
    "clone contiguous detach alias lift_fresh_copy lift_fresh to _to_copy type_as dropout alpha_dropout "
    "feature_dropout feature_alpha_dropout",
    on_stacks=True,
)
def unchanged(book: Book, call: Call) -> Laid | Stacked:
    """The input itself, or the input with entries dropped at random: by place, so that a seed drops other channels."""
    return Laid(call.input.axes) if isinstance(call.input, Laid) else call.input


@law("copy")
def copied(book: Book, call: Call) -> Laid:
    """The second operand in the shape of the first, whose entries do not matter."""
    return Laid(book.join(Laid(tuple(() if size == 1 else book.free(size) for size in call.shape)), call.src))


@law("prelu _prelu_kernel")
def prelu(book: Book, call: Call) -> Laid:
    """A slope for each channel, along axis 1."""
    axes = list(call.input.axes)
    slopes = call.weight.axes
    place = min(1, len(axes) - 1)
    if len(slopes) == len(axes) > 1:  # broadcast already
        return Laid(book.join(call.input, call.weight))
    if slopes:
        axes[place] = book.same(axes[place], slopes[0])
    return Laid(tuple(axes))


@law("glu")
def gated(book: Book, call: Call) -> Laid:
    """The first half of an axis times a function of the second."""
    place = call.dim % len(call.input.axes)
    axis = call.input.axes[place]
    halves = cut(axis, [call.shape[place]] * 2, book.reason)
    if halves is None:
        book.pin_axis(axis, "its halves are no parts")
        halves = [book.fixed(call.shape[place])] * 2
    axes = list(call.input.axes)
    axes[place] = book.same(*halves)
    return Laid(tuple(axes))
