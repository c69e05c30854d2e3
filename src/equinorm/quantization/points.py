"""Points: where a quantizer rounds, and how what it rounds there scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equinorm._display import and_more
from equinorm._errors import EqualizeError, describe, does_not_run
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries, symmetries
from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.modules.choosing import Choice
from equinorm.modules.running import without_cache
from equinorm.quantization.batches import run_undisturbed
from equinorm.quantization.calls import NOT_ROUNDED, OPERATORS, CallWatch, Key, LayerCall, LinearMap, addend
from equinorm.quantization.quantized import check_floats
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
        scaling: of the channels of what it reads, as `scaling_of_channels` tells it.
        made: name of the value that it returns.
        spatial: how many axes follow the channels of what it reads and returns.
    """

    module: str
    weight: str
    number: int
    groups: int
    is_transposed: bool
    scheme: Scheme
    scaling: Scaling
    made: str = ""
    spatial: int = 0

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which what it reads is told apart."""
        return axes_apart(self.scaling, self.spatial)

    @property
    def name(self) -> str:
        """The module's name, and which of its calls where it is called again."""
        return (self.module or self.weight) + (f" (call {self.number + 1})" if self.number else "")

    @property
    def key(self) -> Key:
        """What identifies the call."""
        return self.weight, self.number


@dataclass(frozen=True, slots=True)
class _SeenCall:
    """A call of the example.

    Attributes:
        weight: name of the weight.
        number: of calls with this weight before it.
        kind: which map it is.
        groups: groups of channels that do not mix.
        shape: of what it returns.
        matters: does an output depend on it, as far as gradients tell?
    """

    weight: str
    number: int
    kind: LinearMap
    groups: int
    shape: tuple[int, ...]
    matters: bool


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
    check_floats(model)
    seen = _run_once(model, args, kwargs)
    owners = {call.weight: call.weight.rpartition(".")[0] for call in seen}
    if idle := scheme.idle_patterns(owners.values()):
        raise EqualizeError(
            f"the scheme's pattern {idle[0]!r} matches no layer that {describe(model)} would round. These are "
            f"{and_more(dict.fromkeys(owners.values()), 8, 'layers')}; '*' stands for any letters."
        )
    schemes = {name: rounded for name, owner in owners.items() if (rounded := scheme.within(owner)) is not None}
    if not schemes:
        why = "all its layers stay in float" if owners else "it calls no linear layer or convolution with a parameter as weight"
        raise EqualizeError(f"{describe(model)} has nothing to quantize: {why}.")
    found = symmetries(model, args, kwargs, batch_norm="evaluation", opaque=opaque)
    places = {name: _places(found.values, name, [c for c in seen if c.weight == name], owners[name]) for name in schemes}
    points = []
    for call in seen:
        use = places[call.weight].get(call.number) if call.weight in schemes else None
        if use is not None:
            read = scaling_of_channels(_read(found.values, use), call.kind.spatial)
            numbers = owners[call.weight], call.weight, call.number, call.groups, call.kind.is_transposed
            points.append(Point(*numbers, schemes[call.weight], read, use.name, call.kind.spatial))
    if not points:
        raise EqualizeError(
            f"{describe(model)} has nothing to quantize: no output depends on its layers, or they are all in opaque modules."
        )
    return found, tuple(points)


def layers_in_float(values: InnerValues, points: Sequence[Point], scheme: Scheme) -> dict[str, str]:
    """Products with learned matrices that are not rounded though the scheme asks for it, and why, by name.

    Args:
        values: of the network's graph.
        points: what is rounded.
        scheme: what should be.
    """
    found: dict[str, str] = {}
    rounded = {point.made for point in points}
    for value in values:
        if value.parameters or value.name in rounded or not (value.operator in OPERATORS or value.operator in NOT_ROUNDED):
            continue
        read = [values[name] for role, name in value.reads.items() if role != addend(value.operator)]
        learned = next((one for one in read if len(one.shape) > 1 and (one.parameters or one.operator == "buffer")), None)
        if learned is None:
            continue
        tensor = learned.tensor or learned.parameters[0]
        if scheme.within(value.module or tensor.rpartition(".")[0]) is None:
            continue
        if value.operator in NOT_ROUNDED:
            why = f"{value.operator} is not rounded"
        elif not learned.tensor:
            why = "its weight is computed"
        else:
            why = "its weight is a buffer" if learned.operator == "buffer" else "its weight is not the matrix on the right"
        found[value.module or tensor] = why
    return found


def _places(values: InnerValues, weight: str, calls: list[_SeenCall], owner: str) -> dict[int, InnerValue]:
    """Where calls with a weight stand in the graph, by their numbers; the graph leaves out those on which no output depends.

    Products that parameters alone determine, as those of low rank that make another weight, are not among them.

    Raises:
        EqualizeError: if it cannot be told which these are.
    """
    uses: list[InnerValue] = []
    for is_shown in (lambda one: one.tensor == weight, lambda one: one.parameters == (weight,)):  # as it is, else changed
        names = {one.name for one in values if is_shown(one)}
        uses = [use for use in values if use.operator in OPERATORS and names & set(use.reads.values())]
        for chosen in (calls, [call for call in calls if call.matters]):
            if [call.shape for call in chosen] == [use.shape for use in uses]:
                return {call.number: use for call, use in zip(chosen, uses, strict=True) if not use.parameters}
    if not uses:
        return {}
    raise EqualizeError(
        f"{owner or weight} is called {len(calls)} times, and the outputs depend on {len(uses)}; which, cannot be told. "
        "Take the other calls out of the forward, or leave it in float: Scheme(..., in_float=[name])."
    )


def _read(values: InnerValues, use: InnerValue) -> InnerValue:
    """What a linear map reads beside its weight and bias."""
    return next(values[name] for name in use.reads.values() if not values[name].parameters)


def scaling_of_channels(value: InnerValue, spatial: int) -> Scaling:
    """How channels of what a layer reads or makes scale: a `Scaling` of shape (channels, 1, …), which broadcasts to it.

    Places of an axis at which a channel scales otherwise, as rows that another weight has made, are told apart: the shape is
    then that of these axes and of the channels. Zeros of a padding are not.

    Args:
        value: what is read or made.
        spatial: how many axes follow the channels.
    """
    channel, scaling = len(value.shape) - 1 - spatial, value.scaling
    factors = [(exponent, _unpadded(ids, channel)) for exponent, ids in (() if scaling is None else scaling.factors)]
    shape = list(torch.broadcast_shapes(*(ids.shape for _, ids in factors), (1,) * len(value.shape)))
    shape[channel] = value.shape[channel]
    first = next(axis for axis, size in enumerate(shape) if size > 1 or axis == channel)
    along = tuple((exponent, ids.reshape(ids.shape[first:])) for exponent, ids in factors)
    return Scaling((value.name,), tuple(shape[first:]), value.dtype, "value", "value", value.depth, along)


def _unpadded(ids: Tensor, channel: int) -> Tensor:
    """Ids of a value, of size 1 along each axis but that of its channels along which all that is not zero scales alike."""
    for axis in range(ids.dim()):
        most = ids.amax(axis, keepdim=True)
        if axis != channel and bool(((ids == most) | (ids == 0)).all()):
            ids = most
    return ids


def axes_apart(scaling: Scaling, spatial: int) -> tuple[int, ...]:
    """Axes, from the end, along which a value of a scaling of channels is told apart: its channels, and what else scales."""
    rank = len(scaling.shape)
    return tuple(axis - rank for axis, size in enumerate(scaling.shape) if size > 1 or axis == rank - 1 - spatial)


def _run_once(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> list[_SeenCall]:
    """Every linear map in order."""
    seen: list[_SeenCall] = []
    marks: list[Tensor] = []

    def note(call: LayerCall) -> Tensor:
        result = call.run()
        marks.append(torch.zeros((), dtype=result.dtype, device=result.device, requires_grad=True))
        seen.append(_SeenCall(call.name, call.number, call.kind, call.groups, tuple(result.shape), matters=False))
        return result + marks[-1]

    named = without_cache(model, args, dict(kwargs or {}))
    try:
        result = run_undisturbed(model, args, named, torch.enable_grad(), CallWatch(model, note))
    except Exception as error:
        raise EqualizeError(does_not_run(model, args, named, error)) from error
    return [replace(call, matters=matters) for call, matters in zip(seen, _matter(result, marks), strict=True)]


def _matter(result: Any, marks: list[Tensor]) -> list[bool]:
    """On which of these numbers a result depends, as far as gradients would tell."""
    reached: dict[Any, None] = {}
    ahead = [part.grad_fn for part in pytree.tree_leaves(result) if isinstance(part, Tensor)]
    while ahead:
        function = ahead.pop()
        if function is not None and function not in reached:
            reached[function] = None
            ahead += [further for further, _ in function.next_functions]
    numbers = {id(function.variable) for function in reached if hasattr(function, "variable")}
    return [id(mark) in numbers for mark in marks]
