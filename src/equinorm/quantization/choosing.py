"""Choosing: of log-scales near those of least predicted noise, the ones at which rounding, measured, costs least."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from equinorm._scaling import Scaling
from equinorm.quantization.batches import Batch, first_rows
from equinorm.quantization.bias_correction import mean_shifts
from equinorm.quantization.fake import Reference, Simulation
from equinorm.quantization.operands import Place
from equinorm.quantization.statistics import Activation, Statistics

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Parts of the log-scales that are tried."""

MARGIN = 0.2
"""By how many dB rounding must cost less than in the network as it was, which is left alone otherwise."""

TRIES = 16
"""Neighbours that are tried."""

SAMPLES = 64
"""Samples that trials are measured on, at most."""

MOVED, STEPS = 0.3, 2.5
"""The share of log-scales that a neighbour moves, and how far, in steps of the largest weight: so that it is rounded anew."""


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """The log-scales that are taken.

    Attributes:
        z: log-scales.
        share: of the log-scales that were found, before neighbours were tried.
        moves: how often a neighbour was better.
    """

    z: Tensor
    share: float
    moves: int


class Trials:
    """What rounding costs at any log-scales: signal over noise in dB, measured.

    Args:
        model: the network.
        points: where it is rounded.
        seen: what calibration says of it.
        scalings: of its weights, by name.
        batches: calibration data; some samples are taken.
        corrects: are biases corrected before measuring?
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[Place],
        seen: Statistics,
        scalings: Mapping[str, Scaling],
        batches: Sequence[Batch],
        *,
        corrects: bool,
    ) -> None:
        self.model, self.points, self.scalings, self.corrects = model, points, scalings, corrects
        self.seen = seen.activations
        self.halves = {key: replace(was, low=was.half[0], high=was.half[1]) for key, was in seen.activations.items()}
        self.reference = Reference(model, first_rows(batches, SAMPLES))

    def measured(self, z: Tensor) -> float:
        """With the bounds of activations that were seen."""
        return self._measured(z, self.seen)

    def unseen(self, z: Tensor) -> float:
        """With bounds from half of the data, as if the other half were new."""
        return self._measured(z, self.halves)

    def _measured(self, z: Tensor, bounds: Mapping[tuple[str, int], Activation]) -> float:
        simulation = Simulation(self.model, self.points, bounds, self.scalings, z)
        if self.corrects:
            simulation = simulation.shifted(mean_shifts(simulation, self.reference.batches))
        return self.reference.signal_to_noise(simulation)


def choose(trials: Trials, z: Tensor, settled: Callable[[Tensor], Tensor], levels: int) -> Chosen:
    """Log-scales at which rounding costs least, of parts of some and of neighbours.

    The formula tells what rounding costs on average; a few errors, each some way or other, make up most of it. Where scales
    move by a percent, all are drawn anew: so the best of several neighbours is better than the average, and stays so on other
    data, since weights are rounded alike. What is chosen beats the network as it was by a margin, with the bounds of
    activations that were seen and with bounds from half of the data: the more even channels are, the more of them reach
    beyond bounds on data that were not seen.

    Args:
        trials: what measures.
        z: log-scales of least predicted noise.
        settled: brings log-scales within their limits, or to powers of two.
        levels: steps of the largest weight.
    """
    still = torch.zeros_like(z)
    at_rest, generator = trials.measured(still), torch.Generator().manual_seed(0)
    parts = [(share, settled(share * z)) for share in SHARES]
    best, share, chosen = max(((trials.measured(part), share, part) for share, part in parts), key=lambda found: found[0])
    moves = 0
    for _ in range(TRIES):
        is_moved = torch.rand(z.shape, generator=generator, dtype=z.dtype) < MOVED
        step = torch.randn(z.shape, generator=generator, dtype=z.dtype) * is_moved * (STEPS / levels)
        if (found := trials.measured(near := settled(chosen + step))) > best:
            best, chosen, moves = found, near, moves + 1
    if best >= at_rest + MARGIN:
        unseen = trials.unseen(still)
        if trials.unseen(chosen) >= unseen:
            return Chosen(chosen, share, moves)
        for part in SHARES[2:]:
            less = settled(part * chosen)
            if trials.measured(less) >= at_rest + MARGIN and trials.unseen(less) >= unseen:
                return Chosen(less, share * part, moves)
    return Chosen(still, 0.0, 0)
