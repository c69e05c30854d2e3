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

import torch
from torch import Tensor

from equinorm._scaling import Scaling
from equinorm.balancing.families import FamilyStructure, minimise_families
from equinorm.balancing.layout import NetworkLayout
from equinorm.balancing.norm import Norm


def drift(network: NetworkLayout, norm: Norm, c: float) -> Tensor:
    """Log-scale of each class 0..num_free that the asymmetry alone gives to a network whose blocks all have energy 1."""
    exponents = FamilyStructure([part for _, part in network.moving], len(network.families), norm).exponents
    depth = torch.tensor([network.layouts[index].scaling.depth for index, _ in network.moving], dtype=torch.float64)
    exponents, depth = exponents[exponents.any(1)], depth[exponents.any(1)]
    scales = torch.zeros(network.num_free + 1, dtype=torch.float64)
    if len(depth):
        even = minimise_families(torch.zeros_like(depth), exponents)
        uneven = minimise_families(-norm.q * float(torch.tensor(c, dtype=torch.float64).log()) * depth, exponents)
        for (first, last), shift in zip(network.families, (uneven - even).tolist(), strict=True):
            scales[first:last] = shift
    return scales


class BiasSteps:
    """Shortens or lengthens the steps of biases.

    Args:
        biases: how they scale, and they themselves.
        network: the layouts of the tensors whose norm counts.
        norm: whose minimum is followed.
        power: exponent u of s in the optimizer's updates.
    """

    def __init__(self, biases: Sequence[tuple[Scaling, Tensor]], network: NetworkLayout, norm: Norm, power: int) -> None:
        self._biases, self._network, self._norm, self._power = biases, network, norm, power
        self._factors: list[Tensor] = []
        self._before: list[Tensor] = []

    def weigh(self, c: float) -> None:
        """Set the asymmetry."""
        self._factors = []
        if c == 1 or not self._biases:
            return
        scales = drift(self._network, self._norm, c)
        for scaling, bias in self._biases:
            log = scaling.log_scales(scales[1:])
            self._factors.append(torch.exp((1 - self._power) * log).to(bias.device, bias.dtype))

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember the biases."""
        if self._factors:
            self._before = [bias.detach().clone() for _, bias in self._biases]

    @torch.no_grad()
    def after_step(self) -> None:
        """b ← b₀ + D^{1−u} (b − b₀)."""
        for (_, bias), before, factor in zip(self._biases, self._before, self._factors, strict=False):
            bias.copy_(before + factor.to(bias.device) * (bias - before))  # it may have moved since
        self._before = []
