"""Products summed over an axis: both operands' axis is permuted alike, and the sum does not see it.

Axes are named by letters, as in einsum.
"""

from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase

from equinorm.permuting.atoms import Axis, size_of, split_front
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.movement import along
from equinorm.permuting.laws.registry import Call, law
from equinorm.permuting.values import Chosen, Laid

KERNEL = "a place in a kernel"
"""Why the axes of a kernel are pinned, which are no channels."""


def contract(book: LawBook, equation: str, *operands: Sequence[Axis]) -> Laid:
    """The axes of einsum(equation, *operands)."""
    terms, out = equation.split("->")
    found: dict[str, Axis] = {}
    for letters, axes in zip(terms.split(","), operands, strict=True):
        for letter, axis in zip(letters, axes, strict=True):
            found[letter] = book.same(found.get(letter, ()), axis)
    book.see(found.values())  # before it is summed: what meets in a product must be permuted alike at every place
    book.see(found[letter] for letter in out)  # which may be no value of the graph, as scores inside attention
    return Laid(tuple(found[letter] for letter in out))


def _added(book: LawBook, result: Laid, addend: Laid | None) -> Laid:
    return result if addend is None else Laid(book.join(result, addend))


@law("linear")
def linear(book: LawBook, call: Call) -> Laid:
    """x·Wᵀ + b, W of shape (out, in)."""
    batch = ascii_lowercase[: len(call.input.axes) - 1]
    out = "Y" if len(call.weight.axes) == 2 else ""
    return _added(book, contract(book, f"{batch}Z,{out}Z->{batch}{out}", call.input.axes, call.weight.axes), call.bias)


@law("matmul mm bmm mv dot vdot linalg_matmul")
def matmul(book: LawBook, call: Call) -> Laid:
    """Matrix products with broadcast batch axes."""
    left, right = list(call.arguments.values())[:2]
    return _product(book, left, right)


def _product(book: LawBook, left: Laid, right: Laid) -> Laid:
    ranks = len(left.axes), len(right.axes)
    batch = ascii_lowercase[: max(max(ranks) - 2, 0)]
    row, column = "X" if ranks[0] > 1 else "", "Y" if ranks[1] > 1 else ""
    first = batch[len(batch) - max(ranks[0] - 2, 0) :] + row + "Z"
    second = batch[len(batch) - max(ranks[1] - 2, 0) :] + "Z" + column
    return contract(book, f"{first},{second}->{batch}{row}{column}", left.axes, right.axes)


@law("addmm addmv baddbmm")
def add_matmul(book: LawBook, call: Call) -> Laid:
    """bias + a @ b."""
    bias, left, right = list(call.arguments.values())[:3]
    return _added(book, _product(book, left, right), bias)


@law("_grouped_mm transformers::grouped_mm_fallback.default", on_rows=True)
def grouped_matmul(book: LawBook, call: Call) -> Laid | Chosen:
    """Rows times the matrix of the group that they are in, W of shape (groups, in, out); rows and groups keep their places."""
    rows, weight = list(call.arguments.values())[:2]
    weight, ends = book.whole(weight), call.offs
    if ends is None or len(rows.shape) != 2 or len(weight.axes) != 3 or call.get("bias") is not None:
        book.pin(call.arguments, "only rows by groups, without bias, have a law")
        return book.all_fixed(call.shape)
    if isinstance(rows, Chosen) and rows.index is ends and rows.by == "groups" and rows.place == 0:
        entries, given = rows.entries, rows.table.axes
    else:
        entries, channels = book.whole(rows).axes
        given = (), channels
    book.pin([ends, Laid((entries, weight.axes[0]))], "ends of groups tell rows and groups apart")
    return Chosen(contract(book, "gi,gio->go", given, weight.axes), 0, entries, ends, "groups")


@law("outer ger")
def outer(book: LawBook, call: Call) -> Laid:
    """x yᵀ."""
    left, right = list(call.arguments.values())[:2]
    return contract(book, "X,Y->XY", left.axes, right.axes)


@law("addr")
def add_outer(book: LawBook, call: Call) -> Laid:
    """bias + x yᵀ."""
    return _added(book, contract(book, "X,Y->XY", call.vec1.axes, call.vec2.axes), call.input)


@law("addbmm")
def add_sum_of_matmuls(book: LawBook, call: Call) -> Laid:
    """bias + Σ_b a_b @ c_b."""
    return _added(book, contract(book, "BXZ,BZY->XY", call.batch1.axes, call.batch2.axes), call.input)


@law("cdist _cdist_forward")
def distances(book: LawBook, call: Call) -> Laid:
    """Norms of differences between all rows of two operands: sums over their last axis."""
    left, right = call.x1.axes, call.x2.axes
    batch = ascii_lowercase[: max(len(left), len(right)) - 2]
    first, second = (batch[len(batch) - (len(axes) - 2) :] for axes in (left, right))
    return contract(book, f"{first}XZ,{second}YZ->{batch}XY", left, right)


@law("einsum")
def einsum(book: LawBook, call: Call) -> Laid:
    """Any sum of products that letters describe; "..." are axes that broadcast."""
    equation = call.equation.replace(" ", "")
    terms, arrow, out = equation.partition("->")
    named = [part.replace("...", "") for part in terms.split(",")]
    unused = [letter for letter in ascii_uppercase + ascii_lowercase if letter not in equation]
    rests = [
        len(value.axes) - len(own) if "..." in part else 0
        for part, own, value in zip(terms.split(","), named, call.tensors, strict=True)
    ]
    rest = "".join(unused[: max(rests)])
    parts = [part.replace("...", rest[len(rest) - count :]) for part, count in zip(terms.split(","), rests, strict=True)]
    if not arrow:
        once = sorted(letter for letter in set("".join(named)) if "".join(named).count(letter) == 1)
        out = "..." * ("..." in terms) + "".join(once)
    return contract(book, f"{','.join(parts)}->{out.replace('...', rest)}", *(value.axes for value in call.tensors))


@law("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d")
def convolution(book: LawBook, call: Call) -> Laid:
    """Convolutions with groups: groups among themselves, and channels within each; W of shape (out, in / groups, kernel)."""
    weight = call.weight.axes
    is_transposed = bool(call.get("transposed")) or "transpose" in call.operator_name
    rank = len(weight) - 2
    lead = len(call.input.axes) - rank - 1
    moving = [lead + 1 + place for place in range(rank) if not _is_pointwise(call, place)]
    fixed = along(book, call.input, moving, call.shape)
    along(book, Laid(weight), range(2, 2 + rank), [0, 0, *[1] * rank], KERNEL)
    channels = fixed.axes[lead]
    if call.groups == 1:
        into, out = (weight[0], weight[1]) if is_transposed else (weight[1], weight[0])
        book.same(channels, into)
        outside = out
    else:
        reason = book.because("its groups are no parts of its channels")
        group, inside = split_front(channels, call.groups, reason)
        first, second = split_front(weight[0], call.groups, reason)
        book.same(group, first)
        into, outside = (second, weight[1]) if is_transposed else (weight[1], second)
        book.same(inside, into)
        out = (*first, *outside)
        channels = (*group, *inside)
    spatial = fixed.axes[lead + 1 :]
    book.see((*fixed.axes[:lead], channels, outside, *spatial))
    result = Laid((*fixed.axes[:lead], out, *spatial))
    if call.bias is not None:
        book.same(out, call.bias.axes[0])
    return result


def _is_pointwise(call: Call, place: int) -> bool:
    """Does a kernel see one position at a time along a spatial axis?"""
    options = [call.get(name) for name in ("stride", "padding", "output_padding")]
    of_axis = [option[min(place, len(option) - 1)] if isinstance(option, (list, tuple)) else option for option in options]
    return int(call.weight.shape[2 + place]) == 1 and of_axis[0] in (1, None) and all(o in (0, None) for o in of_axis[1:])


@law("scaled_dot_product_attention")
def attention(book: LawBook, call: Call) -> Laid:
    """softmax(q·kᵀ)·v: queries with keys, keys' places with values' places, values into the result."""
    query, key, value = call.query.axes, call.key.axes, call.value.axes
    if len(query) > 2 and size_of(query[-3]) != size_of(key[-3]):  # several heads of queries for each of keys
        reason = book.because("heads that share keys are no parts of its heads")
        heads, shared = split_front(query[-3], size_of(key[-3]), reason)
        query = (*query[:-3], heads, shared, *query[-2:])
        key, value = ((*axes[:-2], (), *axes[-2:]) for axes in (key, value))
    batch = ascii_lowercase[: len(query) - 2]
    scores = contract(book, f"{batch}LD,{batch}SD->{batch}LS", query, key)
    if call.is_causal:
        for axis in scores.axes[-2:]:
            book.pin_axis(axis, "sees only what comes before")
    mask = call.get("attn_mask")
    if mask is not None:
        shape = [*call.query.shape[:-1], call.key.shape[-2]]
        if len(shape) < len(query) and len(mask.axes) > 2:
            return Laid(_with_heads(book, scores, value, mask, batch))
        scores = _added(book, scores, mask)
    book.mixes(scores.axes, [-1])
    result = contract(book, f"{batch}LS,{batch}SE->{batch}LE", scores.axes, value)
    return _merged(call, result)


def _with_heads(book: LawBook, scores: Laid, value: tuple[Axis, ...], mask: Laid, batch: str) -> tuple[Axis, ...]:
    """Grouped queries with a mask that has an axis of heads."""
    heads = (*scores.axes[-4], *scores.axes[-3])
    merged = Laid((*scores.axes[:-4], heads, *scores.axes[-2:]))
    book.join(merged, mask)
    book.mixes(scores.axes, [-1])
    result = contract(book, f"{batch}LS,{batch}SE->{batch}LE", scores.axes, value)
    return (*result.axes[:-4], heads, *result.axes[-2:])


def _merged(call: Call, result: Laid) -> Laid:
    """Heads of grouped queries as one axis again."""
    if len(result.axes) == len(call.shape):
        return result
    return Laid((*result.axes[:-4], (*result.axes[-4], *result.axes[-3]), *result.axes[-2:]))
