"""How each tensor of a model scales with the free log-scales: what solving and rescaling need to know of a network."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm._errors import RescaleError

HALVES = (torch.float16, torch.bfloat16)
"""Dtypes that round scales other than powers of two away."""

IN_HALF = "half precision cannot store w where 1 + w scales"
"""Why gains written 1 + w stay in these dtypes."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a class is pinned: an operation and the user's source line.

    Attributes:
        operation: what did it, e.g. ``"aten.gelu"`` or ``"model output"``.
        detail: the law that was broken, as a sentence fragment.
        source: ``"file.py:12"`` of the user's innermost frame, or empty.
        code: the text of that line, or empty.
        module: dotted path of the innermost module, or empty.
    """

    operation: str
    detail: str = ""
    source: str = ""
    code: str = ""
    module: str = ""

    @property
    def name(self) -> str:
        """The operation and the law."""
        return self.operation + (f" ({self.detail})" if self.detail else "")

    def __str__(self) -> str:
        place = " in ".join(part for part in (self.source, self.module) if part)
        return f"{self.name} at {place}" if place else self.name


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """One tensor w ↦ (w + offset) · exp(log_scales(z)) − offset.

    Attributes:
        names: dotted names in the model, several if tied.
        shape: of the tensor.
        dtype: of the tensor.
        kind: "parameter" or "buffer".
        role: "weight", or "bias" if the network adds it to an activation.
        depth: number of weights on the longest path from an input up to and with this one.
        factors: exponent and ids, one pair for each factor; ids broadcast to `shape`. Ids count from 1: 0 is pinned, and j
            scales with the free log-scale z[j − 1] of a vector z of shape (num_free,), such as `Balance.log_scales`.
        offset: number that the network adds before it uses the tensor (1 for gains written 1 + w), otherwise 0.
        is_squared: does the network take norms of it, as weight normalization does?

    An example: two hidden channels have free log-scales z[0] and z[1]. The first layer's weight, of shape (out, in), scales
    with them row by row, its bias entry by entry, and the second layer's weight inversely, column by column. The last bias
    is pinned: it has no factors.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4))
    >>> for scaling in equinorm.symmetries(net, (torch.randn(5, 3),)).scalings:
    ...     print(scaling.name, scaling.shape, [(exponent, ids.tolist()) for exponent, ids in scaling.factors])
    0.weight (2, 3) [(1.0, [[1], [2]])]
    0.bias (2,) [(1.0, [1, 2])]
    2.weight (4, 2) [(-1.0, [[1, 2]])]
    2.bias (4,) []

    For z = (log 10, 0) the first row of 0.weight becomes 10 times as large, the first column of 2.weight a tenth as large, and
    the network computes what it did.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    role: str
    depth: int
    factors: tuple[tuple[float, Tensor], ...]
    offset: float = 0.0
    is_squared: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def numel(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)

    @property
    def moving_share(self) -> float:
        """Share of its entries that scale."""
        groups: list[tuple[set[int], Tensor]] = []  # axes, and where nothing scales along them: masks of other axes multiply
        for _, ids in self.factors:
            axes, still = {axis for axis, size in enumerate(ids.shape) if size > 1}, ids == 0
            for other, mask in [group for group in groups if group[0] & axes]:
                axes, still = axes | other, still & mask
            groups = [group for group in groups if not group[0] & axes] + [(axes, still)]
        return 1.0 - math.prod(float(still.double().mean()) for _, still in groups)

    def log_scales(self, z: Tensor) -> Tensor:
        """Log-scale of every entry, Σ_f exponent_f · z[ids_f − 1], 0 where it is pinned; float64, broadcasts to `shape`.

        Args:
            z: free log-scales of shape (num_free,). Gradients pass.

        Raises:
            RescaleError: if z has another shape.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4))
        >>> symmetries = equinorm.symmetries(net, (torch.randn(1, 8),))
        >>> symmetries.scalings[2].name, symmetries.scalings[2].log_scales(torch.tensor([0.5, 2.0]))
        ('2.weight', tensor([[-0.5000, -2.0000]], dtype=torch.float64))
        """
        return sum(self.log_factors(z), start=torch.zeros((), dtype=torch.float64))

    def log_factors(self, z: Tensor) -> list[Tensor]:
        """The summands of `log_scales`, one for each factor."""
        z = torch.as_tensor(z).to("cpu", torch.float64)
        highest = max((int(ids.max()) for _, ids in self.factors if ids.numel()), default=0)
        if z.dim() != 1 or len(z) < highest:
            needed = f"(num_free,), at least {highest}"
            raise RescaleError(f"the log-scales of {self.name} need free log-scales of shape {needed}, not {tuple(z.shape)}.")
        if not len(z):
            return []
        return [torch.where(ids > 0, exponent * z[(ids - 1).clamp(min=0)], 0.0) for exponent, ids in self.factors]

    def effective(self, tensor: Tensor) -> Tensor:
        """What scales: the tensor plus the offset, without gradient."""
        return tensor.detach() + self.offset if self.offset else tensor.detach()

    def free(self) -> Tensor:
        """Sorted ids of the free classes that scale this tensor."""
        ids = torch.cat([torch.unique(ids) for _, ids in self.factors]) if self.factors else torch.zeros(0, dtype=torch.long)
        ids = torch.unique(ids)
        return ids[ids > 0]


@dataclass(frozen=True, slots=True)
class Family:
    """Channels of one axis: the classes that one operation introduced.

    Attributes:
        tensor: name of the first tensor that scales with them.
        axis: the axis of that tensor.
        ids: the free classes, among 1..num_free; those of a family follow one another.
    """

    tensor: str
    axis: int
    ids: range


@dataclass(frozen=True, slots=True)
class Pin:
    """Channels that cannot scale, and why.

    Attributes:
        tensor: name of the first tensor that would have scaled with them.
        axis: the axis of that tensor.
        channels: how many.
        reason: what pins them.
    """

    tensor: str
    axis: int
    channels: int
    reason: Reason


def by_operation(pins: Iterable[Pin]) -> list[tuple[str, int, list[Pin]]]:
    """Each operation that pins: its name and law, how many channels, and its pins; most channels first."""
    found: dict[str, list[Pin]] = {}
    for pin in pins:
        found.setdefault(pin.reason.name, []).append(pin)
    rows = [(name, sum(pin.channels for pin in here), here) for name, here in found.items()]
    return sorted(rows, key=lambda row: -row[1])


@dataclass(frozen=True, slots=True, eq=False)
class Cast:
    """A value that scales and that the network rounds to fewer bits than the weights of its classes have.

    round(s·x) = s·round(x) for powers of two s (under- and overflow aside), and for hardly any other s.

    Attributes:
        dtype: what the value is rounded to.
        reason: the operation that does, with the user's source line.
        factors: how the value scales, as those of a `Scaling`.
        tensor: name of the model's tensor that is cast as it is, or empty.
        by_autocast: is it not the network that asks for fewer bits, but autocast, in its forward or around?
    """

    dtype: torch.dtype
    reason: Reason
    factors: tuple[tuple[float, Tensor], ...]
    tensor: str = ""
    by_autocast: bool = False

    def free(self) -> Tensor:
        """Sorted ids of the free classes that scale the value."""
        ids = torch.unique(torch.cat([torch.zeros(1, dtype=torch.long), *(ids.flatten() for _, ids in self.factors)]))
        return ids[ids > 0]
