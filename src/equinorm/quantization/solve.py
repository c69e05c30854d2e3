"""Solve: measure a network, minimise the noise, choose by measurement, and move the network there."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equinorm._arguments import is_number, positional
from equinorm._display import count
from equinorm._errors import EqualizeError
from equinorm._symmetries import Symmetries
from equinorm.balancing.scope import nothing_moves
from equinorm.modules.choosing import Choice
from equinorm.quantization.batches import Batch, calibration_batches, random_batches
from equinorm.quantization.bias_correction import correct_, find_biases, mean_shifts
from equinorm.quantization.choosing import ChosenScales, Trials, choose, total
from equinorm.quantization.equalization import Equalization, TensorNoise
from equinorm.quantization.fake_quantization import Reference, Rounding, Simulation, decibels, weight_noise
from equinorm.quantization.minimize import LeastNoise, minimize
from equinorm.quantization.noise import Noise, Term
from equinorm.quantization.operands import find_operands
from equinorm.quantization.outputs import find_outputs
from equinorm.quantization.points import Point, find_points, layers_in_float
from equinorm.quantization.scheme import Scheme
from equinorm.quantization.statistics import Statistics, gather
from equinorm.quantization.terms import RoundedTensor, by_name, rounded_tensors
from equinorm.rescaling.casts import check_real
from equinorm.rescaling.powers_of_two import round_to_unit, unit_of_powers_of_two

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class EqualizeOptions:
    """The options of `equalize`, which explains them."""

    scheme: Scheme
    largest: float
    power_of_two: bool
    bias_correction: bool
    tol: float
    opaque: Choice
    progress: Progress | None

    def __post_init__(self) -> None:
        for name, least in (("largest", 1.0), ("tol", 0.0)):
            value = getattr(self, name)
            if not (is_number(value) and value > least):
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
        rounding: itself, as it was, and where and how it is rounded.
        symmetries: its rescalings.
        rounded: its tensors that are.
        left: what is not, and why.
        biases: what can be corrected, if that is asked for.
        batches: inputs.
        seen: what these showed.
    """

    rounding: Rounding
    symmetries: Symmetries
    rounded: Sequence[RoundedTensor]
    left: dict[str, str]
    biases: dict[str, str]
    batches: Sequence[Batch]
    seen: Statistics

    def noise(self, terms: Iterable[Term]) -> Noise:
        """Of some tensors, as a function of all free log-scales."""
        return Noise([*terms], self.symmetries.num_free)


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
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, calibration: Any, options: EqualizeOptions
) -> Equalization:
    """Equalize a network in place."""
    args, clock = positional(args), _Clock()
    batches = random_batches(args, kwargs) if calibration is None else calibration_batches(calibration, model, args, kwargs)
    network = _analysed(model, args, kwargs, batches, options, clock)
    minimum = minimize(network.noise(one.expected for one in network.rounded), options.tol, math.log(options.largest))
    clock.lap("minimum")
    chosen, trials = _chosen(network, minimum, options)
    reference, still = trials.reference if trials.is_whole else Reference(model, batches), torch.zeros_like(chosen.z)
    before, after = (_cost(network, trials, reference, z) for z in (still, chosen.z))
    network.symmetries.rescale_(chosen.z)
    moved = network.rounding.rescaled(chosen.z)
    corrections, measured = _corrected(Simulation(moved, still), after.measured, reference, network.biases)
    clock.lap("measuring")
    return Equalization(
        model=model,
        scheme=options.scheme,
        log_scales=chosen.z,
        symmetries=network.symmetries,
        noise_before=decibels(network.seen.signal, float(before.predicted.sum())),
        noise_after=decibels(network.seen.signal, float(after.predicted.sum())),
        measured_before=before.measured,
        measured_after=measured,
        gap=minimum.gap,
        converged=minimum.gap <= options.tol,
        reason=_reason(network.symmetries, minimum, options, chosen),
        tensors=_noises(network, before, after),
        corrections=corrections,
        left=network.left,
        biases=network.biases,
        samples=network.seen.samples,
        seconds=clock.laps,
        points=tuple(moved.points),
        activations=moved.activations,
        batches=tuple(batches),
        example=(args, dict(kwargs or {})),
    )


def _analysed(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    batches: Sequence[Batch],
    options: EqualizeOptions,
    clock: "_Clock",
) -> _Network:
    """A network, and what inputs show of it."""
    symmetries, points = find_points(model, args, kwargs, options.scheme, options.opaque)
    if not options.power_of_two:
        check_real(symmetries.casts, symmetries.scalings)
    operands, left = find_operands(model, args, kwargs, options.scheme, symmetries)
    left = layers_in_float(symmetries.values, points, options.scheme) | left
    points = (*points, *find_outputs(points, symmetries), *operands)
    biases, unbiased = {}, {}
    if options.bias_correction:
        biases, unbiased = find_biases(model, args, kwargs, symmetries.values, points)
    clock.lap("export")
    seen = gather(model, points, batches, options.watch("calibration"))
    points = tuple(point for point in points if isinstance(point, Point) or point.key in seen.activations)
    left |= {one.name: "no calibration batch adds it" for one in operands if one.key not in seen.activations}
    clock.lap("statistics")
    rounding = Rounding(model, points, seen.activations, by_name(symmetries.scalings))
    rounded = rounded_tensors(points, symmetries.tensors, rounding.scalings, seen)
    return _Network(rounding, symmetries, rounded, {**left, **unbiased}, biases, batches, seen)


def _chosen(network: _Network, minimum: LeastNoise, options: EqualizeOptions) -> tuple[ChosenScales, Trials]:
    """The log-scales that are as good as the best by measurement, and the trials that showed it."""
    symmetries, z = network.symmetries, torch.from_numpy(minimum.z)
    activations = network.noise(one.expected for one in network.rounded if one.kind == "activation")
    trials = Trials(network.rounding, activations, network.batches, corrects=network.biases, cuts=network.seen.cuts)
    levels, watch = options.scheme.weight_levels, options.watch("measuring")
    return choose(trials, z, _settling(symmetries, options), levels, watch, _others(symmetries, z)), trials


def _cost(network: _Network, trials: Trials, reference: Reference, z: Tensor) -> _Cost:
    """At log-scales z; measured by the trials if they took all samples as they are."""
    if trials.is_whole and not trials.corrects:
        measured = decibels(reference.signal, total(trials.measured(z)))
    else:
        measured = reference.signal_to_noise(Simulation(network.rounding, z))
    return _Cost(measured, _predicted(network, z))


def _predicted(network: _Network, z: Tensor) -> np.ndarray:
    """What rounding each tensor costs: by the formula, or by its errors where its range is clipped."""
    rounding, tensors = network.rounding, network.symmetries.tensors
    clipped = {point.weight: point for point in rounding.points if isinstance(point, Point) and point.scheme.clip}
    noises = network.noise(one.observed for one in network.rounded).exact(z.numpy())
    for place, one in enumerate(network.rounded):
        if one.kind == "weight" and one.name in clipped:
            weight = tensors[one.name], network.seen.weights[one.name], rounding.scalings[one.name]
            noises[place] = weight_noise(*weight, clipped[one.name], z)
    return noises


def _noises(network: _Network, before: _Cost, after: _Cost) -> tuple[TensorNoise, ...]:
    """What each tensor's rounding costs, in dB."""
    signal, costs = network.seen.signal, zip(network.rounded, before.predicted, after.predicted, strict=True)
    return tuple(
        TensorNoise(tensor.name, tensor.kind, decibels(signal, float(one)), decibels(signal, float(other)))
        for tensor, one, other in costs
    )


def _others(symmetries: Symmetries, z: Tensor) -> dict[str, Tensor]:
    """Log-scales of least norm, which no calibration data can mislead, and those half of the way to them."""
    least = symmetries.balance(p=2.0, tol=1e-3).log_scales
    return {"half of the way to the least norm (p = 2)": (z + least) / 2, "the least norm (p = 2)": least}


def _settling(symmetries: Symmetries, options: EqualizeOptions) -> Callable[[Tensor], Tensor]:
    """What brings log-scales within their limits, and to powers of two, of which none is beyond the limits either."""
    limit, unit = math.log(options.largest), unit_of_powers_of_two([*symmetries.scalings, *symmetries.casts])
    if options.power_of_two and math.isfinite(limit):
        limit = unit * math.floor(limit / unit + 1e-9)  # log(8) / log(2) may be just below 3

    def settled(z: Tensor) -> Tensor:
        z = z.clamp(-limit, limit)
        return round_to_unit(z, unit) if options.power_of_two else z

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


def _reason(symmetries: Symmetries, minimum: LeastNoise, options: EqualizeOptions, chosen: ChosenScales) -> str:
    """How it ended, in words."""
    if not symmetries.num_free:
        return nothing_moves(symmetries, None)
    found = f"about {100 * minimum.gap:.2g} % above the least noise"
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
