"""Scores of which many may be equal, as zeros of ReLU are: the place of the largest then tells which of them came first."""

import torch
from torch import Tensor, fx

from equinorm.discovery.rules import key

_MANY_TO_ONE = """relu relu6 hardtanh hardsigmoid hardswish hardshrink softshrink threshold clamp clamp_min clamp_max round
floor ceil trunc sign sgn heaviside dropout expand broadcast_to expand_as repeat tile repeat_interleave"""

_ONE_TO_ONE = """view reshape flatten unflatten unsqueeze squeeze permute transpose t select slice clone contiguous detach alias
to _to_copy softmax log_softmax _softmax _log_softmax sigmoid tanh exp log neg add sub mul div"""


def may_be_equal(node: fx.Node) -> bool:
    """Were a value's entries cut to a few numbers, and none since made different by others?"""
    while True:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point():
            return True
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        name = key(node.target)
        if name.removesuffix("_") in _MANY_TO_ONE.split():
            return True
        if name.removesuffix("_") not in _ONE_TO_ONE.split() or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
