"""Operations on each entry by itself: powers, sums, products, comparisons.

An operation f is positively homogeneous of degree k if f(s·x) = s^k·f(x) for every s > 0; its result then scales as the k-th
power of its input.
"""

import math
from fractions import Fraction
from typing import Any

import torch

from equinorm.discovery.labels import Factor, Label, move_one
from equinorm.discovery.rules.registry import Call, Rule, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import Constant, Source, Value, View, loses

IDENTITIES = "positive clone contiguous detach alias lift_fresh lift_fresh_copy resolve_conj resolve_neg"
"""Operations that return the same numbers."""

DEGREES: dict[Fraction | int, str] = {
    1: f"{IDENTITIES} relu leaky_relu rrelu abs absolute dropout feature_dropout conj _conj conj_physical real imag deg2rad "
    "rad2deg",
    2: "square",
    Fraction(1, 2): "sqrt",
    Fraction(-1, 2): "rsqrt",
    -1: "reciprocal",
    0: "sign sgn signbit isnan isinf isfinite isposinf isneginf logical_not angle ones_like empty_like rand_like randn_like "
    "randint_like new_ones new_empty new_empty_strided",
}
"""Positively homogeneous functions of one tensor, by degree. Degree 0: the result does not scale, whatever the input does."""


def _homogeneous(degree: Fraction | int) -> Rule:
    def homogeneous(trace: Trace, call: Call) -> Value:
        if degree == 0:
            return Label(call.shape)
        if degree == 1 and isinstance(call.input, (Source, View)) and trace.is_unlabelled(call.input):
            is_itself = call.operator_name.removesuffix("_") in IDENTITIES.split()
            return call.input if is_itself else View.through(call.input)  # how it scales, its next use may still decide
        return trace.label(call.input).power(degree)

    return homogeneous


for _degree, _names in DEGREES.items():
    rule(_names)(_homogeneous(_degree))


@rule("native_dropout")
def native_dropout(trace: Trace, call: Call) -> list[Label]:
    """Dropout and the mask that it drew."""
    label = trace.label(call.input)
    return [label, Label(label.shape)]


@rule("zeros_like new_zeros zero full_like new_full fill full zeros")
def filled(trace: Trace, call: Call) -> Label:
    """A tensor of one constant; 0 and ±inf fit any scale."""
    return trace.label(call.get("fill_value", call.get("value", 0))).expand(call.shape)


@rule("to _to_copy type_as")
def converted(trace: Trace, call: Call) -> Value:
    """Conversion of dtype or device: exact for floats, a test against zero for bool, otherwise rounding."""
    value = call.input
    if call.result.dtype.is_floating_point or call.result.dtype.is_complex:
        if not isinstance(value, (Source, View)) or not trace.is_unlabelled(value):
            return trace.label(value)
        is_itself = not loses(value.dtype, call.result.dtype)
        return value if is_itself else View.through(value)
    if call.result.dtype == torch.bool:
        return Label(call.shape)
    return trace.pin(call.input, "rounds to integers")


@rule("clamp clamp_min clamp_max clip hardtanh")
def clamped(trace: Trace, call: Call) -> Label:
    """Clamping: homogeneous if each bound is 0, infinite, or scales like the input (a tensor)."""
    value = call.input
    for name in ("min", "max", "min_val", "max_val"):
        if call.get(name) is not None:
            value = trace.add(value, call.get(name))
    return trace.label(value)


@rule("threshold")
def threshold(trace: Trace, call: Call) -> Label:
    """x where x > threshold, else value: homogeneous if both are 0."""
    if call.threshold != 0 or call.value != 0:
        return trace.pin(call.input, "threshold and value are not both 0")
    return trace.label(call.input)


@rule("prelu _prelu_kernel")
def prelu(trace: Trace, call: Call) -> Label:
    """max(x, 0) + slope·min(x, 0): of degree 1 in x; the slopes must not scale."""
    trace.pin(call.weight, "slopes of PReLU set the ratio of two branches")
    return trace.label(call.input)


@rule("glu")
def glu(trace: Trace, call: Call) -> Label:
    """First half times sigmoid of the second: the first passes, the second is pinned."""
    label, dim = trace.label(call.input), call.dim % len(call.shape)
    trace.pin(move_one(lambda ids: ids.chunk(2, dim)[1], label), "sigmoid of a gate")
    return move_one(lambda ids: ids.chunk(2, dim)[0], label)


def exponent_of(call: Call) -> Any:
    """The exponent of a power, as a number where it is constant."""
    exponent = call.exponent
    if isinstance(exponent, Constant) and exponent.value.numel() == 1 and not exponent.value.is_meta:
        return exponent.value.item()
    return exponent


@rule("pow float_power")
def power(trace: Trace, call: Call) -> Label:
    """x^k for a constant number k."""
    exponent = exponent_of(call)
    base = call.get("self")
    if not isinstance(exponent, (int, float)) or not math.isfinite(exponent) or isinstance(base, (int, float)):
        trace.pin(base, "exponent is not a constant number")
        trace.pin(exponent, "exponent is not a constant number")
        return Label(call.shape)
    return trace.label(base).power(Fraction(exponent)).expand(call.shape)


@rule("neg negative")
def negated(trace: Trace, call: Call) -> Value:
    """−x."""
    return trace.affine(call.input, -1.0, 0.0) or trace.label(call.input)


@rule("add sub subtract rsub maximum minimum fmax fmin hypot")
def summed(trace: Trace, call: Call) -> Value:
    """Sums, differences, maxima of two: both sides must scale alike. A parameter plus a number may scale as a whole."""
    name, alpha = call.operator_name.removesuffix("_"), call.get("alpha", 1)
    if name in ("add", "sub", "subtract", "rsub") and isinstance(alpha, (int, float)):
        first, second = {"add": (1.0, alpha), "rsub": (-alpha, 1.0)}.get(name, (1.0, -alpha))
        for value, factor, other, share in ((call.input, first, call.other, second), (call.other, second, call.input, first)):
            number = _number_beside(value, other, trace, call)
            shifted = None if number is None else trace.affine(value, factor, share * number)
            if shifted is not None:
                return shifted
    return trace.add(call.input, call.other).expand(call.shape)


def _number_beside(value: Value, other: Value | float, trace: Trace, call: Call) -> float | None:
    """The finite number that is joined with every entry of a parameter without a label; None if there is no such number."""
    if not trace.is_unlabelled(value) or value.shape != call.shape:
        return None
    if isinstance(other, Constant) and other.value.numel() and not (other.value.is_meta or other.value.is_complex()):
        first = other.value.reshape(-1)[0]
        other = first.item() if bool((other.value == first).all()) else math.nan
    return float(other) if isinstance(other, (int, float)) and math.isfinite(other) else None


@rule("fmod remainder")
def remainder(trace: Trace, call: Call) -> Label:
    """What a quotient rounded to an integer leaves: both must scale alike."""
    return trace.add(call.input, call.other).expand(call.shape)


@rule("ldexp")
def ldexp(trace: Trace, call: Call) -> Label:
    """x·2^k; k must not scale."""
    trace.pin(call.other, "an exponent")
    return trace.label(call.input).expand(call.shape)


@rule("heaviside")
def heaviside(trace: Trace, call: Call) -> Label:
    """0 below 0, 1 above, a given value at 0, which must not scale."""
    return trace.pin(call.get("values"), "joins 0 and 1").expand(call.shape)


@rule("nan_to_num")
def without_nan(trace: Trace, call: Call) -> Label:
    """x, with numbers in place of nan and ±inf: they must be 0 or infinite, as no other numbers scale with x."""
    value: Value = call.input
    for number in (call.nan or 0.0, call.posinf, call.neginf):
        value = trace.add(value, 1.0 if number is None else number)  # None stands for the largest number of the dtype
    return trace.label(value)


@rule("polar")
def polar(trace: Trace, call: Call) -> Label:
    """r·e^{iφ}: the angle must not scale."""
    trace.pin(call.angle, "an angle")
    return trace.label(call.get("abs")).expand(call.shape)


@rule("where")
def chosen(trace: Trace, call: Call) -> Label:
    """A choice between two values: both must scale alike; the condition is a truth value and never scales."""
    return trace.add(call.get("self"), call.other).expand(call.shape)


@rule("masked_fill")
def masked_fill(trace: Trace, call: Call) -> Label:
    """Filling with 0 or ±inf fits any scale; filling with another number pins."""
    return trace.add(call.input, call.value).expand(call.shape)


@rule("copy")
def copied(trace: Trace, call: Call) -> Label:
    """Overwriting: the result is the source, at the shape of the target."""
    return trace.label(call.src).expand(call.shape)


@rule("lerp")
def lerp(trace: Trace, call: Call) -> Label:
    """a + w·(b − a)."""
    trace.pin(call.weight, "weight of an interpolation")
    return trace.add(call.input, call.end).expand(call.shape)


@rule("eq ne lt le gt ge greater greater_equal less less_equal not_equal logical_and logical_or logical_xor")
def compared(trace: Trace, call: Call) -> Label:
    """Comparisons of values that scale alike, or with 0: the answer does not change. Logic only asks what is nonzero."""
    if not call.operator_name.startswith("logical"):
        trace.add(call.input, call.other)
    return Label(call.shape)


@rule("atan2 arctan2")
def atan2(trace: Trace, call: Call) -> Label:
    """The angle of (x, y): unchanged if both scale alike."""
    trace.add(call.input, call.other)
    return Label(call.shape)


@rule("mul multiply")
def multiplied(trace: Trace, call: Call) -> Value:
    """Products: scales multiply."""
    for value, other in ((call.input, call.other), (call.other, call.input)):
        number = _number_beside(value, other, trace, call)
        scaled = None if number is None else trace.affine(value, number, 0.0)
        if scaled is not None:
            return scaled
    return trace.label(call.input).times(trace.label(call.other))


@rule("div divide true_divide")
def divided(trace: Trace, call: Call) -> Value:
    """Quotients: scales divide. Rounding modes pin."""
    if call.get("rounding_mode") is not None:
        trace.pin(call.input, "rounds its quotient")
        trace.pin(call.other, "rounds its quotient")
        return Label(call.shape)
    number = _number_beside(call.input, call.other, trace, call)
    scaled = trace.affine(call.input, 1 / number, 0.0) if number else None
    if scaled is not None:
        return scaled
    return trace.label(call.input).times(trace.label(call.other).power(-1))


@rule("addcmul addcdiv")
def add_product(trace: Trace, call: Call) -> Label:
    """self + value·t1·t2, or self + value·t1/t2."""
    sign = 1 if "addcmul" in call.operator_name else -1
    product = trace.label(call.tensor1).times(trace.label(call.tensor2).power(sign))
    return trace.add(call.input, product).expand(call.shape)


@rule("copysign")
def copysign(trace: Trace, call: Call) -> Label:
    """|x| with the sign of y."""
    return trace.label(call.input).expand(call.shape)


@rule("view_as_complex")
def view_as_complex(trace: Trace, call: Call) -> Label:
    """Pairs on the last axis become complex numbers: both parts must scale alike."""
    label = trace.merge(call.input, [-1])
    return Label(call.shape, tuple(Factor(f.exponent, f.ids.squeeze(-1)) for f in label.factors))


@rule("view_as_real")
def view_as_real(trace: Trace, call: Call) -> Label:
    """Complex numbers become pairs on a new last axis."""
    label = trace.label(call.input)
    return Label(call.shape, tuple(Factor(f.exponent, f.ids.unsqueeze(-1)) for f in label.factors))


@rule("complex")
def complex_of(trace: Trace, call: Call) -> Label:
    """Real and imaginary part must scale alike."""
    return trace.add(call.real, call.imag).expand(call.shape)
