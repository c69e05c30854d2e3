"""Operators on each entry by itself."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from equinorm.integrations.onnx.operators.registry import NodeCall, operator

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}

VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda call, x: function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda call, left, right: function(left, right)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda call, *parts: functools.reduce(function, parts)


for _name, _function in UNARY.items():
    operator(_name)(_unary(_function))
for _name, _function in BINARY.items():
    operator(_name)(_binary(_function))
for _name, _function in VARIADIC.items():
    operator(_name)(_variadic(_function))


@operator("Mean")
def mean(call: NodeCall, *parts: Tensor) -> Tensor:
    """The mean of several tensors."""
    return functools.reduce(torch.add, parts) / len(parts)


@operator("Div")
def divide(call: NodeCall, left: Tensor, right: Tensor) -> Tensor:
    """x / y; of integers, rounded towards zero."""
    return torch.div(left, right, rounding_mode=None if left.is_floating_point() else "trunc")


@operator("Mod", "fmod")
def modulo(call: NodeCall, left: Tensor, right: Tensor) -> Tensor:
    """The remainder, with the sign of the divisor, or of the dividend if `fmod` is set."""
    return torch.fmod(left, right) if call.get("fmod", 0) else torch.remainder(left, right)


@operator("Pow")
def power(call: NodeCall, base: Tensor, exponent: Tensor) -> Tensor:
    """x^k, in the dtype of x."""
    if exponent.dim() == 1 and exponent.numel() == 1:
        exponent = exponent.reshape(())
    return torch.pow(base, exponent).to(base.dtype)


@operator("Where")
def where(call: NodeCall, condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """A choice between two."""
    return torch.where(condition, chosen, other)


@operator("LeakyRelu", "alpha")
def leaky_relu(call: NodeCall, x: Tensor) -> Tensor:
    """x where it is positive, else α·x."""
    return F.leaky_relu(x, call.get("alpha", 0.01))


@operator("PRelu", weights=(1,))
def prelu(call: NodeCall, x: Tensor, slope: Tensor) -> Tensor:
    """x where it is positive, else slope·x, the slope broadcast to x."""
    if slope.numel() == 1:
        return F.prelu(x, slope.reshape(1))
    axis = slope.dim() - x.dim() + 1  # of the slope, which channels are
    if x.dim() > 1 and axis >= 0 and slope.numel() == slope.shape[axis] == x.shape[1]:
        return F.prelu(x, slope.reshape(-1))
    return torch.relu(x) - slope * torch.relu(-x)


@operator("ThresholdedRelu", "alpha")
def thresholded_relu(call: NodeCall, x: Tensor) -> Tensor:
    """x where it is above α, else 0."""
    return F.threshold(x, call.get("alpha", 1.0), 0.0)


@operator("Elu", "alpha")
def elu(call: NodeCall, x: Tensor) -> Tensor:
    """x where it is positive, else α·(e^x − 1)."""
    return F.elu(x, call.get("alpha", 1.0))


@operator("Celu", "alpha")
def celu(call: NodeCall, x: Tensor) -> Tensor:
    """max(x, 0) + min(0, α·(e^(x/α) − 1))."""
    return F.celu(x, call.get("alpha", 1.0))


@operator("Selu", "alpha gamma")
def selu(call: NodeCall, x: Tensor) -> Tensor:
    """γ·x where it is positive, else γ·α·(e^x − 1)."""
    gamma, alpha = call.get("gamma", 1.0507009873554805), call.get("alpha", 1.6732632423543772)
    return gamma * F.elu(x, alpha)


@operator("Gelu", "approximate")
def gelu(call: NodeCall, x: Tensor) -> Tensor:
    """x·Φ(x), or its approximation by tanh."""
    return F.gelu(x, approximate=call.get("approximate", "none"))


@operator("HardSigmoid", "alpha beta")
def hard_sigmoid(call: NodeCall, x: Tensor) -> Tensor:
    """α·x + β between 0 and 1."""
    return torch.clamp(call.get("alpha", 0.2) * x + call.get("beta", 0.5), 0, 1)


@operator("Clip", "min max")
def clip(call: NodeCall, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """x between two bounds, each of which may be absent; attributes before version 11."""
    if call.opset < 11:
        call.need(low is None and high is None, "bounds that are inputs")
        if call.get("min") is None and call.get("max") is None:
            return x
        return torch.clamp(x, call.get("min"), call.get("max"))
    call.need(not call.attributes, "bounds that are attributes")
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Dropout", "ratio seed", settings=(1, 2))
def dropout(call: NodeCall, x: Tensor, ratio: Any = None, training: Any = None) -> Tensor:
    """Its input, as nothing is dropped at inference."""
    call.need(training is None or not bool(training), "drops entries")
    call.need(call.read == 1, "returns its mask")
    call.need(call.opset >= 7, "an old definition")
    return x


@operator("Cast", "to saturate round_mode")
def cast(call: NodeCall, x: Tensor) -> Tensor:
    """Another dtype."""
    wanted = DTYPES.get(call.get("to"))
    if wanted is None:
        call.need(False, f"a conversion to type {call.get('to')}")
    return x.to(call.floating if wanted == torch.float32 else wanted)


@operator("CastLike", "saturate round_mode")
def cast_like(call: NodeCall, x: Tensor, other: Tensor) -> Tensor:
    """The dtype of another tensor."""
    return x.to(other.dtype)


DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""PyTorch's dtypes by ONNX's numbers for them."""
