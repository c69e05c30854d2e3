"""Products of several matrices, powers, and functions of a matrix as a whole."""

from fractions import Fraction
from string import ascii_letters

import torch

from equinorm.discovery.labels import Label, move_one
from equinorm.discovery.rules.contraction import contract, matrix_product
from equinorm.discovery.rules.registry import Call, Rule, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import Constant

_POWERS = 64
"""Largest power of a matrix that is followed."""


@rule("linalg_multi_dot chain_matmul")
def chain(trace: Trace, call: Call) -> Label:
    """Products of matrices, in whatever order: the first and the last may be vectors."""
    value, *others = call.get("tensors", call.get("matrices"))
    for other in others:
        value = matrix_product(trace, value, other)
    return trace.label(value)


@rule("matrix_power linalg_matrix_power")
def matrix_power(trace: Trace, call: Call) -> Label:
    """A times itself; inverses depend on pivots and pin."""
    if call.n < 0:
        return trace.pin(call.input, "inverts a matrix")
    if call.n == 0:
        return Label(call.shape)
    label = once = trace.label(call.input)
    for _ in range(min(call.n, _POWERS) - 1):
        label = trace.reduced(matrix_product(trace, label, once))
    return label if call.n <= _POWERS else trace.pin(label, f"a power above {_POWERS}")


@rule("tensordot")
def tensordot(trace: Trace, call: Call) -> Label:
    """Sums over pairs of axes, then the other axes of both."""
    left, right = call.input, call.other
    ranks = len(left.shape), len(right.shape)
    first, second = list(ascii_letters[: ranks[0]]), list(ascii_letters[ranks[0] : sum(ranks)])
    for one, other in zip(call.dims_self, call.dims_other, strict=True):
        second[other % ranks[1]] = first[one % ranks[0]]
    shared = set(first) & set(second)
    out = "".join(axis for axis in first + second if axis not in shared)
    return contract(trace, f"{''.join(first)},{''.join(second)}->{out}", left, right)


@rule("kron")
def kron(trace: Trace, call: Call) -> Label:
    """Every entry of one times all of the other: (a, b) ⊗ (c, d) has shape (a·c, b·d)."""
    left, right = (trace.label(part) for part in (call.input, call.other))
    rank = max(len(left.shape), len(right.shape))
    left, right = (part.expand((1,) * (rank - len(part.shape)) + part.shape) for part in (left, right))
    left = left.reshape([size for pair in zip(left.shape, [1] * rank, strict=True) for size in pair])
    right = right.reshape([size for pair in zip([1] * rank, right.shape, strict=True) for size in pair])
    return left.times(right).reshape(call.shape)


@rule("linalg_vecdot")
def vector_dot(trace: Trace, call: Call) -> Label:
    """Sums of products along `dim`."""
    product = trace.label(call.x).times(trace.label(call.y))
    axis = call.dim % len(product.shape)
    label = trace.merge(product, [axis])
    return label.reshape([size for other, size in enumerate(label.shape) if other != axis])


@rule("linalg_cross cross")
def cross(trace: Trace, call: Call) -> Label:
    """z_i = Σ_jk ε_ijk x_j y_k along an axis of size 3."""
    dim = call.dim if call.dim is not None else list(call.input.shape).index(3)
    left, right = trace.label(call.input), trace.label(call.other)
    axis = dim % len(call.shape)
    left, right = (move_one(lambda ids: ids.movedim(axis, -1), part.expand(call.shape)) for part in (left, right))
    signs = torch.zeros(3, 3, 3)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        signs[i, j, k], signs[i, k, j] = 1.0, -1.0
    batch = ascii_letters[: len(call.shape) - 1]
    half = contract(trace, f"XYZ,{batch}Y->{batch}XZ", Constant(signs), left)
    label = contract(trace, f"{batch}XZ,{batch}Z->{batch}X", half, right)
    return move_one(lambda ids: ids.movedim(-1, axis), label)


MATRICES: dict[Fraction | int, str] = {
    1: "linalg_svdvals linalg_eigvalsh",
    Fraction(1, 2): "linalg_cholesky cholesky",
    -1: "linalg_inv inverse linalg_inv_ex linalg_tensorinv",
}
"""Functions of matrices as wholes, by degree: their entries must scale alike, as pivots depend on ratios of entries."""


def _of_matrices(degree: Fraction | int) -> Rule:
    def of_matrices(trace: Trace, call: Call) -> Label | list[Label]:
        rank = len(call.input.shape)
        label = trace.merge(call.input, [-2, -1] if call.get("ind") is None else range(rank)).power(degree)
        result, *others = [call.result] if isinstance(call.result, torch.Tensor) else call.result
        lead = [] if call.get("ind") is not None else list(label.shape[:-2])
        label = label.reshape((*lead, *[1] * (len(result.shape) - len(lead)))).expand(tuple(result.shape))
        return [label, *(Label(tuple(other.shape)) for other in others)] if others else label

    return of_matrices


for _degree, _names in MATRICES.items():
    rule(_names)(_of_matrices(_degree))


@rule("linalg_det det")
def determinant(trace: Trace, call: Call) -> Label:
    """Of degree n in a matrix of n rows."""
    return trace.merge(call.input, [-2, -1]).power(call.input.shape[-1]).reshape(call.shape)
