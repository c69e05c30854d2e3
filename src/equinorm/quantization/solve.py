"""Solve: measure a network, minimise the noise, choose by measurement, and move the network there."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equinorm._arguments import positional
from equinorm._display import count
from equinorm._errors import EqualizeError
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.balancing.scope import nothing_moves
from equinorm.modules.choosing import Choice
from equinorm.quantization.batches import Batch, calibration_batches, random_batches
from equinorm.quantization.bias_correction import correct_, find_biases, mean_shifts
from equinorm.quantization.calls import Key
from equinorm.quantization.choosing import ChosenScales, Trials, choose, total
from equinorm.quantization.equalization import Equalization, TensorNoise
from equinorm.quantization.fake import Reference, Simulation, decibels, weight_noise
from equinorm.quantization.minimize import LeastNoise, minimize
from equinorm.quantization.noise import Noise
from equinorm.quantization.operands import Place, find_operands
from equinorm.quantization.outputs import find_outputs
from equinorm.quantization.points import Point, find_points
from equinorm.quantization.scheme import Scheme
from equinorm.quantization.statistics import ActivationStatistics, Statistics, gather
from equinorm.quantization.terms import RoundedTensor, by_name, rounded_tensors
from equinorm.rescaling.powers_of_two import round_to_powers_of_two

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `equalize`, which explains them."""

    scheme: Scheme
    largest: float
    power_of_two: bool
    bias_correction: bool
    tol: float
    progress: Progress | None

    def __post_init__(self) -> None:
        for name, least in (("largest", 1.0), ("tol", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > least or math.isnan(value):
                raise EqualizeError(f"{name} must be a number above {least:g}, not {value!r}.")
        if self.progress is not None and not callable(self.progress):
            raise EqualizeError(f"progress must be a function of a text and two numbers, not {self.progress!r}.")

    def watch(self, what: str) -> Callable[[int, int], None] | None:
        """What reports progress of one part, if anything does."""
        report = self.progress
        return None if report is None else lambda done, total: report(what, done, total)


@dataclass(frozen=True, slots=True, eq=False)
class _Network:
    """What is known of a network before anything is chosen.

    Attributes:
        model: itself, as it was.
        symmetries: its rescalings.
        scalings: of its tensors by every name.
        points: what is rounded.
        left: what is not, and why.
        biases: what can be corrected, if that is asked for.
        batches: inputs.
        seen: what these showed.
    """

    model: nn.Module
    symmetries: Symmetries
    scalings: Mapping[str, Scaling]
    points: tuple[Place, ...]
    left: dict[str, str]
    biases: dict[str, str]
    batches: Sequence[Batch]
    seen: Statistics

    def simulated(self, z: Tensor) -> Simulation:
        """With its numbers rounded at log-scales z."""
        return Simulation(self.model, self.points, self.seen.activations, self.scalings, z)


@dataclass(frozen=True, slots=True, eq=False)
class _Cost:
    """What rounding costs at some log-scales.

    Attributes:
        measured: signal over noise in dB.
        predicted: noise of every tensor that is rounded.
    """

    measured: float
    predicted: np.ndarray


def solve_(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, calibration: Any, options: Options, opaque: Choice
) -> Equalization:
    """Equalize a network in place."""
    args, clock = positional(args), _Clock()
    batches = random_batches(args, kwargs) if calibration is None else calibration_batches(calibration, model, args, kwargs)
    network = _analysed(model, args, kwargs, batches, options, opaque=opaque, clock=clock)
    symmetries, seen = network.symmetries, network.seen
    rounded = rounded_tensors(network.points, symmetries.tensors, network.scalings, seen)
    expected = Noise([one.expected for one in rounded], symmetries.num_free)
    minimum = minimize(expected, options.tol, math.log(options.largest))
    clock.lap("minimum")
    chosen, trials = _chosen(network, minimum, rounded, options)
    reference, still = trials.reference if trials.is_whole else Reference(model, batches), torch.zeros_like(chosen.z)
    before, after = (_cost(network, rounded, trials, reference, z) for z in (still, chosen.z))
    symmetries.rescale_(chosen.z)
    bounds = _scaled(seen, network.points, chosen.z)
    moved = Simulation(model, network.points, bounds, network.scalings, still)
    corrections, measured = _corrected(moved, after.measured, reference, network.biases)
    clock.lap("measuring")
    return Equalization(
        model=model,
        scheme=options.scheme,
        log_scales=chosen.z,
        symmetries=symmetries,
        noise_before=decibels(seen.signal, float(before.predicted.sum())),
        noise_after=decibels(seen.signal, float(after.predicted.sum())),
        measured_before=before.measured,
        measured_after=measured,
        gap=minimum.gap,
        converged=minimum.gap <= options.tol,
        reason=_reason(symmetries, minimum, options, chosen),
        tensors=_noises(rounded, seen.signal, before, after),
        corrections=corrections,
        left=network.left,
        biases=network.biases,
        samples=seen.samples,
        seconds=clock.laps,
        points=network.points,
        activations=bounds,
        batches=tuple(batches),
    )


def _analysed(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    batches: Sequence[Batch],
    options: Options,
    *,
    opaque: Choice,
    clock: "_Clock",
) -> _Network:
    """A network, and what inputs show of it."""
    symmetries, points = find_points(model, args, kwargs, options.scheme, opaque)
    operands, left = find_operands(model, args, kwargs, options.scheme, symmetries)
    points = (*points, *find_outputs(points, symmetries), *operands)
    biases, unbiased = {}, {}
    if options.bias_correction:
        biases, unbiased = find_biases(model, args, kwargs, symmetries.values, points)
    clock.lap("export")
    seen = gather(model, points, batches, options.watch("calibration"))
    points = tuple(point for point in points if isinstance(point, Point) or point.key in seen.activations)
    left |= {one.name: "no calibration batch adds it" for one in operands if one.key not in seen.activations}
    clock.lap("statistics")
    return _Network(model, symmetries, by_name(symmetries.scalings), points, {**left, **unbiased}, biases, batches, seen)


def _chosen(
    network: _Network, minimum: LeastNoise, rounded: Sequence[RoundedTensor], options: Options
) -> tuple[ChosenScales, Trials]:
    """The log-scales that are as good as the best by measurement, and the trials that showed it."""
    symmetries, z = network.symmetries, torch.from_numpy(minimum.z)
    activations = Noise([one.expected for one in rounded if one.kind == "activation"], symmetries.num_free)
    trials = Trials(
        network.model,
        network.points,
        network.seen,
        network.scalings,
        activations,
        network.batches,
        corrects=network.biases,
    )
    levels, watch = options.scheme.weight_levels, options.watch("measuring")
    return choose(trials, z, _settling(symmetries, options), levels, watch, _others(symmetries, z)), trials


def _cost(network: _Network, rounded: Sequence[RoundedTensor], trials: Trials, reference: Reference, z: Tensor) -> _Cost:
    """At log-scales z; measured by the trials if they took all samples as they are."""
    if trials.is_whole and not trials.corrects:
        measured = decibels(reference.signal, total(trials.measured(z)))
    else:
        measured = reference.signal_to_noise(network.simulated(z))
    return _Cost(measured, _predicted(network, rounded, z))


def _predicted(network: _Network, rounded: Sequence[RoundedTensor], z: Tensor) -> np.ndarray:
    """What rounding each tensor costs: by the formula, or by its errors where its range is clipped."""
    scalings, seen, tensors = network.scalings, network.seen, network.symmetries.tensors
    clipped = {point.weight: point for point in network.points if isinstance(point, Point) and point.scheme.clip}
    found = Noise([one.observed for one in rounded], network.symmetries.num_free).exact(z.numpy())
    for place, one in enumerate(rounded):
        if one.kind == "weight" and one.name in clipped:
            weight = tensors[one.name], seen.weights[one.name], scalings[one.name]
            found[place] = weight_noise(*weight, clipped[one.name], z)
    return found


def _noises(rounded: Sequence[RoundedTensor], signal: float, before: _Cost, after: _Cost) -> tuple[TensorNoise, ...]:
    """What each tensor's rounding costs, in dB."""
    costs = zip(rounded, before.predicted, after.predicted, strict=True)
    return tuple(
        TensorNoise(tensor.name, tensor.kind, decibels(signal, float(one)), decibels(signal, float(other)))
        for tensor, one, other in costs
    )


def _others(symmetries: Symmetries, z: Tensor) -> dict[str, Tensor]:
    """Log-scales of least norm, which no calibration data can mislead, and those half of the way to them."""
    least = symmetries.balance(p=2.0, tol=1e-3).log_scales
    return {"half of the way to the least norm (p = 2)": (z + least) / 2, "the least norm (p = 2)": least}


def _settling(symmetries: Symmetries, options: Options) -> Callable[[Tensor], Tensor]:
    """What brings log-scales within their limits, and to powers of two."""
    limit, moving = math.log(options.largest), [scaling for scaling in symmetries.scalings if scaling.factors]

    def settled(z: Tensor) -> Tensor:
        z = z.clamp(-limit, limit)
        return round_to_powers_of_two(z, moving) if options.power_of_two else z

    return settled


def _corrected(
    simulation: Simulation, before: float, reference: Reference, biases: Mapping[str, str]
) -> tuple[dict[str, Tensor], float]:
    """Correct a model's biases where there are any and that helps; returns what was added, and signal over noise in dB."""
    if not biases:
        return {}, before
    found = mean_shifts(simulation, reference.batches, biases)
    after = reference.signal_to_noise(simulation.shifted(found))
    if not after > before:
        return {}, before
    correct_(simulation.model, found, biases)
    return found, after


def _scaled(seen: Statistics, points: tuple[Place, ...], z: Tensor) -> dict[Key, ActivationStatistics]:
    """The bounds of activations at other log-scales."""
    found = {}
    for point in points:
        scales = point.scaling.log_scales(z).exp().expand(point.scaling.shape).reshape(-1)
        was = seen.activations[point.key]
        squares = [part / scales.square() for part in (was.sensitivity, was.coherent)]
        low, high, lows, highs, *half = (part * scales for part in (was.low, was.high, was.lows, was.highs, *was.half))
        found[point.key] = ActivationStatistics(low, high, (half[0], half[1]), lows, highs, *squares)
    return found


def _reason(symmetries: Symmetries, minimum: LeastNoise, options: Options, chosen: ChosenScales) -> str:
    """How it ended, in words."""
    if not symmetries.num_free:
        return nothing_moves(symmetries, None)
    found = f"within {100 * minimum.gap:.2g} % of the least noise"
    if minimum.gap > options.tol:
        found += f", not the {100 * options.tol:.2g} % asked for, after {minimum.rounds} rounds"
    if options.power_of_two:
        found += ", before scales were rounded to powers of two"
    if not bool(chosen.z.any()):
        return f"{found}; best when rounded for real: the scales as they were"
    best = chosen.start or "these log-scales"
    if chosen.share < 1:
        best = f"{chosen.share:.0%} of {best}"
    if chosen.moves:
        best += f", moved {count(chosen.moves, 'time')}"
    return f"{found}; best when rounded for real: {best}"


class _Clock:
    """Seconds of every part."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
