"""Points: where a quantizer rounds, and how what it rounds there scales."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from equinorm._display import shortened
from equinorm._errors import EqualizeError, describe, describe_inputs
from equinorm._modules import Choice, by_default, undisturbed, without_cache
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries, symmetries
from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.quantization.calls import Call, Calls
from equinorm.quantization.scheme import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One call of a linear layer or convolution that is quantized.

    Attributes:
        module: name of the module that holds the weight.
        weight: name of the weight.
        number: of calls with this weight before it.
        groups: groups of channels that do not mix.
        is_transposed: is the weight stored (in, out)?
        scheme: how it is rounded.
        scaling: of the channels of what it reads: a `Scaling` of shape (channels, 1, …).
    """

    module: str
    weight: str
    number: int
    groups: int
    is_transposed: bool
    scheme: Scheme
    scaling: Scaling

    @property
    def name(self) -> str:
        """The module's name, and which of its calls where it is called again."""
        return (self.module or self.weight) + (f" (call {self.number + 1})" if self.number else "")

    @property
    def key(self) -> tuple[str, int]:
        """What identifies the call."""
        return self.weight, self.number


def find_points(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, scheme: Scheme, opaque: Choice = ()
) -> tuple[Symmetries, tuple[Point, ...]]:
    """A network's symmetries, and every call that the scheme rounds with how its input scales.

    What an opaque module calls is not rounded.

    Args:
        model: the network.
        args: its positional inputs.
        kwargs: its keyword inputs.
        scheme: what is rounded.
        opaque: submodules that are not looked into.

    Raises:
        EquinormError: if the network does not run or cannot be exported, holds quantized tensors, or calls no layer that the
            scheme rounds.
    """
    _check_floats(model)
    seen = _run_once(model, args, kwargs)
    owners = {call.name: call.name.rpartition(".")[0] for call in seen}
    if idle := scheme.idle_patterns(owners.values()):
        layers = list(dict.fromkeys(owners.values()))
        raise EqualizeError(
            f"the scheme's pattern {idle[0]!r} matches no layer that {describe(model)} would round. These are "
            f"{', '.join(shortened(layers, 8, 'layers'))}; '*' stands for any letters."
        )
    schemes = {name: rounded for name, owner in owners.items() if (rounded := scheme.within(owner)) is not None}
    if not schemes:
        why = "all its layers stay in float" if owners else "it calls no linear layer or convolution with a parameter as weight"
        raise EqualizeError(f"{describe(model)} has nothing to quantize: {why}.")
    found = symmetries(model, args, kwargs, batch_norm="evaluation", opaque=opaque)
    points = []
    for call in seen:
        uses = found.values.uses(call.name) if call.name in schemes else []
        if call.number < len(uses):
            read = _scaling_of_channels(_read(found.values, uses[call.number]), call)
            numbers = owners[call.name], call.name, call.number, call.groups, call.kind.is_transposed
            points.append(Point(*numbers, schemes[call.name], read))
    if not points:
        raise EqualizeError(
            f"{describe(model)} has nothing to quantize: no output depends on its layers, or they are all in opaque modules."
        )
    return found, tuple(points)


def _read(values: InnerValues, use: InnerValue) -> InnerValue:
    """What a linear map reads beside its weight and bias."""
    return next(values[name] for name in use.reads.values() if not values[name].parameters)


def _scaling_of_channels(value: InnerValue, call: Call) -> Scaling:
    """How the channels of a value scale: a layer that reads it lets nothing else about it scale, but for zeros of a padding."""
    scaling, channels = value.scaling, (value.shape[call.axis], *(1,) * call.kind.spatial)
    factors = () if scaling is None else scaling.factors
    along = tuple(
        (exponent, ids.movedim(call.axis, 0).reshape(ids.shape[call.axis], -1).amax(1).reshape(-1, *channels[1:]))
        for exponent, ids in factors
    )
    return Scaling((value.name,), channels, value.dtype, "value", "value", value.depth, along)


def _run_once(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> list[Call]:
    """Every linear map in order, without its tensors."""
    seen: list[Call] = []

    def note(call: Call) -> Tensor:
        seen.append(replace(call, arguments={"groups": call.groups}))
        return call.run()

    named = without_cache(model, args, dict(kwargs or {}))
    try:
        with undisturbed(model), by_default(), Calls(model, note):
            model(*args, **named)
    except Exception as error:
        raise EqualizeError(
            f"{describe(model)} does not run on inputs {describe_inputs(args, named)}: {type(error).__name__}: {error}"
        ) from error
    return seen


def _check_floats(model: nn.Module) -> None:
    """Refuse what is quantized already."""
    for name, module in model.named_modules():
        home = type(module).__module__
        if home.startswith(("torch.ao.nn.quant", "torch.ao.nn.qat", "torch.ao.quantization", "torchao", "brevitas")) or any(
            part.is_quantized or type(part).__module__.startswith("torchao") for part in module.parameters(recurse=False)
        ):
            raise EqualizeError(
                f"{name or 'the model'} ({describe(module)}) is quantized already. Equalize the float model, then quantize it."
            )
