"""Schemes: how many bits a quantizer spends on which numbers, and which of them share a step."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from equinorm._arguments import check_flag, is_whole
from equinorm._errors import EqualizeError

LEAST_BITS, MOST_BITS = 2, 16

GRANULARITIES = ("tensor", "channel")

_FLAGS = ("weight_symmetric", "activation_symmetric", "clip", "sums", "outputs", "fused_clamps")

_TOOL = re.compile(r"([a-z0-9]+)(?:-(tensor|channel))?")
_FORM = re.compile(r"w(\d+)(?:g(\d+))?(?:a(\d+))?(?:-(tensor|channel))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What is rounded to how many bits: weights of linear layers and convolutions, and the activations that enter them.

    Attributes:
        weight_bits: from 2 to 16.
        weight_granularity: which weights share a step: "tensor", "channel" (each output channel has its own), or an integer n:
            blocks of n input channels within each output channel.
        weight_symmetric: steps around zero, 2^(b−1) − 1 on each side; otherwise 2^b − 1 between the least and the largest.
        activation_bits: from 2 to 16, one step for a whole tensor; None leaves activations in float.
        activation_symmetric: as for weights.
        overrides: other schemes for modules whose names match a pattern ("features.0.*"); the first that matches counts.
        in_float: patterns of modules that are not quantized. A pattern must match a layer of the network.
        clip: does a weight's range leave out what is far off? Each is the fraction of the largest that leaves the least squared
            error, as tools choose that clip by it.
        sums: are both activations that a sum adds rounded too, as onnxruntime and PT2E do? Masks are not, nor sums with what
            does not depend on the inputs; `Equalization.left` names what stays in float though it was asked for.
        outputs: is what a layer returns rounded too, where no ReLU, layer or sum reads it (a PReLU, say, or nothing), as
            onnxruntime and XNNPACK's quantizer do?
        fused_clamps: where `outputs` are rounded, is a clamp (ReLU6, Hardtanh) one with the layer in front, as ReLU is?
            XNNPACK's quantizer rounds what the layer returns, and what the clamp leaves of it again: then say False. Of bounds
            that differ by channel only the largest is fused: what it leaves is rounded, and again what the others leave.

    Raises:
        EqualizeError: for values out of range.

    >>> from equinorm.quantization import Scheme
    >>> Scheme(weight_bits=4, weight_granularity=32, activation_bits=None) == Scheme.parse("w4g32")
    True
    """

    weight_bits: int = 8
    weight_granularity: str | int = "channel"
    weight_symmetric: bool = True
    activation_bits: int | None = 8
    activation_symmetric: bool = False
    overrides: Any = field(default=(), kw_only=True)
    in_float: Sequence[str] = field(default=(), kw_only=True)
    clip: bool = field(default=False, kw_only=True)
    sums: bool = field(default=False, kw_only=True)
    outputs: bool = field(default=False, kw_only=True)
    fused_clamps: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits)
        if self.activation_bits is not None:
            _check_bits("activation_bits", self.activation_bits)
        block = self.weight_granularity
        if block not in GRANULARITIES and not (is_whole(block) and block >= 1):
            raise EqualizeError(
                f"weight_granularity must be 'tensor', 'channel' or a number of input channels from 1, not {block!r}."
            )
        for name in _FLAGS:
            check_flag(getattr(self, name), name, EqualizeError)
        object.__setattr__(self, "overrides", _pairs(self.overrides))
        patterns = (self.in_float,) if isinstance(self.in_float, str) else self.in_float
        if not isinstance(patterns, (tuple, list)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise EqualizeError(f"in_float must hold patterns of module names, not {self.in_float!r}.")
        object.__setattr__(self, "in_float", tuple(patterns))

    @staticmethod
    def parse(text: str) -> "Scheme":
        """A scheme from its short form: bits of weights, group, bits of activations, granularity; or from a tool's name.

        Args:
            text: "w8a8", "w4" (weights only), "w4g32" (blocks of 32), "w8a8-tensor"; one step for each channel if not said. Or
                a name in `TOOLS`, whose defaults it stands for, as "onnxruntime"; a granularity may follow ("xnnpack-channel").

        Raises:
            EqualizeError: for anything else.

        >>> from equinorm.quantization import Scheme
        >>> Scheme.parse("w8a8-tensor").weight_granularity, Scheme.parse("w4").activation_bits
        ('tensor', None)
        >>> Scheme.parse("onnxruntime") == Scheme(8, "tensor", sums=True, outputs=True)
        True
        """
        written = text.strip().lower() if isinstance(text, str) else ""
        if (named := _TOOL.fullmatch(written)) and named[1] in TOOLS:
            tool = TOOLS[named[1]]
            return replace(tool, weight_granularity=named[2] or tool.weight_granularity)
        match = _FORM.fullmatch(written)
        if match is None:
            raise EqualizeError(
                "a scheme is written as 'w8a8', 'w4', 'w4g32' or 'w8a8-tensor', or as a tool's name "
                f"({', '.join(TOOLS)}, 'x86-tensor'), not {text!r}."
            )
        bits, block, activation_bits, granularity = match.groups()
        if block and granularity:
            raise EqualizeError(f"{text!r} names two granularities: blocks of {block}, and {granularity}. Leave one out.")
        return Scheme(
            int(bits),
            int(block) if block else granularity or "channel",
            True,
            int(activation_bits) if activation_bits else None,
        )

    def within(self, module: str) -> "Scheme | None":
        """The scheme of one module by its name; None where it stays in float."""
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in self.in_float):
            return None
        for pattern, scheme in self.overrides:
            if fnmatch.fnmatchcase(module, pattern):
                return scheme.within(module)
        return self

    def all(self) -> "list[Scheme]":
        """This one and its overrides, and theirs."""
        return [self, *(part for _, scheme in self.overrides for part in scheme.all())]

    def idle_patterns(self, modules: Iterable[str]) -> list[str]:
        """Patterns of this scheme that match none of these names."""
        names, patterns = list(modules), [*self.in_float, *(pattern for pattern, _ in self.overrides)]
        return [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]

    @property
    def weight_levels(self) -> int:
        """Steps from zero to the largest weight, or from the least to the largest where steps are not symmetric."""
        return levels(self.weight_bits, self.weight_symmetric)

    def __str__(self) -> str:
        """The short form, and what it does not say: "w8a8, clip=True"."""
        for name, scheme in TOOLS.items():
            for granularity in GRANULARITIES:
                if self == replace(scheme, weight_granularity=granularity):
                    return name if self == scheme else f"{name}-{granularity}"
        block = f"g{self.weight_granularity}" if isinstance(self.weight_granularity, int) else ""
        activations = f"a{self.activation_bits}" if self.activation_bits is not None else ""
        short = f"w{self.weight_bits}{block}{activations}" + ("-tensor" if self.weight_granularity == "tensor" else "")
        understood = Scheme.parse(short)
        further = [f"{name}={value}" for name in _FLAGS if (value := getattr(self, name)) != getattr(understood, name)]
        further += [f"{pattern}: {scheme}" for pattern, scheme in self.overrides]
        further += [f"{pattern} in float" for pattern in self.in_float]
        return ", ".join([short, *further])


def levels(bits: int, symmetric: bool) -> int:
    """Steps that b bits have: 2^(b−1) − 1 on each side of zero, or 2^b − 1 in all."""
    return 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1


def scheme_of(given: Any) -> Scheme:
    """A scheme, or the one that a text stands for."""
    if isinstance(given, str):
        return Scheme.parse(given)
    if not isinstance(given, Scheme):
        raise EqualizeError(f"scheme must be an equinorm.quantization.Scheme or a text as 'w8a8', not {type(given).__name__}.")
    return given


def _check_bits(name: str, bits: Any) -> None:
    if not (is_whole(bits) and LEAST_BITS <= bits <= MOST_BITS):
        raise EqualizeError(f"{name} must be an integer from {LEAST_BITS} to {MOST_BITS}, not {bits!r}.")


def _pairs(overrides: Any) -> tuple[tuple[str, Scheme], ...]:
    try:
        pairs = tuple((pattern, scheme_of(scheme)) for pattern, scheme in dict(overrides).items())
    except (TypeError, ValueError) as error:
        raise EqualizeError("overrides must be a dict from patterns of module names to schemes.") from error
    if wrong := [pattern for pattern, _ in pairs if not isinstance(pattern, str)]:
        raise EqualizeError(f"overrides must be a dict from patterns of module names to schemes; {wrong[0]!r} is no pattern.")
    return pairs


TOOLS = {
    "onnxruntime": Scheme(8, "tensor", sums=True, outputs=True),
    "xnnpack": Scheme(8, "tensor", sums=True, outputs=True, fused_clamps=False),
    "x86": Scheme(8, "channel", sums=True),
}
"""What tools round by default: onnxruntime's static quantizer, and PT2E's with the quantizers of XNNPACK and x86."""
