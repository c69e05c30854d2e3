"""Operations along axes: sums, means, maxima, norms, pooling, interpolation. What is reduced together must scale alike."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from equinorm.discovery.classes import PINNED
from equinorm.discovery.labels import Factor, Label, compact, move_one, numbered
from equinorm.discovery.rules.registry import Call, Rule, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, squared

REDUCTIONS: dict[int, str] = {
    1: "sum mean nansum nanmean amax amin max min median nanmedian mode kthvalue std std_mean aminmax",
    2: "var",
    0: "argmax argmin",
}
"""Reductions over `dim` (all axes where it is absent), by degree of homogeneity in what they reduce."""

ALONG = (
    "cumsum cummax cummin sort topk msort fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 "
    "fft_irfft2 fft_hfft2 fft_ihfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn gradient"
)
"""Homogeneous functions of degree 1 along `dim` that keep the axis."""

SPATIAL = (
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa fractional_max_pool2d fractional_max_pool3d max_unpool2d max_unpool3d"
)
"""Homogeneous functions of degree 1 of each channel's map; the digit before the "d" counts its axes."""


def _axes(call: Call, rank: int, default: int | None = None) -> list[int]:
    dim = call.get("dim", default)
    if dim is None or dim == [] or rank == 0:
        return list(range(rank))
    return [axis % rank for axis in (dim if isinstance(dim, (list, tuple)) else [dim])]


def _results(call: Call, label: Label, axes: Sequence[int] = ()) -> Label | list[Label]:
    """A merged label at the shape of each result, without the axes that the result lacks. Indices along with them never do."""
    if isinstance(call.result, Tensor):
        return _fit(label, call.result, axes)
    floats = [result.dtype.is_floating_point or result.dtype.is_complex for result in call.result]
    return [
        _fit(label, result, axes) if scales else Label(tuple(result.shape))
        for result, scales in zip(call.result, floats, strict=True)
    ]


def _fit(label: Label, result: Tensor, axes: Sequence[int]) -> Label:
    shape = tuple(result.shape)
    kept = [axis for axis in range(len(label.shape)) if len(shape) == len(label.shape) or axis not in axes]
    return Label(shape, tuple(Factor(f.exponent, f.ids.reshape([f.ids.size(axis) for axis in kept])) for f in label.factors))


def _reduction(degree: int) -> Rule:
    def reduced(trace: Trace, call: Call) -> Label | list[Label]:
        if call.get("other") is not None:  # max(a, b) of two tensors
            return trace.add(call.input, call.other).expand(call.shape)
        axes = _axes(call, len(trace.label(call.input).shape))
        return _results(call, trace.merge(call.input, axes).power(degree), axes)

    return reduced


for _degree, _names in REDUCTIONS.items():
    rule(_names)(_reduction(_degree))


@rule("norm linalg_vector_norm linalg_norm linalg_matrix_norm frobenius_norm")
def norm(trace: Trace, call: Call) -> Label | list[Label]:
    """Norms have degree 1; the "norm" of order 0 counts entries."""
    order = call.get("ord", call.get("p", 2))
    squared(call.input)
    axes = _axes(call, len(trace.label(call.input).shape))
    return _results(call, trace.merge(call.input, axes).power(0 if order == 0 else 1), axes)


@rule("any all count_nonzero")
def tested(trace: Trace, call: Call) -> Label:
    """Questions about which entries are nonzero."""
    return Label(call.shape)


@rule("argsort")
def argsort(trace: Trace, call: Call) -> Label:
    """The order of entries that scale alike."""
    trace.merge(call.input, [call.get("dim", -1)])
    return Label(call.shape)


@rule("var_mean")
def var_mean(trace: Trace, call: Call) -> list[Label]:
    """Variance (degree 2) and mean (degree 1)."""
    axes = _axes(call, len(trace.label(call.input).shape))
    label = trace.merge(call.input, axes)
    return [_fit(label.power(2), call.result[0], axes), _fit(label, call.result[1], axes)]


_PRODUCTS = 64
"""Factors of a product from which on they must scale alike."""


@rule("prod")
def prod(trace: Trace, call: Call) -> Label | list[Label]:
    """The product of entries along axes: the product of their scales."""
    label = trace.label(call.input)
    axes = _axes(call, len(label.shape))
    count = math.prod(label.shape[axis] for axis in axes)
    if call.get("dim") is None and count > 1:
        label, axes = label.reshape((count,)), [0]
    if len(axes) != 1 or count > _PRODUCTS or not any(factor.varies(axes) for factor in label.factors):
        return _results(call, trace.merge(label, axes).power(count), axes)
    entries = [_entry(factor, axes[0], i) for factor in label.factors for i in range(count)]
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(label.shape))
    return _results(call, Label(shape, tuple(entries)), axes)


@rule("cumprod")
def cumprod(trace: Trace, call: Call) -> Label:
    """Products of the entries up to each: the products of their scales. Pinned along many entries."""
    label = trace.label(call.input)
    count = label.shape[call.dim] if label.shape else 1
    if count > _PRODUCTS:
        return trace.pin(label, f"a product of more than {_PRODUCTS} entries")
    if not label.shape:
        return label
    axis = call.dim % len(label.shape)
    places = numbered(count, axis, len(label.shape))
    entries = [_entry(factor, axis, i) for factor in label.factors for i in range(count)]
    since = [places >= i for _ in label.factors for i in range(count)]
    factors = [Factor(f.exponent, compact(torch.where(mask, f.ids, PINNED))) for f, mask in zip(entries, since, strict=True)]
    return Label(label.shape, tuple(factors))


def _entry(factor: Factor, axis: int, place: int) -> Factor:
    """The factor of one entry along an axis, which keeps size 1."""
    return Factor(factor.exponent, factor.ids.narrow(axis, place, 1) if factor.varies([axis]) else factor.ids)


@rule(ALONG)
def along(trace: Trace, call: Call) -> Label | list[Label]:
    """Functions along axes that they keep. Distances between entries are pinned."""
    rank = len(trace.label(call.input).shape)
    default = 0 if call.operator_name == "msort" else -1
    if call.get("s") is not None and call.get("dim") is None:
        axes = list(range(rank))[rank - len(call.s) :]
    else:
        axes = _axes(call, rank, None if "s" in call.arguments or "spacing" in call.arguments else default)
    spacing = call.get("spacing")
    for distance in spacing if isinstance(spacing, (list, tuple)) else []:
        trace.pin(distance, "distances between entries")
    return _results(call, trace.merge(call.input, axes))


@rule("quantile nanquantile")
def quantile(trace: Trace, call: Call) -> Label:
    """Quantiles along `dim`, or of all entries; several come on a new first axis."""
    if isinstance(call.q, VALUES):
        trace.pin(call.q, "which quantile is taken")
    rank = len(trace.label(call.input).shape)
    axes = _axes(call, rank)
    label = trace.merge(call.input, axes)
    kept = label.reshape([size for axis, size in enumerate(label.shape) if call.keepdim or axis not in axes])
    if call.dim is None and call.keepdim:
        kept = label.reshape((1,) * rank)
    return kept.expand(call.shape)


@rule("trapezoid trapz cumulative_trapezoid")
def trapezoid(trace: Trace, call: Call) -> Label:
    """Areas under y over x along `dim`: their scales multiply."""
    rank = len(trace.label(call.y).shape)
    axis = call.dim % rank
    label = trace.merge(call.y, [axis])
    if call.get("x") is not None:
        across = trace.label(call.x)
        if len(across.shape) == 1:
            across = across.reshape([across.shape[0] if other == axis else 1 for other in range(rank)])
        label = label.times(trace.merge(across, [axis - rank]))
    if len(call.shape) < rank:
        label = label.reshape([size for other, size in enumerate(label.shape) if other != axis])
    return label.expand(call.shape)


@rule("stft")
def stft(trace: Trace, call: Call) -> Label:
    """Fourier transforms of windows along the last axis: (…, time) to (…, frequencies, windows); real ones as pairs."""
    label = trace.merge(call.input, [-1])
    if call.window is not None:
        label = label.times(trace.merge(call.window, [0]))
    lead = label.shape[:-1]
    return label.reshape((*lead, *[1] * (len(call.shape) - len(lead)))).expand(call.shape)


@rule("istft")
def istft(trace: Trace, call: Call) -> Label:
    """The inverse of stft. It divides by the squared window, which is pinned because it is compared with a number."""
    if call.window is not None:
        trace.pin(call.window, "the window of an inverse transform")
    label = trace.merge(call.input, [-2, -1])
    return label.reshape((*label.shape[:-2], 1)).expand(call.shape)


@rule("trace")
def diagonal_sum(trace: Trace, call: Call) -> Label:
    """The sum of a diagonal."""
    return trace.merge(move_one(torch.diagonal, trace.label(call.input)), [0]).reshape(())


@rule("sum_to_size")
def summed_to_size(trace: Trace, call: Call) -> Label:
    """Sums over the axes that the size lacks or has as 1."""
    label = trace.label(call.input)
    lead = len(label.shape) - len(call.shape)
    axes = [axis for axis in range(len(label.shape)) if axis < lead or call.shape[axis - lead] == 1]
    return trace.merge(label, axes).reshape(call.shape)


@rule("segment_reduce")
def segments(trace: Trace, call: Call) -> Label:
    """Sums, means or extremes of segments along one axis."""
    label = trace.merge(call.data, [call.axis])
    if call.reduce == "prod":
        return trace.pin(label, "products of segments").expand(call.shape)
    return (label if call.initial is None else trace.add(label, call.initial)).expand(call.shape)


@rule("mse_loss l1_loss")
def losses(trace: Trace, call: Call) -> Label:
    """Squares or absolute values of differences; sums and means of them."""
    label = trace.add(call.input, call.target).power(2 if "mse" in call.operator_name else 1)
    return label if call.reduction == 0 else trace.merge(label, range(len(label.shape))).reshape(())


@rule(SPATIAL)
def spatial(trace: Trace, call: Call) -> Label | list[Label]:
    """Pooling and interpolation: each channel's map must scale as one. Padding by 0 or −inf fits any scale."""
    rank = next(int(digit) for digit, letter in pairwise(call.operator_name) if digit.isdigit() and letter == "d")
    if call.get("random_samples") is not None:
        trace.pin(call.random_samples, "places of windows")
    return _results(call, trace.merge(call.input, [-1 - axis for axis in range(rank)]))


@rule("grid_sampler grid_sampler_2d grid_sampler_3d")
def grid_sampler(trace: Trace, call: Call) -> Label | list[Label]:
    """Sampling a map at the places that a grid names; the grid is pinned."""
    trace.pin(call.grid, "coordinates of samples")
    return _results(call, trace.merge(call.input, list(range(2, len(call.shape)))))


@rule("col2im")
def fold(trace: Trace, call: Call) -> Label:
    """Overlapping patches are summed, each channel by itself: (…, channels · kernel, patches) to (…, channels, *space)."""
    label = trace.label(call.input)
    *lead, rows, patches = label.shape
    window = math.prod(call.kernel_size)
    merged = trace.merge(label.reshape((*lead, rows // window, window, patches)), [-2, -1])
    return merged.expand(call.shape)
