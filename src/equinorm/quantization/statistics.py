"""Statistics: between which bounds activations lie, and how much rounding errors matter to the network's outputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from equinorm._errors import EqualizeError, describe, first_line
from equinorm.modules.running import by_default, undisturbed
from equinorm.quantization.batches import Batch, floats_in, may_be_cut, rows, split_rows, watched
from equinorm.quantization.calls import ActivationSum, CallWatch, Key, LayerCall
from equinorm.quantization.operands import Operand, Place
from equinorm.quantization.outputs import Output, output_key

MOST_PARTS = 64
"""Backward passes at most: batches of more rows are taken several rows at a time."""

MASS = 1 / 16
"""A value that this share of a channel's entries has is rounded alike everywhere."""


TAIL, GROWTH = 8, 100.0
"""Samples from which tails are told, and how many times more samples their bounds should hold for."""


@dataclass(slots=True, eq=False)
class ActivationStatistics:
    """What was seen at one point, for each channel, or for each place along whatever axes are told apart there.

    Attributes:
        low: least entry, at most 0.
        high: largest entry, at least 0.
        half: both from every other pass alone.
        lows: least entries of the samples that went lowest, of shape (samples, channels), those first.
        highs: largest entries of those that went highest.
        sensitivity: mean over samples of Σ (∂y/∂x)², over positions and outputs: the noise that errors of variance 1 make.
        coherent: the part of it from entries that share one value (zeros behind ReLU and a normalization, say), whose errors
            add up: (Σ ∂y/∂x)² over these.
    """

    low: Tensor
    high: Tensor
    half: tuple[Tensor, Tensor]
    lows: Tensor
    highs: Tensor
    sensitivity: Tensor
    coherent: Tensor

    def expected(self) -> tuple[Tensor, Tensor]:
        """Bounds that `GROWTH` times as many samples should keep, tails taken to be exponential.

        The mean excess over the 9th largest tells the tail's scale σ; n times as many samples reach σ·ln n further.
        """
        return self.low - _beyond(-self.lows), self.high + _beyond(self.highs)

    def scaled(self, scales: Tensor) -> "ActivationStatistics":
        """What would have been seen with every channel multiplied by a scale, positive and of shape (channels,)."""
        low, high, *half, lows, highs = (bound * scales for bound in (self.low, self.high, *self.half, self.lows, self.highs))
        sensitivity, coherent = (part / scales.square() for part in (self.sensitivity, self.coherent))
        return ActivationStatistics(low, high, (half[0], half[1]), lows, highs, sensitivity, coherent)

    def add_(self, other: "ActivationStatistics", is_in_half: bool) -> None:
        """Add what another pass shows.

        Args:
            other: of that pass alone.
            is_in_half: does that pass count for `half`?
        """
        self.lows, self.highs = (
            _top(torch.cat([self.lows, other.lows]), False),
            _top(torch.cat([self.highs, other.highs]), True),
        )
        if is_in_half:
            self.half = torch.minimum(self.half[0], other.low), torch.maximum(self.half[1], other.high)
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.sensitivity += other.sensitivity
        self.coherent += other.coherent


def _beyond(tops: Tensor) -> Tensor:
    """By how much more samples would exceed the largest."""
    return (tops[:-1].mean(0) - tops[-1]) * math.log(GROWTH) if len(tops) > 1 else torch.zeros_like(tops[0])


@dataclass(slots=True, eq=False)
class Statistics:
    """What calibration says of a network.

    Attributes:
        activations: by point.
        weights: mean over samples of (∂y/∂w)², summed over outputs, by the weight's name; of the weight's shape.
        signal: mean over samples of Σ y².
        samples: how many.
        passes: backward passes.
        cuts: may batches be cut into rows?
    """

    activations: dict[Key, ActivationStatistics] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    signal: float = 0.0
    samples: int = 0
    passes: int = 0
    cuts: bool = True


def gather(
    model: nn.Module, points: Sequence[Place], batches: Sequence[Batch], progress: Callable[[int, int], None] | None = None
) -> Statistics:
    """Run a network on calibration data and back, outputs weighted by random signs.

    For signs v, independent and of mean 0, E (v·∂y/∂w)² = Σ_k (∂y_k/∂w)²: one backward pass tells of all outputs and samples.

    Args:
        model: the network.
        points: where it is rounded.
        batches: inputs of any batch size.
        progress: called after each pass with its number and how many there are.

    Raises:
        EqualizeError: if the network does not run on a batch, a number is not finite, or no gradient reaches a point.
    """
    found = Statistics(cuts=may_be_cut(model, batches))
    sizes = [*map(rows, batches)]
    size = max(math.ceil(sum(sizes) / MOST_PARTS), 1) if found.cuts else max(sizes)
    passes = [(number, part) for number, batch in enumerate(batches) for part in split_rows(batch, size)]
    generator = torch.Generator().manual_seed(0)
    for done, (number, part) in enumerate(passes):
        _Pass(model, points, found, number).run(part, generator)
        if progress is not None:
            progress(done + 1, len(passes))
    for seen in found.activations.values():
        seen.sensitivity /= found.samples
        seen.coherent /= found.samples
    for name in found.weights:
        found.weights[name] /= found.samples
    found.signal /= found.samples
    if not found.signal > 0:
        raise EqualizeError(f"every output of {describe(model)} is zero on the calibration data: there is no signal to keep.")
    if all(not bool(seen.any()) for seen in found.weights.values()):
        raise EqualizeError(f"no output of {describe(model)} depends on its weights on the calibration data.")
    return found


class _Pass:
    """One run forth and back."""

    def __init__(self, model: nn.Module, points: Sequence[Place], found: Statistics, number: int) -> None:
        self.model, self.found, self.number = model, found, number
        self.points = {point.key: point for point in points}
        self.leaves: dict[str, Tensor] = {}
        self.inputs: list[tuple[Place, Tensor]] = []

    def run(self, part: Batch, generator: torch.Generator) -> None:
        """Add what this part shows; buffers are put back when the pass is over, since its way back reads them."""
        with undisturbed(self.model), by_default(), torch.enable_grad():
            self._run(part, generator)

    def _run(self, part: Batch, generator: torch.Generator) -> None:
        outputs = self._forward(part)
        signs = [
            (torch.randint(0, 2, output.shape, generator=generator) * 2 - 1).to(output.device, output.dtype)
            for output in outputs
        ]
        total = sum(((output * sign).sum() for output, sign in zip(outputs, signs, strict=True)), start=torch.zeros(()))
        wanted = [*self.leaves.values(), *(value for _, value in self.inputs)]
        if not total.requires_grad:
            if torch.is_inference_mode_enabled():
                raise EqualizeError("no gradient is recorded within torch.inference_mode(): equalize outside of it.")
            raise EqualizeError(
                f"no gradient reaches the layers of {describe(self.model)}: its forward runs without gradients "
                "(torch.no_grad, detach). Equalize the module inside."
            )
        try:
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        except RuntimeError as error:
            reason = first_line(error).partition(" Hint:")[0]  # which is about a traceback that is not shown
            raise EqualizeError(f"gradients of {describe(self.model)} cannot be taken: {reason}") from error
        if not all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None):
            raise EqualizeError(
                f"gradients of {describe(self.model)} are NaN or inf on calibration batch {self.number}: what rounding costs "
                "cannot be told. In half precision, equalize a copy in float32: model.float(). Otherwise balance the network: "
                "equinorm.balance(..., p=math.inf) evens out its channels."
            )
        for name, gradient in zip(self.leaves, gradients, strict=False):
            leaf = self.leaves[name]
            dtype = torch.promote_types(leaf.dtype, torch.float32)  # half precision holds few squares
            squares = torch.zeros_like(leaf, dtype=dtype) if gradient is None else gradient.to(dtype).square()
            self.found.weights[name] = self.found.weights[name].add_(squares) if name in self.found.weights else squares
        for (point, value), gradient in zip(self.inputs, gradients[len(self.leaves) :], strict=True):
            self._add(point, value.detach(), torch.zeros_like(value) if gradient is None else gradient)
        self.found.signal += sum(float(output.detach().double().square().sum()) for output in outputs)
        self.found.samples += rows(part)
        self.found.passes += 1

    def _forward(self, part: Batch) -> list[Tensor]:
        sums = self._sum if any(isinstance(p, Operand) for p in self.points.values()) else None
        result = watched(self.model, part, self.number, CallWatch(self.model, self._note, sums))
        outputs = floats_in(result)
        if not all(bool(output.isfinite().all()) for output in outputs):
            raise EqualizeError(f"{describe(self.model)} returns NaN or inf on calibration batch {self.number}.")
        return outputs

    def _note(self, call: LayerCall) -> Tensor:
        """Run a call on copies of its input and weight that gradients reach."""
        point = self.points.get((call.name, call.number))
        if point is None:
            return call.run()
        leaf = self.leaves.setdefault(call.name, call.arguments["weight"].detach().requires_grad_())
        result = call.run(input=self._noted(point, call.arguments["input"]), weight=leaf)
        output = self.points.get(output_key(call.name, call.number))
        return self._noted(output, output.fused(result)) if isinstance(output, Output) else result

    def _sum(self, added: ActivationSum) -> Tensor:
        """Add copies that gradients reach."""
        places = [self.points.get(key) for key in added.keys]
        pairs = zip(places, added.operands, strict=True)
        return added.run(*(self._noted(place, value) if isinstance(place, Operand) else value for place, value in pairs))

    def _noted(self, place: Place, value: Tensor) -> Tensor:
        """A copy that gradients reach; what the network changes in place later is another tensor."""
        value = value.clone()
        if not value.requires_grad:
            value.requires_grad_()
        self.inputs.append((place, value))
        return value

    def _add(self, place: Place, value: Tensor, gradient: Tensor) -> None:
        """Add what one place shows."""
        axes = place.axes
        if not axes:  # all of it is one channel
            axes, value, gradient = (-1,), value[..., None], gradient[..., None]
        if not value.numel():
            raise EqualizeError(
                f"what {place.name} reads is empty on calibration batch {self.number}: leave out batches without rows, and "
                "keep layers without channels in float: Scheme(..., in_float=[name])."
            )
        lows, highs = _by_sample(value, axes)
        channels = math.prod(value.shape[axis] for axis in axes)
        value, gradient = (part.movedim(axes, tuple(range(len(axes)))).reshape(channels, -1) for part in (value, gradient))
        low, high = value.amin(1), value.amax(1)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise EqualizeError(f"what {place.name} reads has NaN or inf on calibration batch {self.number}.")
        matters = _sensitivity(value, gradient, (low, high) if place.scheme.activation_bits is not None else ())
        low, high = low.double().clamp(max=0).cpu(), high.double().clamp(min=0).cpu()
        new = ActivationStatistics(low, high, (low, high), _top(lows, False), _top(highs, True), *matters)
        seen = self.found.activations.setdefault(place.key, new)
        if seen.low.shape != low.shape:
            raise EqualizeError(
                f"{place.name} has {len(low)} channels on calibration batch {self.number}, and {len(seen.low)} before: give "
                "batches of the same sizes, or leave sums=True out of the scheme."
            )
        if seen is not new:
            seen.add_(new, is_in_half=self.found.passes % 2 == 0)


def _sensitivity(value: Tensor, gradient: Tensor, shared_values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`ActivationStatistics.sensitivity` and `coherent` of one pass.

    Args:
        value: of shape (channels, entries).
        gradient: likewise.
        shared_values: of each channel, which many of its entries may have.
    """
    coherent = torch.zeros(len(value), dtype=torch.float64)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    alone = gradient.masked_fill(value == 0, 0.0)  # zero is rounded to itself
    for bound in shared_values:
        same = value == bound[:, None]
        shared = (same.sum(1) > MASS * same.shape[1]) & (bound != 0)
        if bool(shared.any()):
            same &= shared[:, None]
            coherent += (alone * same).sum(1).double().square().cpu()
            alone = alone.masked_fill(same, 0.0)
    return coherent + alone.square().sum(1).double().cpu(), coherent


def _by_sample(value: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Least and largest entry of each channel of each sample, at most and at least 0; samples are along the first axis."""
    parts = value.movedim(axes, tuple(range(-len(axes), 0)))
    samples, channels = len(parts) if parts.dim() > len(axes) else 1, math.prod(parts.shape[-len(axes) :])
    parts = parts.reshape(samples, -1, channels)
    return parts.amin(1).double().clamp(max=0).cpu(), parts.amax(1).double().clamp(min=0).cpu()


def _top(values: Tensor, largest: bool) -> Tensor:
    """The most extreme of each column."""
    return values.topk(min(TAIL + 1, len(values)), dim=0, largest=largest).values
