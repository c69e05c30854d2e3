"""Rescaling recorded once: all scales of all tensors come from one gather, and are multiplied in by foreach kernels."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from equinorm._rescale import LN2, unit_of_powers_of_two
from equinorm._scaling import Scaling


class Mover:
    """Multiplies tensors by powers of their scales, in place.

    Args:
        scalings: how they move; tensors refer to them by index.
        device: of the tensors.
        dtype: of the scales.
        power_of_two: round every scale to a power of two.
    """

    def __init__(self, scalings: Sequence[Scaling], device: torch.device, dtype: torch.dtype, power_of_two: bool) -> None:
        factors = [factor for scaling in scalings for factor in scaling.factors]
        self._ids = torch.cat([ids.flatten() for _, ids in factors]).to(device)
        exponents = torch.cat([torch.full((ids.numel(),), exponent, dtype=torch.float64) for exponent, ids in factors])
        self._exponents = exponents.to(device, dtype)
        self._unit = unit_of_powers_of_two(scalings) if power_of_two else None
        self._places: list[list[tuple[slice, torch.Size]]] = []
        first = 0
        for scaling in scalings:
            places: list[tuple[slice, torch.Size]] = []
            for _, ids in scaling.factors:
                places.append((slice(first, first + ids.numel()), ids.shape))
                first += ids.numel()
            self._places.append(places)
        self._logs = torch.zeros_like(self._exponents)
        self._scales: dict[int, Tensor] = {}
        self._views: dict[int, list[list[Tensor]]] = {}
        self._current: set[int] = set()

    def aim(self, z: Tensor) -> None:
        """Take the log-scales of classes 0..num_free."""
        if self._unit is not None:
            z = torch.round(z / self._unit) * self._unit
        torch.mul(z[self._ids], self._exponents, out=self._logs)
        self._current.clear()

    def scales(self, exponent: int) -> list[list[Tensor]]:
        """Scales to this power: for each scaling its factors, which broadcast to the tensor."""
        if exponent not in self._views:
            buffer = self._scales[exponent] = torch.empty_like(self._logs)
            self._views[exponent] = [[buffer[place].view(shape) for place, shape in places] for places in self._places]
        if exponent not in self._current:
            logs = self._logs * exponent
            if self._unit is None:
                torch.exp(logs, out=self._scales[exponent])
            else:
                torch.ldexp(torch.ones_like(logs), torch.round(logs / LN2), out=self._scales[exponent])
            self._current.add(exponent)
        return self._views[exponent]

    def multiply_(self, tensors: Iterable[tuple[int, Tensor]], exponent: int) -> None:
        """tensor ← tensor · s^exponent for pairs of a scaling's index and a tensor."""
        if exponent == 0:
            return
        views = self.scales(exponent)
        rounds: list[tuple[list[Tensor], list[Tensor]]] = []
        for index, tensor in tensors:
            for number, view in enumerate(views[index]):
                if number == len(rounds):
                    rounds.append(([], []))
                rounds[number][0].append(tensor)
                rounds[number][1].append(view)
        for moved, by in rounds:
            torch._foreach_mul_(moved, by)  # pyright: ignore[reportPrivateImportUsage]

    def shift_(self, index: int, tensor: Tensor, offset: float) -> None:
        """tensor ← (tensor + offset) · s − offset."""
        for view in self.scales(1)[index]:
            tensor.mul_(view).add_((view - 1) * offset)
