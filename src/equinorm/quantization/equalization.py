"""Equalization: the record of a network moved to where rounding costs least."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equinorm._display import and_more, as_html, by_reason, count, drawing, plain
from equinorm._errors import EqualizeError, describe, does_not_run
from equinorm._symmetries import Symmetries
from equinorm.modules.running import on_cpu
from equinorm.quantization.batches import Batch, calibration_batches
from equinorm.quantization.calls import Key
from equinorm.quantization.fake_quantization import Reference, Rounding, Simulation
from equinorm.quantization.operands import Place
from equinorm.quantization.points import Point
from equinorm.quantization.prepare import Preparation
from equinorm.quantization.scheme import Scheme
from equinorm.quantization.statistics import ActivationStatistics
from equinorm.quantization.terms import by_name

_RECORDED = "noise_before", "noise_after", "measured_before", "measured_after", "gap", "converged", "reason", "samples"
"""What `Equalization.to_dict` takes as it is."""


@dataclass(frozen=True, slots=True)
class TensorNoise:
    """What rounding one tensor costs at the outputs: signal over its noise in dB, before and after.

    Attributes:
        name: of the weight, or of the module whose input it is.
        kind: "weight" or "activation".
        before: 10·log10(Σ y² / N_k) of the network as it was.
        after: the same of the equalized one.
    """

    name: str
    kind: str
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRanges:
    """The largest |w| of every output channel of a weight, before and after."""

    name: str
    before: np.ndarray
    after: np.ndarray

    @property
    def spread(self) -> float:
        """Logarithm of the largest over the median range, before."""
        alive = self.before[self.before > 0]
        return float(np.log(alive.max() / np.median(alive))) if len(alive) else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Equalization:
    """A network with the scales at which rounding costs least, and how they were found.

    Attributes:
        model: the equalized network, in float; quantize it with any tool.
        scheme: what rounding was meant.
        log_scales: float64 natural logarithms of shape (num_free,), from the network as it was to `model`.
        symmetries: of `model`.
        noise_before: signal over quantization noise, predicted to first order, in dB: 10·log10(Σ y² / N). Higher is better.
            With the bounds of activations that were seen; of weights whose ranges are clipped, by their errors.
        noise_after: the same of `model`.
        measured_before: the same ratio, measured on the calibration data with rounded numbers.
        measured_after: the same of `model`, biases corrected if asked for.
        gap: by which share the predicted noise of the minimum that was found, before measurement changed it, is above the
            least that any log-scales reach: an estimate from a dual bound, known as closely as its search converged.
        converged: is the gap at most `tol`?
        reason: how it ended, in words.
        tensors: noise by tensor.
        corrections: what was added to outputs of layers by bias correction, by the weight's name.
        left: layers, and sums or operands of sums, that stay in float though the scheme asks for them, and biases that cannot
            be corrected, and why.
        biases: names of the biases that correction may change, by the weight's name.
        samples: of calibration data.
        preparation: what was folded and set free; None in place.
        seconds: for export, statistics, minimising, and measuring.
    """

    model: nn.Module = field(repr=False)
    scheme: Scheme
    log_scales: Tensor = field(repr=False)
    symmetries: Symmetries = field(repr=False)
    noise_before: float
    noise_after: float
    measured_before: float
    measured_after: float
    gap: float
    converged: bool
    reason: str
    tensors: tuple[TensorNoise, ...] = field(repr=False)
    corrections: Mapping[str, Tensor] = field(repr=False)
    left: Mapping[str, str] = field(repr=False)
    biases: Mapping[str, str] = field(repr=False)
    samples: int
    seconds: Mapping[str, float] = field(repr=False)
    points: tuple[Place, ...] = field(repr=False)
    activations: Mapping[Key, ActivationStatistics] = field(repr=False)
    batches: tuple[Batch, ...] = field(repr=False)
    example: Batch = field(repr=False)
    preparation: Preparation | None = field(repr=False, default=None)

    @on_cpu()
    def measured(self, batches: Any = None) -> tuple[float, float]:
        """Signal over quantization noise in dB, before and after, measured with rounded numbers: Σ y² / Σ (ŷ − y)².

        Args:
            batches: other inputs than those of calibration, each a tuple, a tensor or a dict as there. The bounds of
                activations stay.

        Returns:
            The ratio of the network as it was, and of `model`. Both are compared with the network as it was, in float.

        Raises:
            EqualizeError: if the batches are no inputs of the model.
        """
        given = self.batches if batches is None else calibration_batches(batches, self.model, *self.example)
        reference = Reference(self.model, given, self._shifts())
        before, after = self._simulations()
        return reference.signal_to_noise(before), reference.signal_to_noise(after)

    @on_cpu()
    def simulated(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What the rounded network returns for inputs, before and after: its outputs, a tensor if there is one.

        Raises:
            EqualizeError: if these are no inputs of the model.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> found = equinorm.equalize(net, torch.randn(1, 8), calibration=[torch.randn(32, 8)])
        >>> before, after = found.simulated(torch.randn(3, 8))
        >>> before.shape, after.shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
        """
        try:
            before, after = (simulation.outputs((args, kwargs)) for simulation in self._simulations())
        except Exception as error:
            raise EqualizeError(does_not_run(self.model, args, kwargs, error)) from error
        return (before[0], after[0]) if len(before) == 1 else (before, after)

    def _shifts(self) -> dict[str, Tensor]:
        return {name: -shift for name, shift in self.corrections.items()}

    def _simulations(self) -> tuple[Simulation, Simulation]:
        """The network as it was and as it is, rounded."""
        rounding = Rounding(self.model, self.points, self.activations, by_name(self.symmetries.scalings))
        still = torch.zeros_like(self.log_scales)
        return Simulation(rounding, -self.log_scales, self._shifts()), Simulation(rounding, still)

    @property
    def table(self) -> list[tuple[str, str, str, str]]:
        """Name, kind, and signal over noise before and after of every tensor, as text."""
        return [(t.name, t.kind, f"{t.before:.1f}", f"{t.after:.1f}") for t in self.tensors]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values of what was found, as text."""
        return [
            ("scheme", str(self.scheme)),
            ("signal over noise, predicted", _change(self.noise_before, self.noise_after)),
            ("signal over noise, measured", _change(self.measured_before, self.measured_after)),
            ("result", self.reason),
            ("free classes", f"{self.symmetries.num_free:,}"),
            ("calibration", count(self.samples, "sample")),
            *([("biases corrected", count(len(self.corrections), "layer"))] if self.corrections else []),
            *([("left", _left(self.left))] if self.left else []),
            ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())),
        ]

    def channel_ranges(self) -> list[ChannelRanges]:
        """Ranges of output channels of every weight that moves, before and after; those that were least even first."""
        scalings, tensors = by_name(self.symmetries.scalings), self.symmetries.tensors
        found = []
        first = {point.weight: point for point in reversed(self.points) if isinstance(point, Point)}
        for point in self.points:
            if not isinstance(point, Point) or point is not first[point.weight] or not scalings[point.weight].factors:
                continue
            scaling = scalings[point.weight]
            after = tensors[point.weight].detach().to("cpu", torch.float64).abs()
            before = after / scaling.log_scales(self.log_scales).exp()
            axes = [axis for axis in range(after.dim()) if axis != int(point.is_transposed)]
            found.append(ChannelRanges(point.weight, *(part.amax(axes).numpy() for part in (before, after))))
        return sorted(found, key=lambda one: -one.spread)

    def plot(self, axes: Any = None) -> Any:
        """Draw the ranges of channels before and after, of the weights that changed most. Needs matplotlib.

        Args:
            axes: two axes of matplotlib to draw in; None for a new figure.

        Returns:
            The two axes: noise by tensor, and ranges by channel.

        Raises:
            EquinormError: if matplotlib is not installed.
        """
        return drawing("equalizations").plot(self, axes)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write facts, pictures and the noise of tensors as one page (.html) or picture (.png). Needs matplotlib.

        Args:
            path: of the file; one that exists is replaced.

        Raises:
            EquinormError: if the file cannot be written, or matplotlib is not installed.
        """
        drawing("equalizations").report(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it: all but the model and the data; numbers that are not finite are strings."""
        further = {
            "left": dict(self.left),
            "log_scales": self.log_scales.tolist(),
            "corrected": sorted(self.corrections),
            "seconds": dict(self.seconds),
        }
        record = {name: getattr(self, name) for name in _RECORDED}
        return plain({"scheme": str(self.scheme), **record, "tensors": [asdict(tensor) for tensor in self.tensors], **further})

    def __str__(self) -> str:
        return (
            f"{self.scheme}: signal over quantization noise {_change(self.noise_before, self.noise_after)} predicted, "
            f"{_change(self.measured_before, self.measured_after)} measured; {self.reason}"
        )

    def _repr_html_(self) -> str:
        columns = "signal over noise of", "kind", "before, dB", "after, dB"
        return as_html(f"Equalization of {describe(self.model)}", self.facts, (columns, self.table, "tensors"))


def _change(before: float, after: float) -> str:
    """Two numbers of decibels."""
    return f"{before:.1f} → {after:.1f} dB"


def _left(left: Mapping[str, str]) -> str:
    """Why layers and sums stay in float, and how many for each reason."""
    return "; ".join(f"{and_more(names, 1)}: {why}" for why, names in by_reason(left))
