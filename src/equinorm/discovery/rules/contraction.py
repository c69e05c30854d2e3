"""Products summed over an axis: linear layers, convolutions, matrix products, attention.

y[b, o] = Σ_k x[b, k] · w[o, k] scales as a product of a label over b and one over o if x[b, k]·w[o, k] does not vary along k.
A weight at its first use takes the label that makes it so: out-classes that are new, over the inverse of what x brings along k.
Axes are named by letters, as in einsum.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from string import ascii_letters

import numpy as np
import torch

from equinorm._errors import EquinormError
from equinorm.discovery.classes import PINNED, ZERO
from equinorm.discovery.labels import Factor, Label, move_one
from equinorm.discovery.rules.registry import Call, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import Chosen, Source, Value, View


def contract(trace: Trace, equation: str, left: Value, right: Value) -> Label:
    """The label of einsum(equation, left, right), and the law that every sum in it has terms which scale alike.

    Args:
        trace: gathers the laws.
        equation: as of einsum, for two operands: "bk,ok->bo" is x·Wᵀ. Axes of size 1 broadcast.
        left: an operand. A parameter that no operation has used yet takes the label that makes the law hold.
        right: another.

    Raises:
        EquinormError: if the equation is not one of two operands and a result.
    """
    terms = re.fullmatch(r"([a-zA-Z]*),([a-zA-Z]*)->([a-zA-Z]*)", equation.replace(" ", ""))
    if terms is None:
        raise EquinormError(f"contract needs letters for two operands and a result, such as 'bk,ok->bo', not {equation!r}.")
    left_axes, right_axes, out_axes = terms.groups()
    space = "".join(dict.fromkeys(left_axes + right_axes))
    if trace.is_unlabelled(left) and not trace.is_unlabelled(right):
        left, left_axes, right, right_axes = right, right_axes, left, left_axes
    x = _place(trace.label(left), left_axes, space)
    if isinstance(right, (Source, View)) and trace.is_unlabelled(right):
        return _first_use(trace, x, space, right, right_axes, out_axes)
    product = x.times(_place(trace.label(right), right_axes, space))
    product = trace.merge(product, [i for i, axis in enumerate(space) if axis not in out_axes])
    return _pick(product, space, out_axes)


def _first_use(trace: Trace, x: Label, space: str, weight: Source | View, axes: str, out_axes: str) -> Label:
    """Give a weight its label: new classes along axes of the result, and the inverse of what x, in `space`, brings along it."""
    sizes = dict(zip(axes, weight.shape, strict=True))
    if x.is_zero:  # whatever the weight is; another use says how it scales
        trace.idle.append(weight)
        sizes |= {axis: size for axis, size in zip(space, x.shape, strict=True) if size > 1}
        return Label.of([sizes.get(axis, 1) for axis in out_axes], torch.tensor(ZERO))
    shape = tuple(sizes.get(axis, 1) for axis in space)
    summed = [i for i, axis in enumerate(space) if axis not in out_axes]
    foreign = [i for i, size in enumerate(shape) if size == 1]  # axes along which the weight cannot vary
    absorbed = tuple(factor for factor in x.factors if not factor.varies(foreign))
    passed = tuple(factor for factor in x.factors if factor.varies(foreign) and not factor.varies(summed))
    mixed = tuple(factor for factor in x.factors if factor.varies(foreign) and factor.varies(summed))
    if mixed:  # what x brings along both is a product of two: the weight takes one of them
        ratios = _between(trace, Label(x.shape, mixed), foreign)
        absorbed += trace.merge(Label(x.shape, mixed).times(ratios.power(-1)), foreign).factors
        passed += ratios.factors
    fresh = trace.fresh(shape, [i for i, axis in enumerate(space) if shape[i] > 1 and axis in out_axes])
    inverse = Label(shape, absorbed).power(-1)
    inverse = trace.filled(inverse, summed) if summed else inverse.definite()
    trace.assign(weight, _pick(Label(shape, fresh.factors + inverse.factors), space, axes))
    product = Label(tuple(torch.broadcast_shapes(x.shape, shape)), passed + fresh.factors + _silent(x, summed))
    return _pick(product, space, out_axes)


def _between(trace: Trace, label: Label, axes: Sequence[int]) -> Label:
    """A new class for each index of axes on which a label varies, but for the first."""
    sizes = torch.broadcast_shapes(*(factor.ids.shape for factor in label.factors))
    sizes = [size if axis in axes else 1 for axis, size in enumerate(sizes)]
    ids = np.append(PINNED, trace.classes.fresh(math.prod(sizes) - 1))
    return Label.of(label.shape, torch.from_numpy(ids).reshape(sizes))


def _silent(x: Label, summed: Sequence[int]) -> tuple[Factor, ...]:
    """The constant zero where all terms of a sum are."""
    zeros = x.zeros()
    if zeros is None:
        return ()
    mute = zeros.all(dim=tuple(summed), keepdim=True) if summed else zeros
    return (Factor(Fraction(1), torch.where(mute, ZERO, PINNED)),) if bool(mute.any()) else ()


def _place(label: Label, axes: str, space: str) -> Label:
    """Permute and unsqueeze a label with named axes into `space`."""
    order = [axes.index(axis) for axis in space if axis in axes]

    def placed(sizes: Sequence[int]) -> list[int]:
        remaining = iter(sizes)
        return [next(remaining) if axis in axes else 1 for axis in space]

    factors = []
    for factor in label.factors:
        ids = factor.ids.permute(order)
        factors.append(Factor(factor.exponent, ids.reshape(placed(ids.shape))))
    return Label(tuple(placed([label.shape[i] for i in order])), tuple(factors))


def _pick(label: Label, space: str, axes: str) -> Label:
    """Drop the axes of `space` that `axes` lacks (the label must not vary there) and permute the others into its order."""
    kept = [space.index(axis) for axis in axes]
    lost = [i for i in range(len(space)) if i not in kept]
    factors = (Factor(f.exponent, f.ids.permute(kept + lost).reshape([f.ids.size(i) for i in kept])) for f in label.factors)
    return Label(tuple(label.shape[i] for i in kept), tuple(factors))


# ------------------------------------------------------------------------------------------------------- linear algebra


@rule("linear")
def linear(trace: Trace, call: Call) -> Label:
    """x·Wᵀ + b, W of shape (out, in)."""
    batch = ascii_letters[: len(call.input.shape) - 1]
    out = "Y" if len(call.weight.shape) == 2 else ""
    label = contract(trace, f"{batch}Z,{out}Z->{batch}{out}", call.input, call.weight)
    if call.bias is not None:
        label = trace.add(label, call.bias)
    return label.expand(call.shape)


@rule("matmul mm bmm mv dot vdot linalg_matmul _sparse_mm")
def matmul(trace: Trace, call: Call) -> Label:
    """Matrix products with broadcast batch axes."""
    left, right = list(call.arguments.values())[:2]
    return matrix_product(trace, left, right)


@rule("_grouped_mm transformers::grouped_mm_fallback.default")
def grouped_matmul(trace: Trace, call: Call) -> Label | Chosen:
    """Rows times the matrix of the group that they are in, W of shape (groups, in, out): a label for each group."""
    rows, weight = list(call.arguments.values())[:2]
    if call.offs is None or len(rows.shape) != 2 or len(weight.shape) != 3 or call.get("bias") is not None:
        for value in (rows, weight, call.get("bias")):
            if value is not None:
                trace.pin(value, "only rows by groups, without bias, have a rule")
        return Label(call.shape)
    apart = isinstance(rows, Chosen) and rows.index is call.offs and rows.by == "groups" and rows.axis == 0
    rows = rows.value if apart else trace.merge(rows, [0])
    return Chosen(contract(trace, "gi,gio->go", rows, weight), 0, call.offs, call.shape[0], "groups")


@rule("inner")
def inner(trace: Trace, call: Call) -> Label:
    """Sums over the last axes of both; with a number, their product."""
    left, right = list(call.arguments.values())[:2]
    ranks = len(left.shape), len(right.shape)
    if 0 in ranks:
        return trace.label(left).times(trace.label(right))
    rows, columns = ascii_letters[: ranks[0] - 1], ascii_letters[ranks[0] : ranks[0] + ranks[1] - 1]
    return contract(trace, f"{rows}Z,{columns}Z->{rows}{columns}", left, right)


def matrix_product(trace: Trace, left: Value, right: Value) -> Label:
    """The label of `left @ right` with broadcast batch axes."""
    ranks = len(left.shape), len(right.shape)
    batch = ascii_letters[: max(max(ranks) - 2, 0)]
    row, column = "X" if ranks[0] > 1 else "", "Y" if ranks[1] > 1 else ""
    left_axes = batch[len(batch) - max(ranks[0] - 2, 0) :] + row + "Z"
    right_axes = batch[len(batch) - max(ranks[1] - 2, 0) :] + "Z" + column
    return contract(trace, f"{left_axes},{right_axes}->{batch}{row}{column}", left, right)


@rule("addmm addmv baddbmm _sparse_addmm")
def add_matmul(trace: Trace, call: Call) -> Label:
    """bias + a @ b; for addmm and baddbmm the names of a and b differ, not their order."""
    bias, left, right = list(call.arguments.values())[:3]
    return trace.add(matrix_product(trace, left, right), bias).expand(call.shape)


@rule("addbmm")
def add_batch_matmul(trace: Trace, call: Call) -> Label:
    """bias + Σ_b a_b @ b_b."""
    return trace.add(contract(trace, "bXZ,bZY->XY", call.batch1, call.batch2), call.input).expand(call.shape)


@rule("addr")
def add_outer(trace: Trace, call: Call) -> Label:
    """matrix + x yᵀ."""
    return trace.add(contract(trace, "X,Y->XY", call.vec1, call.vec2), call.input).expand(call.shape)


@rule("outer ger")
def outer(trace: Trace, call: Call) -> Label:
    """x yᵀ."""
    left, right = list(call.arguments.values())[:2]
    return contract(trace, "X,Y->XY", left, right)


@rule("einsum")
def einsum(trace: Trace, call: Call) -> Label:
    """Any einsum without repeated letters in one operand, operands taken from left to right."""
    operands = list(call.tensors)
    inputs, _, output = call.equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    ranks = [len(operand.shape) for operand in operands]
    spare = [letter for letter in ascii_letters if letter not in inputs]
    widths = [rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    ellipsis = "".join(spare[: max(widths)])
    if "->" not in call.equation:
        letters = inputs.replace(",", "").replace(".", "")
        output = "..." + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    terms = [term.replace("...", ellipsis[len(ellipsis) - width :]) for term, width in zip(terms, widths, strict=True)]
    output = output.replace("...", ellipsis)
    if any(len(set(term)) < len(term) for term in terms):
        for operand in operands:
            trace.pin(operand, "einsum takes a diagonal")
        return Label(call.shape)
    value, axes = operands[0], terms[0]
    for i in range(1, len(operands)):
        needed = set(output).union(*terms[i + 1 :])
        kept = "".join(axis for axis in dict.fromkeys(axes + terms[i]) if axis in needed)
        value, axes = contract(trace, f"{axes},{terms[i]}->{kept}", value, operands[i]), kept
    label = trace.merge(value, [i for i, axis in enumerate(axes) if axis not in output])
    return _pick(label, axes, output).expand(call.shape)


@rule("bilinear")
def bilinear(trace: Trace, call: Call) -> Label:
    """x1ᵀ W_o x2 + b, W of shape (out, in1, in2)."""
    batch = ascii_letters[: len(call.input1.shape) - 1]
    half = contract(trace, f"{batch}X,OXY->{batch}OY", call.input1, call.weight)
    label = contract(trace, f"{batch}OY,{batch}Y->{batch}O", half, call.input2)
    return (label if call.bias is None else trace.add(label, call.bias)).expand(call.shape)


@rule("embedding_bag")
def embedding_bag(trace: Trace, call: Call) -> list[Label]:
    """Sums, means or maxima of rows of a table: they all scale alike."""
    if call.per_sample_weights is not None:
        trace.pin(call.per_sample_weights)
    rows = trace.merge(call.weight, [0])
    return [rows.expand(tuple(call.result[0].shape)), *(Label(tuple(other.shape)) for other in call.result[1:])]


# --------------------------------------------------------------------------------------------------------- convolutions


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution")
def convolution(trace: Trace, call: Call) -> Label:
    """Convolutions: W of shape (out, in / groups, *kernel), or (in, out / groups, *kernel). Zeros around fit any scale."""
    weight, groups = call.weight, call.get("groups", 1)
    transposed = call.get("transposed", "transpose" in call.operator_name)
    rank = len(weight.shape) - 2
    label = trace.merge(call.input, [-1 - axis for axis in range(rank)])
    channels = move_one(lambda ids: ids.reshape(*ids.shape[: ids.dim() - rank - 1], groups, -1), label)
    batch = "b" if len(channels.shape) == 3 else ""
    first, second = weight.shape[:2]
    shape = (groups, first // groups, second)
    equation = f"{batch}gi,{'gio' if transposed else 'goi'}->{batch}go"
    if isinstance(weight, (Source, View)) and trace.is_unlabelled(weight):
        kernel = Source((), shape, "parameter", torch.float32)  # stands for the weight summed over its window
        out = contract(trace, equation, channels, kernel)
        if kernel.label is None:  # the input is zero throughout
            trace.idle.append(weight)
        else:
            whole = move_one(lambda ids: ids.reshape(first, second, *[1] * rank), kernel.label)
            trace.assign(weight, whole.expand(weight.shape))
    else:
        folded = move_one(lambda ids: ids.reshape(shape), trace.merge(weight, range(2, 2 + rank)))
        out = contract(trace, equation, channels, folded)
    out = move_one(lambda ids: ids.flatten(-2), out)
    if call.bias is not None:
        out = trace.add(out, call.bias)
    return move_one(lambda ids: ids.reshape(*ids.shape, *[1] * rank), out).expand(call.shape)


# ------------------------------------------------------------------------------------------------------------ attention


@rule("scaled_dot_product_attention")
def attention(trace: Trace, call: Call) -> Label:
    """softmax(q·kᵀ)·v: scores must not scale, so q and k have reciprocal labels; values pass through."""
    query, key, value = (trace.label(part) for part in (call.query, call.key, call.value))
    if call.enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (move_one(lambda ids: ids.repeat_interleave(repeats, -3), part) for part in (key, value))
    batch = ascii_letters[: len(call.shape) - 2]
    space = batch + "XYZ"
    rank = len(call.shape)
    query, key, value = (part.expand((1,) * (rank - len(part.shape)) + part.shape) for part in (query, key, value))
    scores = _place(query, batch + "XZ", space).times(_place(key, batch + "YZ", space))
    trace.pin(scores, "softmax of attention scores")
    if call.attn_mask is not None:
        trace.pin(call.attn_mask, "added to attention scores")
    return Label(call.shape, trace.merge(value, [-2]).factors)
