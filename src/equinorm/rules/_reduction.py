"""Operations along axes: sums, means, maxima, norms, pooling, interpolation. What is reduced together must scale alike."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from equinorm._labels import Factor, Label
from equinorm._trace import Trace
from equinorm._values import squared
from equinorm.rules._registry import Call, Rule, rule

REDUCTIONS: dict[int, str] = {
    1: "sum mean nansum nanmean amax amin max min median nanmedian mode kthvalue std std_mean aminmax",
    2: "var",
    0: "argmax argmin",
}
"""Reductions over `dim` (all axes where it is absent), by degree of homogeneity in what they reduce."""

ALONG = "cumsum cummax cummin sort topk msort fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2"
"""Homogeneous functions of degree 1 along `dim` that keep the axis."""

SPATIAL = (
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
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


@rule("prod")
def prod(trace: Trace, call: Call) -> Label | list[Label]:
    """The product of n entries that scale alike: degree n."""
    label = trace.label(call.input)
    axes = _axes(call, len(label.shape))
    count = math.prod(label.shape[axis] for axis in axes)
    return _results(call, trace.merge(label, axes).power(count), axes)


@rule(ALONG)
def along(trace: Trace, call: Call) -> Label | list[Label]:
    """Functions along axes that they keep."""
    rank = len(trace.label(call.input).shape)
    default = 0 if call.operator.overloadpacket.__name__ == "msort" else -1
    return _results(call, trace.merge(call.input, _axes(call, rank, default)))


@rule(SPATIAL)
def spatial(trace: Trace, call: Call) -> Label | list[Label]:
    """Pooling and interpolation: each channel's map must scale as one. Padding by 0 or −inf fits any scale."""
    name = call.operator.overloadpacket.__name__
    rank = next(int(digit) for digit, letter in pairwise(name) if digit.isdigit() and letter == "d")
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
