"""The recursion of weight decay inside averages of degree 1: part ← keep · part + add · weight, for many at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equinorm import native
from equinorm._memory import is_dense, local
from equinorm.training.torch_compile import compiled


def follow(sums: Sequence[tuple[Tensor, Tensor, float, float]]) -> None:
    """part ← keep · part + add · weight, in place."""
    alike: dict[tuple[float, float], tuple[list[Tensor], list[Tensor]]] = {}
    for part, weight, keep, add in sums:
        for known, tensor in zip(alike.setdefault((keep, add), ([], [])), (part, weight), strict=True):
            known.append(local(tensor))
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

    def __call__(self, sums: Sequence[tuple[Tensor, Tensor, float, float]]) -> None:
        """Do it."""
        known = [_kernels(part, weight) for part, weight, *_ in sums]
        for found, (part, weight, keep, add) in zip(known, sums, strict=True):
            if found is not None:
                found.follow_(part, weight, keep, add)
        rest = [entry for found, entry in zip(known, sums, strict=True) if found is None]
        if rest and (not self._everywhere or all(part.device.type in native.DEVICES for part, *_ in rest)):
            follow(rest)
        elif rest:
            self._inner = self._inner or compiled(_follow_each)
            # numbers go in as a tensor, so that schedules do not compile again
            numbers = torch.tensor([[keep, add] for _, _, keep, add in rest], dtype=torch.float64)
            self._inner([part for part, *_ in rest], [weight for _, weight, *_ in rest], numbers)


def _follow_each(parts: list[Tensor], weights: list[Tensor], numbers: Tensor) -> None:
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        part.copy_(part * numbers[index, 0] + weight * numbers[index, 1])


def _kernels(part: Tensor, weight: Tensor) -> native.Kernels | None:
    """Compiled kernels that know these; None for others."""
    alike = part.dtype == weight.dtype and part.stride() == weight.stride()
    if part.device.type not in native.DEVICES or not alike or not is_dense(part):
        return None
    return native.kernels_for(part.dtype, torch.promote_types(part.dtype, torch.float32))
