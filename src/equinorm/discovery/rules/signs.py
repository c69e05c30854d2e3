"""Rules of signs: what each operation asks if entries are multiplied by −1 instead of by positive numbers.

Labels are the same: an entry that scales as Π_f s_f^e_f flips by Π_f (−1)^(e_f·n_f) for whole numbers n_f. Sums, products and
movement have one law for both. An odd function, f(−x) = −f(x), hands a flip through; an even one swallows it. What is
homogeneous for positive numbers only, such as ReLU or a maximum, pins. Whatever is not listed pins.
"""

import math
from typing import Any

import torch
from torch import Tensor

from equinorm.discovery.labels import Label, move_one
from equinorm.discovery.rules import contraction, movement
from equinorm.discovery.rules.elementwise import IDENTITIES, exponent_of
from equinorm.discovery.rules.registry import TABLE, Call, Rule, key
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, Value

ODD = (
    "tanh sin tan asin atan sinh asinh atanh erf erfinv sgn sign round trunc fix hardshrink softshrink "
    "arcsin arctan arcsinh arctanh special_erf special_erfinv special_round"
)
"""Functions with f(−x) = −f(x)."""

EVEN = "abs absolute square cos cosh sinc special_sinc isnan isinf isfinite logical_not"
"""Functions with f(−x) = f(x)."""

LINEAR = (
    f"{IDENTITIES} conj _conj conj_physical real imag deg2rad rad2deg dropout feature_dropout native_dropout "
    "zeros_like new_zeros zero full_like new_full fill full zeros ones_like empty_like rand_like randn_like randint_like "
    "new_ones new_empty new_empty_strided to _to_copy type_as glu neg negative add sub subtract rsub mul multiply div divide "
    "true_divide where masked_fill copy lerp addcmul addcdiv view_as_complex view_as_real complex "
    "sum mean nansum nanmean cumsum fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn "
    "fft_ifftn fft_rfftn fft_irfftn avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
    "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa col2im trace sum_to_size prod "
    "index_add index_copy index_fill scatter scatter_add index_put _unsafe_index_put masked_scatter take diff "
    "linalg_multi_dot chain_matmul tensordot kron linalg_vecdot linalg_cross cross "
    "aten::rnn_tanh.input aten::gru.input aten::lstm.input rnn_tanh_cell gru_cell lstm_cell"
)
"""Operations of which the rule of scales holds for negative ones too."""

_BOTH = {name for name, rule in TABLE.items() if rule.__module__ in (movement.__name__, contraction.__name__)}
_BOTH -= {"embedding_bag", "pad", "constant_pad_nd"}

SIGNS: dict[str, Rule] = {name: TABLE[name] for name in (*LINEAR.split(), *_BOTH) if name in TABLE}
"""Rule of every known operator, as in `TABLE`."""


def _enter(names: str, rule: Rule) -> None:
    for name in names.split():
        SIGNS[name] = rule


def _odd(trace: Trace, call: Call) -> Label:
    """f(−x) = −f(x)."""
    return trace.label(call.input)


def _even(trace: Trace, call: Call) -> Any:
    """f(−x) = f(x), of each entry or of what stands along an axis, whatever the sign of each."""
    return _unflipped(call.result)


def _unflipped(result: Any) -> Any:
    return Label(tuple(result.shape)) if isinstance(result, Tensor) else [_unflipped(part) for part in result]


def _spread(trace: Trace, call: Call) -> Any:
    """Variances: those of −x are those of x; what is measured together must flip as one."""
    dims = call.get("dim")
    dims = range(len(call.input.shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    trace.merge(call.input, list(dims))
    return _unflipped(call.result)


def _power(trace: Trace, call: Call) -> Label:
    """x^k for a constant whole number k."""
    exponent = exponent_of(call)
    base = call.get("self")
    if not isinstance(exponent, (int, float)) or exponent != int(exponent) or not isinstance(base, VALUES):
        for value in (base, exponent):
            if isinstance(value, VALUES):
                trace.pin(value, "the exponent is no whole number")
        return Label(call.shape)
    return Label(call.shape) if int(exponent) % 2 == 0 else trace.label(base).expand(call.shape)


def _clamped(trace: Trace, call: Call) -> Label:
    """Clamping between −b and b."""
    low, high = call.get("min_val", call.get("min")), call.get("max_val", call.get("max"))
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low == -high:
        return trace.label(call.input)
    return trace.pin(call.input, "bounds that are not −b and b")


def _padded(trace: Trace, call: Call) -> Any:
    """Padding, but for infinities, which have a sign."""
    if math.isinf(call.get("value") or 0):
        trace.pin(call.input, "an infinity has a sign")
        return Label(call.shape)
    return TABLE[key(call.operator)](trace, call)


def _channels(trace: Trace, normalized: Label, gain: Value | None, shift: Value | None, axis: int) -> Label:
    """normalized · gain + shift, along an axis, or along the last ones for −1."""
    result = move_one(lambda ids: ids.movedim(axis, -1), normalized) if axis > 0 else normalized
    result = result if gain is None else result.times(trace.label(gain))
    result = result if shift is None else trace.add(result, shift)
    return move_one(lambda ids: ids.movedim(-1, axis), result) if axis > 0 else result


def _first(call: Call, label: Label) -> Any:
    """The only result, or the first of several."""
    return label if isinstance(call.result, Tensor) else [label, *map(_unflipped, call.result[1:])]


def _batch_norm(trace: Trace, call: Call) -> Any:
    """γ·(x − mean)/√(var + eps) + β: x and the running mean flip together, γ undoes it; γ and β are incoming weights."""
    shape = trace.label(call.input).shape
    merged = trace.merge(call.input, [axis for axis in range(len(shape)) if axis != 1])
    mean = call.get("running_mean")
    if mean is not None:
        trace.assign(mean, move_one(torch.flatten, Label((1, shape[1], *[1] * (len(shape) - 2)), merged.factors)))
    if call.get("running_var") is not None:
        trace.pin(call.running_var)
    result = _channels(trace, Label(shape, merged.factors).definite(), call.weight, call.bias, 1)
    if not isinstance(call.result, Tensor):
        trace.pin(merged, "its statistics are read")
    return _first(call, result)


def _layer_norm(trace: Trace, call: Call) -> Any:
    """A mean is taken out: entries that are normalized together flip as one."""
    rank = len(call.normalized_shape)
    label = trace.label(call.input)
    merged = trace.merge(label, [-1 - axis for axis in range(rank)])
    normalized = Label(label.shape, merged.factors).definite()
    return _first(call, _channels(trace, normalized, call.weight, call.get("bias"), -1))


def _rms_norm(trace: Trace, call: Call) -> Any:
    """Divided by a root of squares, which no flip changes."""
    return _first(call, _channels(trace, trace.label(call.input).definite(), call.weight, None, -1))


def _group_norm(trace: Trace, call: Call) -> Any:
    """As layer normalization; all groups flip as one here."""
    label = trace.label(call.input)
    merged = trace.merge(label, range(1, len(label.shape)))
    return _first(call, _channels(trace, Label(label.shape, merged.factors).definite(), call.weight, call.bias, 1))


def _weight_norm(trace: Trace, call: Call) -> Any:
    """g · v/‖v‖: norms do not see flips."""
    return _first(call, trace.label(call.v).times(trace.label(call.g)))


_enter(ODD, _odd)
_enter("_weight_norm _weight_norm_interface", _weight_norm)
_enter(EVEN, _even)
_enter("norm linalg_vector_norm", _even)
_enter("var std", _spread)
_enter("pow float_power", _power)
_enter("clamp clip hardtanh", _clamped)
_enter("pad constant_pad_nd", _padded)
_enter(
    "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training instance_norm",
    _batch_norm,
)
_enter("layer_norm native_layer_norm", _layer_norm)
_enter("rms_norm _fused_rms_norm", _rms_norm)
_enter("group_norm native_group_norm", _group_norm)
