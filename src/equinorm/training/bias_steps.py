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
from equinorm.balancing.families import minimise_families
from equinorm.balancing.layout import Layout
from equinorm.balancing.problem import GROUND


def drift(layouts: Sequence[Layout], families: Sequence[tuple[int, int]], q: float, c: float) -> Tensor:
    """Log-scale of each class 0..num_free that the asymmetry alone gives to a network whose blocks all have energy 1."""
    rows: list[Tensor] = []
    depths: list[int] = []
    for layout in layouts:
        for part in layout.parts:
            row = torch.zeros(len(families), dtype=torch.float64)
            for side in part.sides:
                if side.family != GROUND:
                    row[side.family] += q * side.exponent
            if bool(row.any()):
                rows.append(row)
                depths.append(layout.scaling.depth)
    scales = torch.zeros(max((last for _, last in families), default=1), dtype=torch.float64)
    if rows:
        exponents, depth = torch.stack(rows), torch.tensor(depths, dtype=torch.float64)
        even = minimise_families(torch.zeros(len(rows), dtype=torch.float64), exponents)
        uneven = minimise_families(-q * float(torch.tensor(c, dtype=torch.float64).log()) * depth, exponents)
        for (first, last), shift in zip(families, (uneven - even).tolist(), strict=True):
            scales[first:last] = shift
    return scales


class BiasSteps:
    """Shortens or lengthens the steps of biases.

    Args:
        biases: how they scale, and they themselves.
        layouts: of the tensors whose norm counts.
        families: first and last + 1 id of every family.
        p: the norm's exponent; 1 for p = ∞.
        power: exponent u of s in the optimizer's updates.
    """

    def __init__(
        self,
        biases: Sequence[tuple[Scaling, Tensor]],
        layouts: Sequence[Layout],
        families: Sequence[tuple[int, int]],
        p: float,
        power: int,
    ) -> None:
        self._biases, self._layouts, self._families, self._p, self._power = biases, layouts, families, p, power
        self._factors: list[Tensor] = []
        self._before: list[Tensor] = []

    def weigh(self, c: float) -> None:
        """Set the asymmetry."""
        self._factors = []
        if c == 1 or not self._biases:
            return
        scales = drift(self._layouts, self._families, self._p, c)
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
