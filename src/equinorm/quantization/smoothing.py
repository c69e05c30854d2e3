"""Smooth: SmoothQuant's rule on every activation that can scale, as one least-squares problem that keeps all ties."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._arguments import is_number
from equinorm._errors import EqualizeError, describe
from equinorm._symmetries import Symmetries
from equinorm.grouping.groups import ScaleGroups
from equinorm.modules.choosing import tensors_of
from equinorm.modules.running import on_cpu, undisturbed
from equinorm.quantization.batches import Batch, calibration_batches, watched
from equinorm.quantization.calls import CallWatch, LayerCall

WeightAxis = tuple[str, int]
"""A weight and its in-axis."""


@on_cpu()
def smooth(symmetries: Symmetries, calibration: Iterable[Any], alpha: float = 0.5, reduce: str = "geometric mean") -> Tensor:
    """The valid log-scales nearest to what SmoothQuant asks for, on every activation that can scale and a linear map reads.

    Minimises over log-scales z of the network

        Σ_j (α · log a_j(z) − (1 − α) · log w_j(z))²,

    where j runs over the channels of these activations, a_j is the largest magnitude that a channel has on the data and w_j the
    largest of all weights that read it; a scale of the activation raises log a_j and lowers log w_j. Where a channel has a
    scale of its own, the activation is divided by a_j^α / w_j^(1 − α), as SmoothQuant has it; channels that must share one
    (queries of a group that read the same values, normalizations with several readers) get the geometric mean. α = 0 makes all
    weights equally large, and 1 all activations.

    It is a rule for one pair of ranges, and knows nothing of bits. `equinorm.equalize` minimises what rounding costs instead.

    Args:
        symmetries: of the model, whose weights are read and not changed.
        calibration: batches of inputs, each a tuple (or a tensor, or a dict of keyword inputs).
        alpha: from 0 to 1.
        reduce: for channels that share one scale, as in `Symmetries.scales`.

    Returns:
        Free log-scales of shape (num_free,), float64, for `Symmetries.rescale_`; 0 for what no linear map reads by itself, as
        queries and keys, packed experts' second matrices, and for channels that are zero throughout.

    Raises:
        EqualizeError: if alpha is out of range, the model does not run, or no linear map reads an activation that can scale.

    Source: Xiao et al., SmoothQuant, ICML 2023, equation 4.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 4)).requires_grad_(False)
    >>> net[0].weight[1] = 100.0
    >>> x = torch.randn(64, 3)
    >>> symmetries = equinorm.symmetries(net, (x,))
    >>> symmetries.rescale_(equinorm.quantization.smooth(symmetries, [x], alpha=1.0))
    >>> torch.allclose(net[0](x).abs().amax(0), torch.ones(3))
    True
    """
    if not (is_number(alpha) and 0 <= alpha <= 1):
        raise EqualizeError(f"alpha must be a number from 0 to 1, not {alpha!r}.")
    model = symmetries.model
    largest = _largest(model, calibration_batches(calibration, model, (), None))
    tensors = tensors_of(model)
    wishes: dict[Any, Tensor] = {}
    for axes in _readers(symmetries.groups()):
        seen = [largest[name] for name, axis in axes if name in largest and len(largest[name]) == tensors[name].size(axis)]
        if not seen:
            continue
        weights = torch.stack([_magnitudes(tensors[name], axis) for name, axis in axes]).amax(0)
        activations = torch.stack(seen).amax(0)
        wish = activations.log() * alpha - weights.log() * (1 - alpha)
        wishes[axes[0]] = torch.where((activations > 0) & (weights > 0), wish, 0.0).exp()
    if not wishes:
        raise EqualizeError(f"no linear map of {describe(model)} reads an activation that can scale: print its groups().")
    return symmetries.scales(wishes, reduce)


def _readers(groups: ScaleGroups) -> list[tuple[WeightAxis, ...]]:
    """In-axes that move alike, and so read the same channels."""
    moves: dict[WeightAxis, list[Any]] = {}
    for number, group in enumerate(groups):
        for axis in group.down if not group.is_pinned else ():
            if len(axis.axes) == 1:
                found = number, axis.channels.numpy().tobytes(), axis.exponents.flatten().numpy().tobytes()
                moves.setdefault((axis.tensor, axis.axes[0]), []).append(found)
    alike: dict[tuple, list[WeightAxis]] = {}
    for place, found in moves.items():
        alike.setdefault(tuple(found), []).append(place)
    return [tuple(places) for places in alike.values()]


def _magnitudes(weight: Tensor, axis: int) -> Tensor:
    """The largest of each channel."""
    return weight.detach().abs().movedim(axis, 0).flatten(1).amax(1).to("cpu", torch.float64)


def _largest(model: nn.Module, batches: list[Batch]) -> Mapping[str, Tensor]:
    """The largest magnitude of each channel that a weight reads, by the name of the weight."""
    found: dict[str, Tensor] = {}

    def note(call: LayerCall) -> Tensor:
        read = call.arguments["input"].detach().abs().movedim(call.axis, 0).flatten(1)
        if read.size(1):
            seen = read.amax(1).to("cpu", torch.float64)
            if not bool(seen.isfinite().all()):
                raise EqualizeError(f"what {call.name} reads is NaN or inf on the calibration data.")
            found[call.name] = torch.maximum(found[call.name], seen) if call.name in found else seen
        return call.run()

    for number, batch in enumerate(batches):
        with undisturbed(model), torch.no_grad():
            watched(model, batch, number, CallWatch(model, note))
    return found
