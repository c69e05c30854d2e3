"""Sums over the processes that hold a network's shards; every process gets the same bits."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import EquinormError, RescaleError
from equinorm._memory import is_sharded


class Processes:
    """The processes of a device mesh.

    Collectives run along one axis of the mesh after the other, in groups that PyTorch made with it.

    Args:
        mesh: a `torch.distributed.device_mesh.DeviceMesh`.
    """

    def __init__(self, mesh: Any) -> None:
        self._groups = [group for group in mesh.get_all_groups() if group.size() > 1]
        self._device = torch.device(mesh.device_type)
        self._ranks = mesh.mesh.flatten().tolist()
        self.is_first = torch.distributed.get_rank() == self._ranks[0]

    def counts(self, tensor: Tensor) -> bool:
        """Is this the first of the processes that hold the same part of a tensor, so that it is counted once?"""
        if not is_sharded(tensor):
            return self.is_first
        held: Any = tensor
        mesh = held.device_mesh
        places = zip(held.placements, mesh.get_coordinate(), strict=True)
        return self._ranks[0] in mesh.mesh.flatten().tolist() and all(place == 0 or not p.is_replicate() for p, place in places)

    def sum(self, values: Tensor) -> Tensor:
        """Summed over all processes."""
        return self._reduced(values, torch.distributed.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all processes, entry by entry."""
        return self._reduced(values, torch.distributed.ReduceOp.MAX)

    def nearest_to_zero(self, values: Tensor) -> Tensor:
        """Of the values of all processes those nearest to zero, entry by entry."""
        low, high = self._reduced(torch.cat([values, -values]), torch.distributed.ReduceOp.MIN).split(len(values))
        return torch.where(low.abs() <= high.abs(), low, -high)

    def of_the_first(self, values: Tensor) -> Tensor:
        """The values of the first process."""
        moved = values.to(self._device, copy=True)
        for group in self._groups:
            torch.distributed.broadcast(moved, torch.distributed.get_global_rank(group, 0), group=group)
        return moved.to(values.device)

    @contextlib.contextmanager
    def agreeing(self, error: type[EquinormError] = RescaleError) -> Iterator[None]:
        """Raise in every process what one of them raises within; nobody is left waiting.

        Args:
            error: what the others raise.
        """
        raised: Exception | None = None
        try:
            yield
        except Exception as problem:
            raised = problem
        failed = self.largest(torch.tensor([-1 if raised is None else torch.distributed.get_rank()]))
        if int(failed) < 0:
            return
        if raised is not None:
            raise raised
        raise error(f"process {int(failed)} refused, and so do all others: its error says why. Nothing was written.")

    def _reduced(self, values: Tensor, kind: Any) -> Tensor:
        moved = values.to(self._device, copy=True)
        for group in self._groups:
            torch.distributed.all_reduce(moved, kind, group=group)
        return moved.to(values.device)


def processes_of(tensors: Mapping[str, Tensor]) -> Processes | None:
    """The processes that hold a network; None where this one holds all of it.

    Raises:
        RescaleError: if tensors lie on meshes of which none holds all.
    """
    meshes: list[tuple[str, Any]] = [(n, t.device_mesh) for n, t in tensors.items() if is_sharded(t)]  # pyright: ignore[reportAttributeAccessIssue]
    if not meshes:
        return None
    first, widest = max(meshes, key=lambda one: one[1].size())
    ranks = _ranks(widest)
    for name, mesh in meshes:
        if not _ranks(mesh) <= ranks:
            raise RescaleError(
                f"cannot rescale {name}: it is sharded over processes that hold nothing of {first}. All of a model must be "
                "sharded over one device mesh, or parts of it; pipeline stages are not supported."
            )
    return Processes(widest)


@contextlib.contextmanager
def agreeing(processes: Processes | None) -> Iterator[None]:
    """`Processes.agreeing`, where there are several."""
    with contextlib.nullcontext() if processes is None else processes.agreeing():
        yield


def _ranks(mesh: Any) -> set[int]:
    return set(mesh.mesh.flatten().tolist())
