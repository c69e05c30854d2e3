"""Rules of less common homogeneous operations against ground truth: what each frees, and what its arguments forbid."""

import math

import pytest
import torch
import torch.nn.functional as F
from operator_samples import Wrapped, call, check_sound, moved, true_dimension
from torch import Tensor, nn

import equinorm

aten, INF = torch.ops.aten, math.inf


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + 7 * len(shape)))


def unpooled(x: Tensor) -> Tensor:
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, places, 2)


WINDOW = torch.hamming_window(4, dtype=torch.float64)
LENGTHS = torch.tensor([1, 3])
ADJACENT = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 3.0]], dtype=torch.float64).to_sparse()
SAMPLES = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
STEPS = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)

COMPLETE = {
    "tensordot, one axis": (lambda x, y: torch.tensordot(x, y, dims=1), (rand(2, 3), rand(3, 2))),
    "tensordot, crossed axes": (lambda x, y: torch.tensordot(x, y, ([0, 2], [1, 0])), (rand(2, 3, 2), rand(2, 2, 3))),
    "tensordot, no axis": (lambda x, y: torch.tensordot(x, y, dims=0), (rand(2), rand(3))),
    "kron": (torch.kron, (rand(2, 3), rand(2, 2))),
    "kron of ranks that differ": (torch.kron, (rand(2), rand(2, 3))),
    "chain of matrices": (lambda x, y, z: torch.linalg.multi_dot([x, y, z]), (rand(2, 3), rand(3, 2), rand(2, 3))),
    "chain from a vector to a vector": (lambda x, y, z: torch.linalg.multi_dot([x, y, z]), (rand(3), rand(3, 2), rand(2))),
    "matrix cubed": (lambda x: torch.linalg.matrix_power(x, 3), (rand(3, 3),)),
    "matrix to the first": (lambda x: torch.matrix_power(x, 1), (rand(2, 3, 3),)),
    "dot products along an axis": (lambda x, y: torch.linalg.vecdot(x, y, dim=0), (rand(3, 2), rand(3, 1))),
    "cross product": (torch.linalg.cross, (rand(2, 3), rand(2, 3))),
    "cross product along the first axis": (lambda x, y: torch.linalg.cross(x, y, dim=0), (rand(3, 2), rand(3, 1))),
    "addbmm": (torch.addbmm, (rand(2, 3), rand(2, 2, 2), rand(2, 2, 3))),
    "addr": (torch.addr, (rand(2, 3), rand(2), rand(3))),
    "sparse times dense": (lambda x: torch.sparse.mm(ADJACENT, x), (rand(3, 2),)),
    "sum with sparse times dense": (lambda b, x: torch.sparse.addmm(b, ADJACENT, x), (rand(3, 2), rand(3, 2))),
    "product of all": (torch.prod, (rand(2, 2),)),
    "product along an axis, kept": (lambda x: x.prod(1, keepdim=True), (rand(2, 3),)),
    "products so far": (lambda x: x.cumprod(1), (rand(2, 3),)),
    "quantiles": (lambda x: torch.quantile(x, torch.tensor([0.3, 0.8], dtype=x.dtype), dim=1), (rand(3, 4),)),
    "quantile of all": (lambda x: torch.nanquantile(x, 0.3, keepdim=True), (rand(2, 3),)),
    "trapezoids": (lambda y: torch.trapezoid(y, STEPS, dim=1), (rand(2, 4, 2),)),
    "trapezoids over widths": (lambda y, x: torch.trapezoid(y, x), (rand(2, 4), rand(4))),
    "trapezoids so far": (lambda y: torch.cumulative_trapezoid(y, dx=0.5), (rand(2, 4),)),
    "Fourier transform of the batch": (lambda x: torch.fft.fftn(x, dim=(0,)), (rand(3, 2),)),
    "Fourier transform of the last axes": (lambda x: torch.fft.fftn(x, s=(2,), dim=(1,)), (rand(3, 2),)),
    "half of a Fourier transform": (lambda x: torch.fft.ihfft(x), (rand(2, 4),)),
    "zero frequency in the middle": (lambda x: torch.fft.fftshift(x, dim=1), (rand(2, 3),)),
    "spectrogram": (lambda x: torch.stft(x, 4, window=WINDOW, return_complex=True, center=False), (rand(2, 9),)),
    "spectrogram, padded": (lambda x: torch.stft(x, 4, window=WINDOW, return_complex=True), (rand(9),)),
    "spectrogram, its window a weight": (lambda x, w: torch.stft(x, 4, window=w, return_complex=True), (rand(2, 9), rand(4))),
    "fractional max pool": (
        lambda x: F.fractional_max_pool2d(x, 3, output_size=2, _random_samples=SAMPLES), (rand(2, 2, 4, 4),),
    ),
    "ldexp": (lambda x: torch.ldexp(x, torch.tensor([1, -2, 3])), (rand(2, 3),)),
    "remainder of a quotient": (lambda x, y: torch.fmod(x, y), (rand(2, 3), rand(3) / 7)),
    "remainder, of the divisor's sign": (lambda x, y: torch.remainder(x, y), (rand(2, 3), rand(3) / 7)),
    "no nan": (lambda x: torch.nan_to_num(x, nan=0.0, posinf=INF, neginf=-INF), (rand(2, 3),)),
    "step": (lambda x: torch.heaviside(x, torch.tensor(0.5, dtype=x.dtype)), (rand(2, 3),)),
    "polar": (lambda r: torch.polar(r.abs(), torch.tensor([0.3, 1.0, 2.0], dtype=r.dtype)), (rand(2, 3),)),
    "in degrees": (torch.rad2deg, (rand(2, 3),)),
    "distance": (lambda x, y: torch.dist(x, y, p=3.0), (rand(2, 2), rand(2, 2))),
    "distances of all pairs": (F.pdist, (rand(3, 2),)),
    "distances of rows": (lambda x, y: F.pairwise_distance(x, y, eps=0.0), (rand(3, 2), rand(3, 2))),
    "squared error, each": (lambda x, y: F.mse_loss(x, y, reduction="none"), (rand(2, 3), rand(2, 3))),
    "absolute error": (F.l1_loss, (rand(2, 2), rand(2, 2))),
    "derivatives": (lambda x: torch.gradient(x, dim=1), (rand(2, 3),)),
    "derivatives along both axes": (lambda x: torch.gradient(x, spacing=0.5), (rand(2, 3),)),
    "sum of a diagonal": (torch.trace, (rand(3, 2),)),
    "sum to a size": (lambda x: x.sum_to_size(1, 3), (rand(2, 2, 3),)),
    "real power": (lambda x: torch.float_power(x.abs(), 1.5), (rand(2, 3),)),
    "blocks on a diagonal": (lambda x, y: torch.block_diag(x, y), (rand(2, 2), rand(1, 2))),
    "broadcast": (lambda x: x.broadcast_to(3, 2), (rand(2),)),
    "all pairs": (lambda x, y: torch.cartesian_prod(x, y), (rand(2), rand(3))),
    "into a diagonal": (lambda x, y: x.diagonal_scatter(y), (rand(2, 2), rand(2))),
    "times its conjugate": (lambda x, y: (lambda z: z * z.conj() * z)(torch.complex(x, y)), (rand(2, 3), rand(2, 3))),
    "conjugate transpose": (lambda x: x.mH, (rand(2, 3),)),
    "singular values": (torch.linalg.svdvals, (rand(3, 2),)),
}  # fmt: skip
"""Where every rescaling is found."""


@pytest.mark.parametrize("title", COMPLETE)
def test_all_of_the_truth_is_found(title):
    if "quantile" in title and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 cannot export a quantile")
    operation, operands = COMPLETE[title]
    sample = call(title, operation, *operands)
    model = Wrapped(sample)
    found = check_sound(model, title)
    assert found == true_dimension(model, found, draws=200)
    assert found > 0
    for raw in range(len(operands)):
        check_sound(Wrapped(sample, raw=(raw,)), f"{title}, operand {raw} a parameter")


# title: (operation, operands, dimension found); what is missed is said beside it
PARTIAL = {
    "inverse": (torch.linalg.inv, (rand(2, 2),), 1),  # rows and columns apart: pivots, and thereby rounding, would change
    "determinant": (torch.linalg.det, (rand(2, 2),), 1),  # the same
    "Cholesky factor": (lambda x: torch.linalg.cholesky(x @ x.mT), (rand(2, 3),), 1),  # the same
    "spectrogram inverted": (
        lambda x: torch.istft(torch.stft(x, 4, window=WINDOW, return_complex=True), 4, window=WINDOW), (rand(2, 9),), 2,
    ),  # it is the identity
    "max unpool": (unpooled, (rand(1, 2, 4, 4),), 2),  # windows that do not overlap apart
    "sums of segments": (
        lambda x: torch.segment_reduce(x, "sum", lengths=LENGTHS, unsafe=True), (rand(4, 2),), 2,
    ),  # each segment by itself
    "a number in place of infinity": (torch.nan_to_num, (rand(2, 3),), 0),  # exact while everything is finite
    "distances of rows, eps": (F.pairwise_distance, (rand(3, 2), rand(3, 2)), 0),
    "a number in place of nan": (lambda x: torch.nan_to_num(x, nan=1.0, posinf=INF, neginf=-INF), (rand(2, 3),), 0),
    "products of many": (lambda x: x.cumprod(0), (rand(65, 1),), 0),
    "matrix to the power -1": (lambda x: torch.linalg.matrix_power(x, -1), (rand(2, 2),), 0),
    "remainder of a number": (lambda x: torch.fmod(x, 0.3), (rand(2, 3),), 0),
    "power of two": (lambda x: torch.ldexp(torch.tensor([1.0], dtype=x.dtype), x), (rand(2, 3),), 0),
    "angle": (lambda x: torch.polar(torch.ones_like(x), x), (rand(2, 3),), 0),
    "segments that start at 1": (
        lambda x: torch.segment_reduce(x, "sum", lengths=LENGTHS, unsafe=True, initial=1.0), (rand(4, 2),), 0,
    ),
    "which quantile": (lambda x, q: torch.quantile(x, q.abs().clamp(max=1.0), dim=0), (rand(3, 2), rand(1)), 2),
    "step, at 0 another": (lambda x, y: torch.heaviside(x.relu(), y), (rand(2, 3), rand(2, 3)), 6),
}  # fmt: skip
"""Where not every rescaling is found, or there is none."""


@pytest.mark.parametrize("title", PARTIAL)
def test_what_arguments_forbid_is_not_free(title):
    if "quantile" in title and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 cannot export a quantile")
    operation, operands, dimension = PARTIAL[title]
    model = Wrapped(call(title, operation, *operands))
    assert check_sound(model, title) == dimension
    assert not dimension or dimension <= true_dimension(model, dimension, draws=20)


EXACT = ["tensordot, one axis", "kron", "matrix cubed", "products so far", "trapezoids", "max unpool", "sparse times dense"]


@pytest.mark.parametrize("title", EXACT)
def test_powers_of_two_are_exact(title):
    operation, operands = {**COMPLETE, "max unpool": PARTIAL["max unpool"][:2]}[title]
    model = Wrapped(call(title, operation, *operands))
    twin, free = moved(model, model.inputs, 3.0, power_of_two=True)
    assert free > 0
    assert equinorm.deviation(twin, model, model.inputs) == 0.0


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_a_sparse_matrix_made_in_a_forward_is_no_obstacle():
    places = torch.tensor([[0, 1, 2], [1, 2, 0]])
    model = Wrapped(call("sparse", lambda x: torch.sparse_coo_tensor(places, x.new_ones(3), (3, 3)) @ x, rand(3, 2)))
    assert check_sound(model, "sparse") == 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).mT).softmax(-1) @ self.value(x)


def test_key_biases_move_with_their_keys_although_softmax_ignores_them():
    # A key bias adds q·b to every score of a row, and softmax does not see it: any b would do. It is tied to its key all the
    # same: left to itself it would have no least norm but 0, so that no balance could gain from it.
    model, x = Attention(), (rand(2, 5, 3),)
    with torch.no_grad():
        expected = model(*x)
        model.key.bias.mul_(3.0)
        assert (model(*x) - expected).abs().max() < 1e-14
    group = equinorm.symmetries(model, x)
    of = {scaling.name: scaling for scaling in group.scalings}
    assert group.num_free == 4
    assert of["key.bias"].free().tolist() == of["key.weight"].free().tolist() == [1, 2, 3, 4]
