"""Normalization layers. Their eps has a unit of its own, so the input is pinned; gain and shift are the incoming weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equinorm.discovery.labels import Label, move_one
from equinorm.discovery.rules.registry import Call, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import Value, squared


def _normalize(trace: Trace, call: Call, value: Value, axes: Sequence[int] | None) -> Label:
    """Normalized over `axes`: of degree 0 in what is normalized together if eps is 0, otherwise pinned.

    Also pinned where statistics of the value are kept: `axes` is None, or they are further results.
    """
    if call.eps == 0 and axes is not None and isinstance(call.result, Tensor):
        trace.merge(value, axes)
        return Label(trace.label(value).shape)
    return trace.pin(value, "normalizes its input up to eps")


def _affine(trace: Trace, normalized: Label, gain: Value | None, shift: Value | None) -> Label:
    """normalized · gain + shift over the last axes."""
    result = normalized if gain is None else normalized.times(trace.label(gain))
    return result if shift is None else trace.add(result, shift)


def _affine_channels(trace: Trace, normalized: Label, gain: Value | None, shift: Value | None) -> Label:
    """normalized · gain + shift over axis 1."""
    last = move_one(lambda ids: ids.movedim(1, -1), normalized)
    return move_one(lambda ids: ids.movedim(-1, 1), _affine(trace, last, gain, shift))


def _with_statistics(call: Call, label: Label) -> Label | list[Label]:
    """The only result, or the first of several: statistics of a pinned input follow it."""
    if isinstance(call.result, Tensor):
        return label
    return [label, *(Label(tuple(other.shape)) for other in call.result[1:])]


@rule(
    "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training instance_norm"
)
def batch_norm(trace: Trace, call: Call) -> Label | list[Label]:
    """y = γ·(x − mean)/√(var + eps) + β over every axis but 1.

    Reading "affine" (exact in both modes): x is pinned and (γ, β) are the neuron's incoming weights. Reading "evaluation"
    (exact in evaluation mode): x and the running mean scale alike, γ and β on their own. Reading "statistics" (exact up to
    eps): the weights in front, γ, β, running mean and running variance scale together, the variance squared.
    """
    shape = trace.label(call.input).shape
    others = [axis for axis in range(len(shape)) if axis != 1]
    gain, shift = call.weight, call.bias
    mean, variance = call.get("running_mean"), call.get("running_var")
    if trace.batch_norm == "statistics" and gain is not None and "instance" not in call.operator_name:
        merged = trace.merge(call.input, others)
        channels = move_one(lambda ids: ids.flatten(), merged)
        for tensor, degree in ((mean, 1), (variance, 2), (gain, 1)):
            if tensor is not None:
                trace.assign(tensor, channels.power(degree))
        normalized = trace.label(call.input).expand(shape).definite()  # zeros become what the running mean makes of them
        result = Label(shape, merged.factors).definite() if shift is None else _affine_channels(trace, normalized, None, shift)
        return _with_statistics(call, result)
    batch_statistics = bool(call.get("training", call.get("use_input_stats", False)))
    if trace.batch_norm == "evaluation" and mean is not None and not batch_statistics:
        return _with_statistics(call, _as_affine_map(trace, call))
    normalized = _normalize(trace, call, call.input, others if batch_statistics and mean is None else None)
    for statistic in (mean, variance):
        if statistic is not None:
            trace.pin(statistic)
    return _with_statistics(call, _affine_channels(trace, normalized, gain, shift))


def _as_affine_map(trace: Trace, call: Call) -> Label:
    """γ·(x − mean)·factor + β with statistics that are kept: x and the mean scale alike, and the variance does not."""
    *others, channels = (shape := trace.label(call.input).shape)[:1] + shape[2:] + shape[1:2]
    merged = move_one(torch.flatten, trace.merge(call.input, [axis for axis in range(len(shape)) if axis != 1]))
    trace.assign(call.running_mean, merged)
    trace.pin(call.running_var, "its eps has a unit of its own")
    centred = trace.add(merged, call.running_mean)  # zeros less the mean are not zero
    result = _affine(trace, centred.expand((*others, channels)), call.weight, call.bias)
    return move_one(lambda ids: ids.movedim(-1, 1), result)


@rule("layer_norm native_layer_norm rms_norm _fused_rms_norm")
def layer_norm(trace: Trace, call: Call) -> Label | list[Label]:
    """Normalization over the last axes, then gain and shift there."""
    rank = len(call.normalized_shape)
    normalized = _normalize(trace, call, call.input, [-1 - axis for axis in range(rank)])
    return _with_statistics(call, _affine(trace, normalized, call.weight, call.get("bias")))


@rule("group_norm native_group_norm")
def group_norm(trace: Trace, call: Call) -> Label | list[Label]:
    """Normalization within groups of channels, then gain and shift for each channel."""
    normalized = _normalize(trace, call, call.input, list(range(1, len(trace.label(call.input).shape))))
    return _with_statistics(call, _affine_channels(trace, normalized, call.weight, call.bias))


@rule("_weight_norm _weight_norm_interface")
def weight_norm(trace: Trace, call: Call) -> Label | list[Label]:
    """w = g · v/‖v‖, norms over every axis but `dim` (over all for −1): of degree 0 in what is normalized together."""
    squared(call.v)
    v = trace.label(call.v)
    norms = trace.merge(v, [axis for axis in range(len(v.shape)) if axis != call.dim])
    label = trace.label(call.g).expand(v.shape)
    return label if isinstance(call.result, Tensor) else [label, norms]
