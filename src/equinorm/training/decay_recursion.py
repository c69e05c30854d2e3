"""The recursion of weight decay inside averages: of degree 1, part ← keep · part + add · weight, for many at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equinorm import native
from equinorm._memory import is_dense, local
from equinorm.training.torch_compile import compiled

Parts = dict[int, Tensor]
"""Exponent of s → part of a state tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Entering:
    """Weight decay that enters an average in one step.

    Attributes:
        parts: of the average.
        parameter: whose it is.
        keep: of the old parts.
        add: of the weight.
        decay: the weight decay.
        is_ascent: does the optimizer maximize?
        is_plain: is it part ← keep · part + add · weight, and surely done?
    """

    parts: Parts
    parameter: Tensor
    keep: float
    add: float
    decay: float
    is_ascent: bool
    is_plain: bool

    @property
    def plain(self) -> "Following":
        """The recursion of an average of degree 1."""
        return Following(self.parts[1], self.parameter.detach(), self.keep, self.add)

    def enter_(self, optimizer: Any) -> None:
        """part ← keep · part + add · new, in place; as it was where a fused optimizer skips its step on the device."""
        assert self.parameter.grad is not None
        weight, gradient = local(self.parameter.detach()), local(self.parameter.grad)
        parts = {exponent: local(part) for exponent, part in self.parts.items()}
        skipped = getattr(optimizer, "found_inf", None)  # fused optimizers skip a step that is not finite
        before = {exponent: part.clone() for exponent, part in parts.items()} if isinstance(skipped, Tensor) else {}
        for part in parts.values():
            part.mul_(self.keep)
        if 1 in parts:
            parts[1].add_(weight, alpha=self.add)
        else:
            scale = getattr(optimizer, "grad_scale", None)  # and divide gradients inside of it
            gradient = gradient.to(weight.dtype) if scale is None else gradient.to(weight.dtype) / scale
            parts[0].addcmul_(weight, gradient, value=(-2 if self.is_ascent else 2) * self.add)
            parts[2].addcmul_(weight, weight, value=self.add * self.decay)
        for exponent, part in before.items():
            parts[exponent].copy_(torch.where(torch.as_tensor(skipped) > 0, part, parts[exponent]))


@dataclass(frozen=True, slots=True, eq=False)
class Following:
    """part ← keep · part + add · weight."""

    part: Tensor
    weight: Tensor
    keep: float
    add: float


def follow(sums: Sequence[Following]) -> None:
    """part ← keep · part + add · weight, in place."""
    alike: dict[tuple[float, float], tuple[list[Tensor], list[Tensor]]] = {}
    for one in sums:
        parts, weights = alike.setdefault((one.keep, one.add), ([], []))
        parts.append(local(one.part))
        weights.append(local(one.weight))
    for (keep, add), (parts, weights) in alike.items():
        torch._foreach_mul_(parts, keep)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(parts, weights, alpha=add)  # pyright: ignore[reportPrivateImportUsage]


class CompiledFollow:
    """The same in one pass.

    Args:
        everywhere: by torch.compile where the kernels do not run.
    """

    def __init__(self, everywhere: bool) -> None:
        self._everywhere, self._inner = everywhere, None

    def __call__(self, sums: Sequence[Following]) -> None:
        """part ← keep · part + add · weight, in place."""
        known = [_kernels(one.part, one.weight) for one in sums]
        for found, one in zip(known, sums, strict=True):
            if found is not None:
                found.follow_(one.part, one.weight, one.keep, one.add)
        rest = [one for found, one in zip(known, sums, strict=True) if found is None]
        if rest and (not self._everywhere or all(one.part.device.type in native.DEVICES for one in rest)):
            follow(rest)
        elif rest:
            self._inner = self._inner or compiled(_follow_each)
            # numbers go in as a tensor, so that schedules do not compile again
            numbers = torch.tensor([[one.keep, one.add] for one in rest], dtype=torch.float64)
            self._inner([one.part for one in rest], [one.weight for one in rest], numbers)


def _follow_each(parts: list[Tensor], weights: list[Tensor], numbers: Tensor) -> None:
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        part.copy_(part * numbers[index, 0] + weight * numbers[index, 1])


def _kernels(part: Tensor, weight: Tensor) -> native.Kernels | None:
    """Compiled kernels that know these; None for others."""
    alike = part.dtype == weight.dtype and part.stride() == weight.stride()
    if part.device.type not in native.DEVICES or not alike or not is_dense(part):
        return None
    return native.kernels_for(part.dtype, torch.promote_types(part.dtype, torch.float32))
