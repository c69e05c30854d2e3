"""Choosing: of log-scales near those of least predicted noise, the ones at which rounding, measured, costs least."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equinorm.quantization.batches import Batch, first_rows, rows
from equinorm.quantization.bias_correction import mean_shifts
from equinorm.quantization.fake_quantization import Reference, Rounding, Simulation
from equinorm.quantization.noise import Noise
from equinorm.quantization.points import Point

SHARES = (0.5, 0.75, 1.0)
"""Parts of the log-scales that are tried."""

LEFT = (1.0, 0.5, 0.25)
"""What is left of them at last, the first at which less is lost than in the network as it was."""

SURE, VERY_SURE = 1.0, 2.5
"""By how many standard errors noise must be less: that of weights, and that of all, of which samples differ more."""

Watch = Callable[[int, int], None]

TRIES = 16
"""Neighbours that are tried."""

SAMPLES, GLANCE = 64, 4
"""Samples that trials are measured on, at most, and which part of them tells that a neighbour is not worth the others."""

MOVED, STEPS = 0.3, 2.5
"""The share of log-scales that a neighbour moves, and how far, in steps of the largest weight: so that it is rounded anew."""


@dataclass(frozen=True, slots=True, eq=False)
class ChosenScales:
    """The log-scales that are taken.

    Attributes:
        z: log-scales.
        share: of the log-scales that were found, before neighbours were tried.
        moves: how often a neighbour was better.
        start: name of the other log-scales that were better than all shares; empty if none were.
    """

    z: Tensor
    share: float
    moves: int
    start: str = ""


class Trials:
    """What rounding costs at any log-scales: the energy of errors for each sample, measured.

    Args:
        rounding: the network, and where and how it is rounded.
        activations: what rounding activations costs, predicted.
        batches: calibration data; some samples are taken.
        corrects: weights of layers whose biases are corrected before measuring.
        cuts: may batches be cut into rows?
    """

    def __init__(
        self,
        rounding: Rounding,
        activations: Noise,
        batches: Sequence[Batch],
        *,
        corrects: Collection[str] = (),
        cuts: bool = True,
    ) -> None:
        self.activations, self.corrects, self._rounding = activations, corrects, rounding
        layers = [point for point in rounding.points if isinstance(point, Point)]
        weights = [replace(point, scheme=replace(point.scheme, activation_bits=None)) for point in layers]
        halves = {key: replace(was, low=was.half[0], high=was.half[1]) for key, was in rounding.activations.items()}
        self._of_weights, self._with_halves = replace(rounding, points=weights), replace(rounding, activations=halves)
        self.reference = Reference(rounding.model, first_rows(batches, SAMPLES, cuts=cuts))
        samples = sum(map(rows, batches))
        self.is_whole = samples <= SAMPLES
        few = first_rows(batches, math.ceil(min(samples, SAMPLES) / GLANCE))
        self._few = Reference(rounding.model, few) if cuts else self.reference
        self._known: dict[tuple[str, bytes], Tensor] = {}

    def expected(self, z: Tensor) -> Tensor:
        """What rounding weights costs, measured, and what rounding activations does, predicted."""
        return self._measured(z, self._of_weights, self.reference) + float(self.activations.exact(z.numpy()).sum())

    def measured(self, z: Tensor) -> Tensor:
        """What rounding all costs, with the bounds of activations that were seen."""
        return self._once("all", z, self._rounding, self.reference)

    def unseen(self, z: Tensor) -> Tensor:
        """The same with bounds from half of the data, as if the other half were new."""
        return self._once("new", z, self._with_halves, self.reference)

    def glance(self, z: Tensor) -> Tensor:
        """What rounding all costs in the first samples."""
        return self.measured(z) if self._few is self.reference else self._once("few", z, self._rounding, self._few)

    def _once(self, kind: str, z: Tensor, rounding: Rounding, reference: Reference) -> Tensor:
        """What was measured there is not measured again."""
        key = kind, (z + 0.0).numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._measured(z, rounding, reference)
        return self._known[key]

    def _measured(self, z: Tensor, rounding: Rounding, reference: Reference) -> Tensor:
        simulation = Simulation(rounding, z)
        if self.corrects:
            simulation = simulation.shifted(mean_shifts(simulation, reference.batches, self.corrects))
        return reference.noises(simulation)


def sure(less: Tensor, more: Tensor, errors: float) -> bool:
    """Is the first noise less than the second, by more than samples differ?

    What differs between samples is chance and would be gone on others: the mean difference must be so many standard errors.
    """
    difference = more - less
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()) > errors * error


def choose(
    trials: Trials,
    z: Tensor,
    settled: Callable[[Tensor], Tensor],
    levels: int,
    watch: Watch | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> ChosenScales:
    """Log-scales at which rounding costs least, of parts of some, of others, and of neighbours.

    The formula tells what rounding costs on average. What it costs here is measured, on few samples. So of all parts of the
    log-scales that cost no more than the best for sure, the smallest is taken: it keeps most room beyond the bounds that were
    seen. Of weights there are few that matter, and each is rounded some way or other: where scales move by a percent, all
    errors are drawn anew. So a neighbour is taken at which all costs less, if weights do for sure, or all does for very sure:
    it stays better on other data. At last, what costs more than in the network as it was, with the bounds of activations that
    were seen or with bounds from half of the data, is taken back by half, or left.

    Args:
        trials: what measures.
        z: log-scales of least predicted noise.
        settled: brings log-scales within their limits, or to powers of two.
        levels: steps of the largest weight.
        watch: called before each neighbour with its number and how many there are.
        others: further log-scales by name. One is taken if it costs less for sure, with bounds from half of the data too.
    """
    still = torch.zeros_like(z)
    parts = {tuple(part.tolist()): (share, part) for share in SHARES for part in [settled(share * z)] if part.any()}
    if not parts:
        return ChosenScales(still, 0.0, 0)
    at_rest, tried = trials.measured(still), [(trials.measured(part), share, part) for share, part in parts.values()]
    least = min(tried, key=lambda found: total(found[0]))[0]
    measured, share, chosen = next(found for found in tried if not sure(least, found[0], SURE))
    start = ""
    for name, other in (others or {}).items():
        other = settled(other)
        if sure(found := trials.measured(other), measured, SURE) and sure(trials.unseen(other), trials.unseen(chosen), SURE):
            measured, share, chosen, start = found, 1.0, other, name
    chosen, moves = _moved(trials, chosen, measured, settled, STEPS / levels, watch)
    unseen = trials.unseen(still)
    for part in LEFT:
        less = settled(part * chosen) if part < 1 else chosen
        if total(trials.measured(less)) < total(at_rest) and total(trials.unseen(less)) < total(unseen):
            return ChosenScales(less, share * part, moves, start)
    return ChosenScales(still, 0.0, 0)


def _moved(
    trials: Trials, z: Tensor, measured: Tensor, settled: Callable[[Tensor], Tensor], step: float, watch: Watch | None
) -> tuple[Tensor, int]:
    """Log-scales near some that lose less, and how often some did."""
    generator, least, moves = torch.Generator().manual_seed(0), None, 0
    for number in range(TRIES):
        if watch is not None:
            watch(number, TRIES)
        is_moved = torch.rand(z.shape, generator=generator, dtype=z.dtype) < MOVED
        near = settled(z + step * torch.randn(z.shape, generator=generator, dtype=z.dtype) * is_moved)
        if torch.equal(near, z) or total(trials.glance(near)) >= total(trials.glance(z)):
            continue
        if total(found := trials.measured(near)) >= total(measured):
            continue
        least = trials.expected(z) if least is None else least
        if sure(expected := trials.expected(near), least, SURE) or sure(found, measured, VERY_SURE):
            z, measured, least, moves = near, found, expected, moves + 1
    return z, moves


def total(noise: Tensor) -> float:
    """The sum over samples."""
    return float(noise.sum())
