"""Equalize: choose the scales of a network at which rounding its numbers costs least."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equinorm._arguments import positional
from equinorm._errors import EqualizeError, ExportError, describe
from equinorm._modules import Choice, chosen, is_exported, on_cpu, unwrapped
from equinorm._symmetries import Symmetries
from equinorm.balancing.scope import nothing_moves
from equinorm.quantization.bias_correction import correct_, mean_shifts
from equinorm.quantization.equalization import Equalization, TensorNoise
from equinorm.quantization.fake import Simulation, decibels, signal_to_noise
from equinorm.quantization.freeing import settle_
from equinorm.quantization.minimize import Minimum, minimize
from equinorm.quantization.noise import Noise
from equinorm.quantization.points import Point, find_points
from equinorm.quantization.prepare import prepare
from equinorm.quantization.scheme import Scheme, scheme_of
from equinorm.quantization.statistics import Activation, Batch, Statistics, calibration_batches, gather, random_batches
from equinorm.quantization.terms import by_name, terms
from equinorm.rescaling.powers_of_two import round_to_powers_of_two

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

FALLBACKS = (0.5, 0.25)
"""Parts of the log-scales that are tried where rounding, measured, got worse."""


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


@on_cpu()
def equalize(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    scheme: Scheme | str = Scheme(),  # noqa: B008 -- it is frozen
    largest: float = 1e8,
    power_of_two: bool = False,
    bias_correction: bool = False,
    tol: float = 5e-3,
    opaque: Choice = (),
    progress: Progress | None = None,
) -> Equalization:
    """An equalized copy of a network: of all rescalings that keep its function, the one that loses least when rounded.

    Minimises the energy of rounding errors at the outputs, to first order,

        N(z) = Σ_g r_g(z)² / (12 levels²) · Σ_{i in g} F_i e^(−2 λ_i(z)),

    over log-scales z of the prepared copy (normalizations folded, bounded activations set free, see `prepare`), where g are the
    groups of numbers that share a step, r_g the range of a group, λ_i the log-scale of a number, and F_i how much an error in
    it matters: E Σ_k (∂y_k/∂w_i)² over the calibration data. Ranges of activations are those that many more samples should
    keep, by how the largest entries of samples are spread. N is convex, so the minimum is global; `Equalization.gap` bounds
    how far the result may be above it. Then the rounded network is measured on the calibration data; if it lost more than the
    network as it was, a part of the log-scales is taken, or none, and `reason` says so.

    Args:
        model: any module in evaluation mode that `torch.export` can handle and `copy.deepcopy` can copy. It is untouched.
        args: its positional inputs, an example.
        kwargs: its keyword inputs.
        calibration: batches of inputs, each a tuple (or a tensor, or a dict of keyword inputs), of any batch size. Tens of
            samples tell what matters; bounds of activations are better from hundreds. None: random inputs with the mean and
            spread of `args`; the scales are nearly as good, but the bounds are wrong, so measure on data.
        scheme: what will be rounded to how many bits, or its short form, as "w8a8".
        largest: no free scale is larger than this, or smaller than its inverse.
        power_of_two: round scales to powers of two. Then the float network is bitwise the same, and the noise larger.
        bias_correction: also add to biases what rounding shifts on average. The copy then differs from the model in float, by
            what makes up for rounding with this scheme.
        tol: on the gap.
        opaque: names or submodules that are not looked into, as in `symmetries`.
        progress: called with what is done ("calibration"), how far, and of how much.

    Returns:
        The copy and the record.

    Raises:
        EqualizeError: for inputs, data or schemes that do not fit, and networks with nothing to quantize.
        EquinormError: if the model cannot be copied or exported.

    Source: convexity of ℓp balancing (Stock et al., ICLR 2019) with the noise of uniform rounding in place of the norm.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    >>> x = torch.randn(32, 8)
    >>> result = equinorm.equalize(net, (x,), calibration=[(x,)], scheme="w8a8-tensor")
    >>> result.converged, result.measured_after >= result.measured_before
    (True, True)
    >>> equinorm.deviation(net, result.model, (x,)) < 1e-5
    True
    """
    options = Options(scheme_of(scheme), largest, power_of_two, bias_correction, tol, progress)
    _check(model)
    hidden = list(chosen(unwrapped(model), opaque, ExportError, "opaque"))
    prepared, preparation = prepare(model, args, kwargs, opaque=hidden)
    found = _equalized(prepared, args, kwargs, calibration, options, hidden)
    settle_(prepared)
    return replace(found, preparation=preparation)


@on_cpu()
def equalize_(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    scheme: Scheme | str = Scheme(),  # noqa: B008 -- it is frozen
    largest: float = 1e8,
    power_of_two: bool = False,
    bias_correction: bool = False,
    tol: float = 5e-3,
    opaque: Choice = (),
    progress: Progress | None = None,
) -> Equalization:
    """Equalize a network in place: as `equalize`, but its parameters stay the same objects, and no module is replaced.

    So batch normalization stays as it is, though quantizers will fold it, and what is bounded (ReLU6) stays pinned: give what
    `equinorm.quantization.prepare` makes of such a network. Nothing is written before all is known to be valid.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    >>> equinorm.equalize_(net, torch.randn(32, 8), scheme="w8a8-tensor").model is net
    True
    """
    options = Options(scheme_of(scheme), largest, power_of_two, bias_correction, tol, progress)
    _check(model)
    return _equalized(unwrapped(model), args, kwargs, calibration, options, opaque)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise EqualizeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if model.training and not is_exported(model):
        raise EqualizeError(
            f"{describe(model)} is in training mode, and what is quantized runs in evaluation mode: model.eval()."
        )


def _equalized(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, calibration: Any, options: Options, opaque: Choice
) -> Equalization:
    """Equalize a network in place."""
    args, clock = positional(args), _Clock()
    batches = random_batches(args, kwargs) if calibration is None else calibration_batches(calibration, model, args, kwargs)
    symmetries, points = find_points(model, args, kwargs, options.scheme, opaque)
    clock.lap("export")
    report = options.progress
    watch = None if report is None else lambda done, total: report("calibration", done, total)
    seen = gather(model, points, batches, watch)
    clock.lap("statistics")
    expected, observed, names = terms(points, symmetries.tensors, by_name(symmetries.scalings), seen.activations, seen.weights)
    minimum = minimize(Noise(expected, symmetries.num_free), options.tol, math.log(options.largest))
    clock.lap("minimum")
    moving = [scaling for scaling in symmetries.scalings if scaling.factors]

    def part(share: float) -> Tensor:
        z = share * torch.from_numpy(minimum.z)
        return round_to_powers_of_two(z, moving) if options.power_of_two else z

    taken = _Taken.measure(model, points, seen, symmetries, part, batches)
    symmetries.rescale_(taken.z)
    corrections, after = (
        _corrected(model, points, seen, symmetries, taken, batches) if options.bias_correction else ({}, taken.after)
    )
    clock.lap("measuring")
    noise = Noise(observed, symmetries.num_free)
    still, moved = noise.exact(np.zeros(noise.num_free)), noise.exact(taken.z.numpy())
    return Equalization(
        model=model,
        scheme=options.scheme,
        log_scales=taken.z,
        symmetries=symmetries,
        noise_before=decibels(seen.signal, float(still.sum())),
        noise_after=decibels(seen.signal, float(moved.sum())),
        measured_before=taken.before,
        measured_after=after,
        gap=minimum.gap,
        converged=minimum.gap <= options.tol,
        reason=_reason(symmetries, minimum, options, taken),
        tensors=tuple(
            TensorNoise(*name, decibels(seen.signal, float(one)), decibels(seen.signal, float(other)))
            for name, one, other in zip(names, still, moved, strict=True)
        ),
        corrections=corrections,
        samples=seen.samples,
        seconds=clock.laps,
        points=points,
        activations=_scaled(seen, points, taken.z),
        batches=tuple(batches),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Taken:
    """The log-scales that are taken, and signal over noise in dB without and with them.

    Attributes:
        share: of the log-scales that were found.
    """

    z: Tensor
    before: float
    after: float
    share: float

    @staticmethod
    def measure(
        model: nn.Module,
        points: tuple[Point, ...],
        seen: Statistics,
        symmetries: Symmetries,
        part: Callable[[float], Tensor],
        batches: list[Batch],
    ) -> "_Taken":
        """All of the log-scales that were found, or as much of them as makes the rounded network no worse than it was.

        `part` gives a share of them, rounded if it must be: half of a power of two's logarithm is none.

        It must be no worse with the bounds of activations that were seen, and with bounds from half of the data: the more even
        channels are, the more of them reach beyond bounds on data that were not seen.
        """
        halves = {key: replace(was, low=was.half[0], high=was.half[1]) for key, was in seen.activations.items()}
        scalings = by_name(symmetries.scalings)

        def measured(*shares: float) -> list[tuple[float, float]]:
            """Signal over noise with both bounds."""
            bounds = (seen.activations, halves)
            simulations = [Simulation(model, points, known, scalings, part(share)) for share in shares for known in bounds]
            ratios = iter(signal_to_noise(simulations, batches))
            return [*zip(ratios, ratios, strict=True)]

        still, moved = measured(0.0, 1.0)
        if moved[0] >= still[0] and moved[1] >= still[1]:
            return _Taken(part(1.0), still[0], moved[0], 1.0)
        tried = zip([still, *measured(*FALLBACKS)], (0.0, *FALLBACKS), strict=True)
        best, share = max(tried, key=lambda pair: min(pair[0][0] - still[0], pair[0][1] - still[1]))
        return _Taken(part(share), still[0], best[0], share)


def _corrected(
    model: nn.Module, points: tuple[Point, ...], seen: Statistics, symmetries: Symmetries, taken: _Taken, batches: list[Batch]
) -> tuple[dict[str, Tensor], float]:
    """Correct the biases of a rescaled model; returns what was added, and signal over noise in dB."""
    common = model, points, _scaled(seen, points, taken.z), by_name(symmetries.scalings), torch.zeros_like(taken.z)
    found = mean_shifts(Simulation(*common), batches)
    (after,) = signal_to_noise([Simulation(*common, found)], batches)
    if not after > taken.after:
        return {}, taken.after
    correct_(model, found)
    return found, after


def _scaled(seen: Statistics, points: tuple[Point, ...], z: Tensor) -> dict[tuple[str, int], Activation]:
    """The bounds of activations at other log-scales."""
    found = {}
    for point in points:
        scales = point.scaling.log_scales(z).exp().expand(point.scaling.shape).reshape(-1)
        was = seen.activations[point.key]
        squares = [part / scales.square() for part in (was.sensitivity, was.coherent)]
        low, high, lows, highs, *half = (part * scales for part in (was.low, was.high, was.lows, was.highs, *was.half))
        found[point.key] = Activation(low, high, (half[0], half[1]), lows, highs, *squares)
    return found


def _reason(symmetries: Symmetries, minimum: Minimum, options: Options, taken: _Taken) -> str:
    """How it ended, in words."""
    if not symmetries.num_free:
        return nothing_moves(symmetries, None)
    share = f"within {100 * minimum.gap:.2g} % of the least noise"
    if minimum.gap > options.tol:
        share += f", not the {100 * options.tol:.2g} % asked for, after {minimum.rounds} rounds"
    if options.power_of_two:
        share += ", before scales were rounded to powers of two"
    if taken.share == 1.0:
        return share
    moves = bool(taken.z.any())  # a small part may be rounded to nothing
    kept = f"{taken.share:g} of the log-scales are taken" if moves else "the scales are left as they were"
    return f"{share}; by measurement, {kept}"


class _Clock:
    """Seconds of every part."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
