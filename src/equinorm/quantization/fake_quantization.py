"""Fake quantization: numbers rounded as a scheme says, in floating point."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from equinorm._scaling import Scaling
from equinorm.modules.choosing import tensors_of
from equinorm.modules.running import by_default, undisturbed
from equinorm.quantization.batches import Batch, floats_in, rows, run_undisturbed, watched
from equinorm.quantization.calls import ActivationSum, CallWatch, Key, LayerCall
from equinorm.quantization.operands import Operand, Place
from equinorm.quantization.outputs import Output, output_key
from equinorm.quantization.points import Point
from equinorm.quantization.scheme import Scheme, levels
from equinorm.quantization.statistics import ActivationStatistics


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least single precision: half precision holds neither the numbers of 16 bits nor many a scale."""
    return torch.promote_types(dtype, torch.float32)


def rounded(values: Tensor, low: Tensor, high: Tensor, bits: int, is_symmetric: bool) -> Tensor:
    """Numbers rounded to the nearest of the steps between two bounds around zero, which broadcast to them.

    Symmetric: steps of max(−low, high) / (2^(b−1) − 1). Otherwise (high − low) / (2^b − 1), and zero is one of them.
    """
    steps = levels(bits, is_symmetric)
    extent = torch.maximum(-low, high) if is_symmetric else high - low
    step = torch.where(extent > 0, extent / steps, torch.ones_like(extent))
    zero = torch.zeros_like(step) if is_symmetric else (-low / step).round()
    least, most = (-steps if is_symmetric else 0) - zero, steps - zero
    return (values / step).round_().clamp_(least, most).mul_(step)


FRACTIONS = tuple(0.35 + 0.65 * i / 26 for i in range(26, -1, -1))
"""Of the range of weights, those that clipping tries."""


def rounded_weight(weight: Tensor, point: Point) -> Tensor:
    """A weight rounded as the scheme of its point says."""
    scheme, block = point.scheme, point.scheme.weight_granularity
    if block == "tensor":
        return _rounded_groups(weight.reshape(1, -1), (1,), scheme).reshape(weight.shape)
    parts = weight.reshape(point.groups, weight.shape[0] // point.groups, *weight.shape[1:])
    parts = parts.transpose(1, 2) if point.is_transposed else parts
    shape, many = parts.shape, parts.shape[2]
    size = min(block, many) if isinstance(block, int) else many
    grouped = parts.reshape(*shape[:3], -1)
    grouped = nn.functional.pad(grouped, (0, 0, 0, -many % size)).unflatten(2, (-1, size))
    parts = _rounded_groups(grouped, (3, 4), scheme).flatten(2, 3)[:, :, :many].reshape(shape)
    return (parts.transpose(1, 2) if point.is_transposed else parts).reshape(weight.shape)


def _rounded_groups(values: Tensor, axes: tuple[int, ...], scheme: Scheme) -> Tensor:
    """Numbers rounded, those along some axes with one step: between their extremes, or what part of these is best."""
    low, high = values.amin(axes, keepdim=True).clamp(max=0), values.amax(axes, keepdim=True).clamp(min=0)
    bits, is_symmetric = scheme.weight_bits, scheme.weight_symmetric
    best = rounded(values, low, high, bits, is_symmetric)
    least = (best - values).square().sum(axes, keepdim=True)
    for fraction in FRACTIONS[1:] if scheme.clip else ():
        found = rounded(values, fraction * low, fraction * high, bits, is_symmetric)
        error = (found - values).square().sum(axes, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best


def weight_noise(weight: Tensor, sensitivity: Tensor, scaling: Scaling, point: Point, z: Tensor) -> float:
    """Σ F (ŵ − w)²: what rounding a weight at some log-scales costs, by its errors as they are, those of clipped entries too.

    Args:
        weight: as it is.
        sensitivity: F, of its shape.
        scaling: of the weight.
        point: where it is rounded.
        z: free log-scales.
    """
    weight = weight.detach().to(wide(weight.dtype))
    scales = scaling.log_scales(z).exp().to(weight.device, weight.dtype)
    error = rounded_weight(weight * scales, point) / scales - weight
    return float((sensitivity * error.square()).sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True, eq=False)
class Rounding:
    """A network, and how its numbers are rounded.

    Attributes:
        model: the network.
        points: where it is rounded.
        activations: the bounds there.
        scalings: of its weights, by every name.
    """

    model: nn.Module
    points: Sequence[Place]
    activations: Mapping[Key, ActivationStatistics]
    scalings: Mapping[str, Scaling]

    def rescaled(self, z: Tensor) -> "Rounding":
        """The same once the network has been rescaled by free log-scales z: bounds move along."""
        return replace(self, activations={p.key: self.activations[p.key].scaled(channel_scales(p, z)) for p in self.points})


class Simulation:
    """A network that computes as if it were quantized, at any log-scales, its weights as they are.

    Rounding at log-scales λ is x ↦ round(x·e^λ)·e^{−λ}: the network need not be rescaled to see what that does.

    Args:
        rounding: the network, and where and how it is rounded.
        z: free log-scales.
        shifts: numbers for each channel that are added to what calls return, by the weight's name.
    """

    def __init__(self, rounding: Rounding, z: Tensor, shifts: Mapping[str, Tensor] | None = None) -> None:
        self.rounding, self.z = rounding, z
        self.points = {point.key: point for point in rounding.points}
        self.shifts: Mapping[str, Tensor] = shifts or {}
        self.weights: dict[str, Tensor] = {}
        clamped = [place for place in rounding.points if isinstance(place, Output) and place.bounds]
        held = tensors_of(self.model) if clamped else {}
        self.bounds = {output.key: self._bound(output, held) for output in clamped}

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.rounding.model

    def shifted(self, shifts: Mapping[str, Tensor]) -> "Simulation":
        """The same with other shifts."""
        return Simulation(self.rounding, self.z, shifts)

    def outputs(self, batch: Batch) -> list[Tensor]:
        """Floating-point outputs of the rounded network."""
        return outputs(self.model, batch, self.handle, self.add)

    def handle(self, call: LayerCall) -> Tensor:
        """A call, rounded if it is a point; what is added to a layer's bias is added in all of its calls."""
        point = self.points.get((call.name, call.number))
        changed = {}
        if isinstance(point, Point):
            changed = {"input": self.activation(point, call.arguments["input"]), "weight": self.weight(point, call)}
        result = call.run(**changed)
        if call.name in self.shifts:
            result = result + broadcast(self.shifts[call.name], call, result)
        output = self.points.get(output_key(call.name, call.number))
        return self.activation(output, output.fused(result)) if isinstance(output, Output) else result

    @property
    def add(self) -> Callable[[ActivationSum], Tensor] | None:
        """What adds rounded activations, if any sum reads such."""

        def add(added: ActivationSum) -> Tensor:
            places = zip((self.points.get(key) for key in added.keys), added.operands, strict=True)
            return added.run(*(value if place is None else self.activation(place, value) for place, value in places))

        return add if any(isinstance(place, Operand) for place in self.points.values()) else None

    def weight(self, point: Point, call: LayerCall) -> Tensor:
        """The weight, rounded."""
        if point.weight not in self.weights:
            given = call.arguments["weight"].detach()
            weight = given.to(wide(given.dtype))
            scales = self.rounding.scalings[point.weight].log_scales(self.z).exp().to(weight.device, weight.dtype)
            self.weights[point.weight] = (rounded_weight(weight * scales, point) / scales).to(given.dtype)
        return self.weights[point.weight]

    def activation(self, place: Place, value: Tensor) -> Tensor:
        """What is read there, rounded."""
        scheme, bound = place.scheme, self.bounds.get(place.key, math.inf)
        if scheme.activation_bits is None or bound is None:
            return value
        seen, scales = self.rounding.activations[place.key], place.scaling.log_scales(self.z).exp()
        low, high = (most * channel_scales(place, self.z) for most in (seen.low, seen.high))
        dtype, value = value.dtype, value.to(wide(value.dtype))
        scales, low, high = (part.to(value.device, value.dtype) for part in (scales, low.min(), high.max().clamp(max=bound)))
        if isinstance(place, Operand) and place.axis is not None:
            scales = scales.reshape(-1, *(1,) * (-1 - place.axis))
        found = rounded(value * scales, low, high, scheme.activation_bits, scheme.activation_symmetric)
        return found.div_(scales).to(dtype)

    def _bound(self, output: Output, held: Mapping[str, Tensor]) -> float | None:
        """What is fused of the freed bounds behind an output: an upper bound of all, or None where nothing is rounded."""
        logs = {name: self.rounding.scalings[name].log_scales(self.z) for name in output.bounds if name in held}
        bounds = {name: held[name].detach().cpu().double() * log.exp() for name, log in logs.items()}
        if all(torch.allclose(one, one.flatten()[0], rtol=1e-6, atol=0) for one in bounds.values()):
            return None
        return float(bounds[output.bounds[-1]].max()) if output.is_rectified else math.inf


def channel_scales(place: Place, z: Tensor) -> Tensor:
    """The scale of every channel of what is rounded there, of shape (channels,), at free log-scales z."""
    return place.scaling.log_scales(z).exp().expand(place.scaling.shape).reshape(-1)


def broadcast(channels: Tensor, call: LayerCall, result: Tensor) -> Tensor:
    """Numbers for each channel, in the shape that fits what a call returns."""
    return channels.to(result.device, result.dtype).reshape(-1, *(1,) * call.kind.spatial)


def outputs(
    model: nn.Module, batch: Batch, handle: Callable[[LayerCall], Tensor], add: Callable[[ActivationSum], Tensor] | None = None
) -> list[Tensor]:
    """Floating-point outputs of a network, its linear maps handed to a function, and its sums to another if there is one."""
    return floats_in(run_undisturbed(model, *batch, CallWatch(model, handle, add)))


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise)."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf if noise <= 0 else -math.inf


class Reference:
    """What a float network puts out, against which rounded ones are measured.

    Args:
        model: the network.
        batches: inputs.
        shifts: what is added to outputs of its layers, by the weight's name.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], shifts: Mapping[str, Tensor] | None = None) -> None:
        moved = dict(shifts or {})

        def shifted(call: LayerCall) -> Tensor:
            result = call.run()
            return result + broadcast(moved[call.name], call, result) if call.name in moved else result

        def wanted(number: int, batch: Batch) -> list[Tensor]:
            with undisturbed(model), by_default():
                return [value.double() for value in floats_in(watched(model, batch, number, CallWatch(model, shifted)))]

        self.batches = batches
        self.wanted = [wanted(number, batch) for number, batch in enumerate(batches)]
        self.signal = sum(float(value.square().sum()) for wanted in self.wanted for value in wanted)

    def noises(self, simulation: Simulation) -> Tensor:
        """Σ (ŷ − y)² over outputs, for each sample, or for each batch where outputs do not count samples."""
        found = []
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            many = rows(batch)
            squares = [(one.double() - other).square() for one, other in zip(simulation.outputs(batch), wanted, strict=True)]
            by_row = all(part.dim() and len(part) == many for part in squares)
            parts = [part.reshape(many if by_row else 1, -1).sum(1).cpu() for part in squares]
            found.append(torch.stack(parts).sum(0))
        return torch.cat(found)

    def signal_to_noise(self, simulation: Simulation) -> float:
        """Σ y² / Σ (ŷ − y)² over batches and outputs in dB."""
        return decibels(self.signal, float(self.noises(simulation).sum()))
