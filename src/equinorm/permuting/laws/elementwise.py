"""Each entry on its own: operands that meet are permuted alike."""

from torch import Tensor

from equinorm.permuting.atoms import cut, size_of
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.registry import WHICH, Call, law
from equinorm.permuting.values import Laid, Stacked, flat


@law(
    "add sub mul div rsub subtract multiply divide floor_divide true_divide where masked_fill hardswish log_sigmoid complex "
    "polar"
)
def pointwise(book: LawBook, call: Call) -> Laid | list[Laid]:
    """Any function of the entries at one place; axes of size 1 are broadcast."""
    result = Laid(book.join(*map(book.whole, flat(call.arguments))))
    return result if isinstance(call.result, Tensor) else [result for _ in call.result]


@law("mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy")
def loss(book: LawBook, call: Call) -> Laid:
    """A function of the entries at one place, or its sum or mean over all of them."""
    each = Laid(book.join(*map(book.whole, flat(call.arguments))))
    if call.shape == each.shape:
        return each
    book.see(each.axes)
    return Laid(())


@law("eq ne", on_names="self other")
def compared(book: LawBook, call: Call) -> Laid:
    """Equal or not. Places that are compared with 0, 1, 2, … along a new axis become places along that axis."""
    values = [value for value in (call.input, call.other) if isinstance(value, Laid)]
    named = [(value, value.names) for value in values if value.names is not None]
    if len(named) == 1 and len(values) == 2:
        (index, names), other = named[0], values[values[0] is named[0][0]]
        place = _counts(other, size_of(names))
        if place is not None and (len(index.axes) < -place or size_of(index.axes[place]) == 1):
            book.see((names,))
            return Laid(book.join(index, Laid(((),) * len(call.shape)))).with_axis(place, names)
    for _, names in named:
        book.pin_axis(names, WHICH)
    return Laid(book.join(*map(book.whole, flat(call.arguments))))


def _counts(value: Laid, size: int) -> int | None:
    """The axis, counted from behind, along which a constant is 0, 1, 2, …; all others are of size 1."""
    number = value.number
    if number is None or number.numel() != size or number.dtype.is_floating_point:
        return None
    place = next((at for at in range(-number.dim(), 0) if number.shape[at] == size), None)
    return place if number.flatten().tolist() == list(range(size)) else None


@law(
    "clone contiguous detach alias lift_fresh_copy lift_fresh to _to_copy type_as dropout alpha_dropout "
    "feature_dropout feature_alpha_dropout",
    on_stacks=True,
)
def unchanged(book: LawBook, call: Call) -> Laid | Stacked:
    """The input itself, or the input with entries dropped at random: by place, so that a seed drops other channels."""
    return Laid(call.input.axes) if isinstance(call.input, Laid) else call.input


@law("copy")
def copied(book: LawBook, call: Call) -> Laid:
    """The second operand in the shape of the first, whose entries do not matter."""
    return Laid(book.join(Laid(tuple(() if size == 1 else book.free(size) for size in call.shape)), call.src))


@law("fill zero")
def filled(book: LawBook, call: Call) -> Laid:
    """One number in every place, whatever was there."""
    return Laid(tuple(map(book.free, call.shape)))


@law("prelu _prelu_kernel")
def prelu(book: LawBook, call: Call) -> Laid:
    """A slope for each channel, along axis 1."""
    axes, slopes = call.input.axes, call.weight.axes
    if len(slopes) == len(axes) > 1:  # broadcast already
        return Laid(book.join(call.input, call.weight))
    if not slopes:
        return Laid(axes)
    place = min(1, len(axes) - 1)
    return call.input.with_axis(place, book.same(axes[place], slopes[0]))


@law("glu")
def gated(book: LawBook, call: Call) -> Laid:
    """The first half of an axis times a function of the second."""
    place = call.dim % len(call.input.axes)
    axis = call.input.axes[place]
    halves = cut(axis, [call.shape[place]] * 2, book.reason)
    if halves is None:
        book.pin_axis(axis, "its halves are no parts")
        halves = [book.fixed(call.shape[place])] * 2
    return call.input.with_axis(place, book.same(*halves))
