"""Points: where a quantizer rounds, and how what it rounds there scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._errors import EqualizeError, ExportError, describe, describe_inputs
from equinorm._modules import Choice, by_default, chosen, undisturbed, without_cache
from equinorm._scaling import Pin, Scaling
from equinorm._symmetries import Symmetries, symmetries
from equinorm.quantization.calls import Call, Calls
from equinorm.quantization.scheme import Scheme

_INNER, _PROBES = "inner", "probes"


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

    The network is exported with a parameter of zeros added to every such input: a probe, which scales as the input does.

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
    owners = {name: name.rpartition(".")[0] for name, _, _ in seen}
    schemes = {name: scheme.within(owner) for name, owner in owners.items() if name}
    if all(schemes.get(name) is None for name, _, _ in seen):
        why = (
            "all its layers stay in float" if schemes else "it calls no linear layer or convolution with a parameter as weight"
        )
        raise EqualizeError(f"{describe(model)} has nothing to quantize: {why}.")
    shapes = [shape for name, shape, _ in seen if schemes.get(name) is not None]
    probed = _Probed(model, [schemes.get(name) is not None for name, _, _ in seen], shapes)
    hidden = list(chosen(model, opaque, ExportError, "opaque").values())
    found = symmetries(probed, args, kwargs, opaque=hidden)
    scalings = {scaling.name: scaling for scaling in found.scalings}
    points = []
    for name, _, call in seen:
        if (rounded := schemes.get(name)) is not None:
            probe = scalings[f"{_PROBES}.{len(points)}"]
            numbers = owners[name], name, call.number, call.groups, call.kind.is_transposed
            points.append(Point(*numbers, rounded, probe))
    return _without_probes(found, model), tuple(points)


class _Probed(nn.Module):
    """A model to whose linear maps zeros are added, one parameter for each call."""

    def __init__(self, model: nn.Module, is_probed: Sequence[bool], shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.training = model.training
        self.inner = model
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.probes = nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes])
        self.is_probed = tuple(is_probed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        probes, is_probed = iter(self.probes), iter(self.is_probed)

        def probe(call: Call) -> Tensor:
            if not next(is_probed, False):
                return call.run()
            return call.run(input=call.arguments["input"] + next(probes))

        with Calls(self.inner, probe, every=True):
            result = self.inner(*args, **kwargs)
        if next(is_probed, None) is not None:
            raise ExportError(f"{describe(self.inner)} calls other layers while it is exported than when it runs.")
        return result


def _run_once(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> list[tuple[str, tuple[int, ...], Call]]:
    """Every linear map in order: the name of its weight or nothing, the shape of a probe of its input, and the call."""
    seen: list[tuple[str, tuple[int, ...], Call]] = []

    def note(call: Call) -> Tensor:
        shape = (call.arguments["input"].shape[call.axis], *(1,) * call.kind.spatial)
        empty = {name: value for name, value in call.arguments.items() if not isinstance(value, Tensor)}
        seen.append((call.name, shape, replace(call, arguments=empty)))
        return call.run()

    named = without_cache(model, args, dict(kwargs or {}))
    try:
        with undisturbed(model), by_default(), Calls(model, note, every=True):
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


def _without_probes(found: Symmetries, model: nn.Module) -> Symmetries:
    """The symmetries of the model itself, found on the one with probes."""

    def own(name: str) -> str:
        return name.removeprefix(f"{_INNER}.")

    scalings = tuple(
        replace(scaling, names=tuple(map(own, scaling.names)))
        for scaling in found.scalings
        if not scaling.name.startswith(f"{_PROBES}.")
    )
    families = tuple(replace(family, tensor=own(family.tensor)) for family in found.families)
    pins = tuple(
        Pin(own(pin.tensor), pin.axis, pin.channels, replace(pin.reason, module=own(pin.reason.module)))
        for pin in found.pins
        if not pin.tensor.startswith(f"{_PROBES}.")
    )
    casts = tuple(replace(cast, tensor=own(cast.tensor)) for cast in found.casts)
    further = {"backward": found.backward, "casts": casts}
    return Symmetries(model, found.num_free, scalings, families, pins, found.seconds, found.fingerprint, **further)
