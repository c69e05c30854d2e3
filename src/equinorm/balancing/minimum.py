"""The minimum of one problem, from weights to log-scales."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm.balancing.assemble import problem_of
from equinorm.balancing.layout import NetworkLayout
from equinorm.balancing.options import BalanceOptions
from equinorm.balancing.sharded import shared_problem
from equinorm.balancing.solver import Progress, Solution, solve
from equinorm.sharding.processes import Processes


@dataclass(frozen=True, slots=True, eq=False)
class Minimum:
    """Where the solver stopped, and the energies there.

    Attributes:
        solution: of the solver.
        before: logarithm of each tensor's energy as it is, by tensor index.
        after: the same at the solution.
    """

    solution: Solution
    before: Mapping[int, float]
    after: Mapping[int, float]


def minimum(
    network: NetworkLayout,
    tensors: Mapping[str, Tensor],
    options: BalanceOptions,
    progress: Progress | None = None,
    devices: Iterable[str] = ("cpu",),
    processes: Processes | None = None,
) -> Minimum:
    """Read the weights and solve.

    Args:
        network: of the tensors whose norm counts.
        tensors: by name; each is asked for once.
        options: of the balance.
        progress: called after every cycle.
        devices: kinds of devices that the tensors are on.
        processes: that hold parts of the tensors, if there are several.

    Raises:
        BalanceError: if a weight is on the meta device or not finite.
    """
    start = torch.zeros(network.num_free + 1, dtype=torch.float64)
    with _full_precision(devices):
        if processes is None:
            problem = problem_of(network, tensors, options)
        else:
            problem = shared_problem(network, tensors, options, processes)
        before = problem.log_energies(start)
        solution = solve(problem, options, progress)
        if solution.problem is not problem:  # edges of dead channels are not part of the norms
            before = solution.problem.log_energies(start)
        return Minimum(solution, before, solution.problem.log_energies(solution.z))


@contextlib.contextmanager
def _full_precision(devices: Iterable[str]) -> Iterator[None]:
    """Without autocast, which would sum in half precision."""
    with contextlib.ExitStack() as stack:
        for device in devices:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
