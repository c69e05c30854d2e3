"""Bias correction: what rounding shifts on average, taken out of the biases."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.quantization.batches import Batch, run_undisturbed
from equinorm.quantization.calls import KINDS, CallWatch, Key, LayerCall, addend
from equinorm.quantization.fake_quantization import Simulation, broadcast, outputs
from equinorm.quantization.operands import Place
from equinorm.quantization.points import Point


def mean_shifts(simulation: Simulation, batches: Sequence[Batch], weights: Collection[str]) -> dict[str, Tensor]:
    """By how much to raise the outputs of layers with these weights, for each channel: E[y − ŷ] over samples and positions.

    Layers are corrected from the first to the last within each batch, so that each sees corrected inputs; the means over
    batches are returned. A weight that is used again gets the mean over its uses.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, Section 4.2.
    """
    sums: dict[str, Tensor] = {}
    uses: dict[str, int] = {}

    def mean(call: LayerCall, result: Tensor) -> Tensor:
        return result.detach().movedim(call.axis, 0).flatten(1).double().mean(1).cpu()

    for batch in batches:
        wanted: dict[Key, Tensor] = {}

        def remember(call: LayerCall, wanted: dict[Key, Tensor] = wanted) -> Tensor:
            result = call.run()
            wanted[call.name, call.number] = mean(call, result)
            return result

        def correct(call: LayerCall, wanted: dict[Key, Tensor] = wanted) -> Tensor:
            result = simulation.handle(call)
            if (call.name, call.number) not in simulation.points or call.name not in weights:
                return result
            shift = wanted[call.name, call.number] - mean(call, result)
            sums[call.name] = sums.get(call.name, torch.zeros_like(shift)) + shift
            uses[call.name] = uses.get(call.name, 0) + 1
            return result + broadcast(shift, call, result)

        outputs(simulation.model, batch, remember)
        outputs(simulation.model, batch, correct, simulation.add)
    return {name: total / uses[name] for name, total in sums.items()}


def find_biases(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, values: InnerValues, points: Sequence[Place]
) -> tuple[dict[str, str], dict[str, str]]:
    """The bias of every layer that is rounded, by the weight's name, and why others have none to correct.

    A bias is a parameter that is added to what a layer makes, by the layer or right behind it, and to nothing else. A linear or
    convolutional module without one can be given one. What is shared is left: a shift is that of one layer.
    """
    calls: dict[str, list[Point]] = {}
    for point in points:
        if isinstance(point, Point):
            calls.setdefault(point.weight, []).append(point)
    found: dict[str, str] = {}
    reasons: dict[str, str] = {}
    multiplied = _multiplied(model, args, kwargs)
    for weight in calls:
        bias, why = _bias(model, values, calls[weight])
        if not why and bias in multiplied:
            why = "its bias is multiplied by a number before it is added"
        if why:
            reasons[weight] = why
        else:
            found[weight] = bias
    for weight in _unread(model, args, kwargs, found):
        del found[weight]
        reasons[weight] = "what calls its weight would not read a bias"
    return found, {f"bias of {calls[weight][0].module or weight}": why for weight, why in reasons.items()}


def _unread(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, biases: Mapping[str, str]) -> list[str]:
    """Weights of modules that have no bias, and in some call would not read one: functions call them with the weight alone."""
    given: dict[str, tuple[Any, nn.Parameter]] = {}
    for weight, bias in biases.items():
        module: Any = model.get_submodule(bias.rpartition(".")[0])
        if _lacks_bias(module):
            size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            given[weight] = module, nn.Parameter(module.weight.new_zeros(size), requires_grad=False)
    unread: list[str] = []

    def note(call: LayerCall) -> Tensor:
        if call.name in given and call.arguments.get("bias") is not given[call.name][1]:
            unread.append(call.name)
        return call.run()

    if not given:
        return unread
    try:
        for module, zeros in given.values():
            module.bias = zeros
        run_undisturbed(model, args, kwargs, CallWatch(model, note))
    finally:
        for module, _ in given.values():
            module.bias = None
    return [*dict.fromkeys(unread)]


def _bias(model: nn.Module, values: InnerValues, calls: Sequence[Point]) -> tuple[str, str]:
    """Name of the bias of one weight's calls, which may not be there yet; or why they have none."""
    point, uses = calls[0], [values[call.made] for call in calls]
    held = Counter(part.data_ptr() for module in model.modules() for part in module._parameters.values() if part is not None)
    if held[model.get_parameter(point.weight).data_ptr()] > 1:
        return "", "its weight is shared"
    biases = {_added(values, use, point) for use in uses}
    if biases == {None}:
        module: Any = model.get_submodule(point.module)
        return (f"{point.module}.bias".lstrip("."), "") if _lacks_bias(module) else ("", "it has no bias of its own")
    bias, *others = biases
    if others or not bias:
        return "", "its bias is computed, or another in each call"
    own = {use.name for use in uses} | {reader.name for use in uses for reader in values.readers(use.name)}
    if held[model.get_parameter(bias).data_ptr()] > 1 or any(use.name not in own for use in values.uses(bias)):
        return "", "its bias is shared"
    return bias, ""


def _lacks_bias(module: nn.Module) -> bool:
    """Has a module none that could have one?"""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.bias is None


def _added(values: InnerValues, use: InnerValue, point: Point) -> str | None:
    """Name of the parameter that is added to what a linear map makes, one number for each channel.

    None if nothing is, and no name if something is that is not such a parameter.
    """
    rank, axis = len(use.shape), 1 + point.spatial
    sizes = [1] * (rank - axis) + [use.shape[-axis]] + [1] * (axis - 1)
    inside = use.reads.get(addend(use.operator))
    if inside is not None:
        bias = values[inside]
        return bias.tensor if bias.operator == "parameter" and bias.shape == (use.shape[-axis],) else ""
    readers = values.readers(use.name)
    if len(readers) != 1 or use.is_returned or readers[0].operator not in ("aten.add", "aten.add_"):
        return None
    for one in (values[name] for name in readers[0].reads.values()):
        if one.operator == "parameter" and len(one.shape) >= axis and list(one.shape) == sizes[-len(one.shape) :]:
            return one.tensor
    return None


def _multiplied(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> set[str]:
    """Names of parameters that a sum multiplies by its alpha or beta."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    found: set[str] = set()

    class Sums(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
            given = (*args, *(kwargs or {}).values())
            if func not in KINDS and any(factor != 1 for factor in given if isinstance(factor, (int, float))):
                found.update(names[id(part)] for part in given if id(part) in names)  # a convolution's numbers are settings
            return func(*args, **(kwargs or {}))

    run_undisturbed(model, args, kwargs, Sums())
    return found


def correct_(model: nn.Module, shifts: Mapping[str, Tensor], biases: Mapping[str, str]) -> None:
    """Add shifts, by weight, to biases; a module without one gets one.

    Args:
        model: is changed.
        shifts: by the weight's name.
        biases: the name of the bias, by the weight's name.
    """
    for name, shift in shifts.items():
        owner, _, last = biases[name].rpartition(".")
        module = model.get_submodule(owner)
        with torch.no_grad():
            if getattr(module, last) is None:
                weight = model.get_parameter(name)
                setattr(module, last, nn.Parameter(weight.new_zeros(len(shift)), weight.requires_grad))
            bias = getattr(module, last)
            bias.add_(shift.to(bias.device, bias.dtype).reshape(bias.shape))
