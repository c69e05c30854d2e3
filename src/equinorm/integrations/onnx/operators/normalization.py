"""Normalization."""

from torch import Tensor
from torch.nn import functional as F

from equinorm.integrations.onnx.operators.registry import NodeCall, operator


@operator("BatchNormalization", "epsilon momentum spatial training_mode", weights=(1, 2), statistics=(3, 4))
def batch_normalization(call: NodeCall, x: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """γ·(x − mean)/√(variance + ε) + β over axis 1."""
    call.need(call.opset >= 7 and call.outputs == 1, "an old definition, or statistics that are returned")
    call.need(not call.get("training_mode", 0) and call.get("spatial", 1) == 1, "statistics of the batch, or of each place")
    mean, variance = mean.detach(), variance.detach()  # which PyTorch wants of weights that stand here too
    return F.batch_norm(x, mean, variance, gain, shift, False, 0.0, call.get("epsilon", 1e-5))


@operator("InstanceNormalization", "epsilon", weights=(1, 2))
def instance_normalization(call: NodeCall, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """γ·(x − mean)/√(variance + ε) + β, with statistics of each map."""
    return F.instance_norm(x, weight=gain, bias=shift, use_input_stats=True, eps=call.get("epsilon", 1e-5))


@operator("LayerNormalization", "axis epsilon stash_type", weights=(1, 2))
def layer_normalization(call: NodeCall, x: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
    """γ·(x − mean)/√(variance + ε) + β over the last axes."""
    call.need(call.read == 1, "returns its statistics")
    shape = list(x.shape[call.get("axis", -1) % x.dim() :])
    call.need(list(gain.shape) == shape and (shift is None or list(shift.shape) == shape), "a gain that is broadcast")
    return F.layer_norm(x, shape, gain, shift, call.get("epsilon", 1e-5))


@operator("GroupNormalization", "epsilon num_groups stash_type", weights=(1, 2))
def group_normalization(call: NodeCall, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """γ·(x − mean)/√(variance + ε) + β within groups of channels, one γ and β for each channel."""
    call.need(call.opset >= 21, "one gain for each group")
    return F.group_norm(x, call.get("num_groups"), gain, shift, call.get("epsilon", 1e-5))
