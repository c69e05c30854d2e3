"""Steps of biases where the asymmetry c is not 1.

With c > 1 early layers shrink and late ones grow. On a chain of q layers the activations behind layer k carry the scale

    D_k = c^{k(k−q)/2},        about c^{−q²/8} in the middle (c = 1.2: 1/16 for q = 11, 1/720 for q = 17).

A weight's gradient is an activation times a backpropagated error, and scales by D · 1/D. A bias's gradient is the error alone,
1/D, and since the bias itself has scale D, its step counts like D^{−2}: in deep networks gradient descent on biases diverges,
however they are rescaled. Hence each step of a bias is multiplied by D^{1−u}, where updates of the optimizer scale by s^u
(−1 for SGD, 0 where gradients are divided by their size): biases learn as fast as they would at c = 1.

D is that of networks at their minimum whose blocks carry equal energy. That is exact on chains; near the start of a training,
before the weights have moved there, steps are shorter than needed. Weight decay is part of a step and shortened with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, optim

from equinorm._errors import RescaleError
from equinorm._scaling import Scaling
from equinorm.balancing.families import FamilyStructure, minimise_families
from equinorm.balancing.layout import NetworkLayout
from equinorm.balancing.norm import Norm
from equinorm.rescaling.optimizer_laws import remembers, update_exponent


def drift(network: NetworkLayout, norm: Norm, c: float) -> Tensor:
    """Log-scale of each class 0..num_free that the asymmetry alone gives to a network whose blocks all have energy 1."""
    exponents = FamilyStructure([part.sides for _, part in network.moving], len(network.families), norm).exponents
    depth = torch.tensor([network.layouts[index].scaling.depth for index, _ in network.moving], dtype=torch.float64)
    exponents, depth = exponents[exponents.any(1)], depth[exponents.any(1)]
    scales = torch.zeros(network.num_free + 1, dtype=torch.float64)
    if len(depth):
        even = minimise_families(torch.zeros_like(depth), exponents)
        uneven = minimise_families(-norm.q * float(torch.tensor(c, dtype=torch.float64).log()) * depth, exponents)
        for (first, last), shift in zip(network.families, (uneven - even).tolist(), strict=True):
            scales[first:last] = shift
    return scales


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """A bias, how it scales, and the optimizer that steps it."""

    scaling: Scaling
    tensor: Tensor
    optimizer: optim.Optimizer


class BiasSteps:
    """Shortens or lengthens the steps of biases.

    Args:
        biases: that are stepped.
        network: the layouts of the tensors whose norm counts.
        norm: whose minimum is followed.
        held: mask over 0..num_free of classes that do not move, whose biases take plain steps.
    """

    def __init__(self, biases: Sequence[Bias], network: NetworkLayout, norm: Norm, held: Tensor) -> None:
        self._biases, self._network, self._norm, self._held = biases, network, norm, held
        self._factors: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by optimizer
        self._before: dict[int, list[Tensor]] = {}

    def weigh(self, c: float) -> None:
        """Set the asymmetry.

        Raises:
            RescaleError: if an optimizer remembers its steps, so that they must stay as they were.
        """
        factors: dict[int, list[tuple[Tensor, Tensor]]] = {}
        biases = [bias for bias in self._biases if update_exponent(bias.optimizer) != 1] if c != 1 else []
        scales = drift(self._network, self._norm, c).masked_fill(self._held, 0.0) if biases else torch.zeros(1)
        for bias in biases:
            if remembers(bias.optimizer):
                kind = type(bias.optimizer).__name__
                raise RescaleError(
                    f"{kind} keeps points of its path, so that the steps of biases cannot be made shorter for c = {c:g}: "
                    "let them take plain steps, ENorm(..., symmetric_biases=False), or keep c = 1."
                )
            log = bias.scaling.log_scales(scales[1:])
            factor = torch.exp((1 - update_exponent(bias.optimizer)) * log).to(bias.tensor.device, bias.tensor.dtype)
            factors.setdefault(id(bias.optimizer), []).append((bias.tensor, factor))
        self._factors = factors

    @torch.no_grad()
    def before_step(self, optimizer: optim.Optimizer) -> None:
        """Remember the biases that it is about to change."""
        if self._factors:
            self._before[id(optimizer)] = [bias.detach().clone() for bias, _ in self._factors.get(id(optimizer), ())]

    @torch.no_grad()
    def after_step(self, optimizer: optim.Optimizer) -> None:
        """b ← b₀ + D^{1−u} (b − b₀)."""
        starts = self._before.pop(id(optimizer), [])
        for (bias, factor), before in zip(self._factors.get(id(optimizer), ()), starts, strict=False):
            bias.copy_(before + factor.to(bias.device) * (bias - before))  # it may have moved since
