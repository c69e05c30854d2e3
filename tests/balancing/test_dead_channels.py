"""Which channels are dead, against a linear program: those whose scales can go anywhere while no energy grows."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import null_space
from scipy.optimize import linprog
from torch import Tensor, nn

import equinorm
from equinorm.balancing.blocks import Block
from equinorm.balancing.norm import Norm
from equinorm.balancing.problem import Problem
from equinorm.balancing.sides import Side
from equinorm.balancing.sweeps import System

F = nn.functional
INPUTS = torch.ones(1, 2)


def layer(into: int, out: int) -> nn.Linear:
    return nn.Linear(into, out, bias=False)


class Tied(nn.Module):
    """A layer without bias and its own transpose."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.tied, self.last = layer(2, 4), layer(4, 5), layer(4, 3)
        self.between = between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.tied(self.first(x).relu()).relu())
        return self.last(F.linear(h, self.tied.weight.T).relu())


class Again(nn.Module):
    """A layer that is applied twice, the second time to what other layers made of its result, or to its square."""

    def __init__(self, middle: Callable[[], nn.Module], power: int = 1) -> None:
        super().__init__()
        self.first, self.again, self.middle, self.last = layer(2, 4), layer(4, 4), middle(), layer(4, 3)
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(self.first(x).relu()).relu() ** self.power
        return self.last(self.again(self.middle(h)).relu())


class Added(nn.Module):
    """A layer that is applied twice, to two channels that are added up: one scale for all of its rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.mixed, self.last = layer(2, 4), layer(4, 4), nn.Conv1d(2, 1, 1, bias=False), layer(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x.flip(-1)], 1)
        h = self.again(self.again(self.first(x).relu()).relu()).relu()
        return self.last(self.mixed(h)[:, 0])


NETWORKS = {
    "a layer and its transpose": Tied,
    "a layer and its transpose, others between": lambda: Tied(nn.Sequential(layer(5, 5), nn.ReLU())),
    "a layer twice in a row": lambda: Again(nn.Identity),
    "a layer twice, another between": lambda: Again(lambda: nn.Sequential(layer(4, 4), nn.ReLU())),
    "squares": lambda: Again(nn.Identity, power=2),
    "cubes": lambda: Again(lambda: nn.Sequential(layer(4, 4), nn.ReLU()), power=3),
    "channels that are added up": Added,
    "a chain": lambda: nn.Sequential(layer(2, 4), nn.ReLU(), layer(4, 4), nn.ReLU(), layer(4, 4), nn.ReLU(), layer(4, 3)),
}


def by_program(symmetries: equinorm.Symmetries) -> tuple[set[int], set[int]]:
    """Classes that run away, and those that no energy holds.

    Along some z that lets no energy grow, Σ a z ≤ 0 for the exponents a of each, every energy of the former falls. The latter
    can move while no energy changes, too: as around a circle that no input reaches, where the balance says something all the
    same, and may stay out.
    """
    weights, rows = dict(symmetries.model.named_parameters()), set()
    for scaling in symmetries.scalings:
        exponents = np.zeros((scaling.numel, symmetries.num_free + 1))
        for exponent, ids in scaling.factors:
            exponents[np.arange(scaling.numel), ids.expand(scaling.shape).flatten().numpy()] += exponent
        rows |= {tuple(row) for row in exponents[weights[scaling.name].detach().flatten().numpy() != 0, 1:] if row.any()}
    energies = np.array(sorted(rows)).reshape(-1, symmetries.num_free)
    count = len(energies)
    found = linprog(  # as many energies as possible fall by 1
        np.concatenate([np.zeros(symmetries.num_free), -np.ones(count)]),
        np.hstack([energies, np.eye(count)]),
        np.zeros(count),
        bounds=[(-1e4, 1e4)] * symmetries.num_free + [(0, 1)] * count,
    )
    stay = energies[found.x[symmetries.num_free :] < 0.5]
    free = null_space(stay)
    ids = range(symmetries.num_free)
    return {id + 1 for id in ids if not stay[:, id].any()}, {id + 1 for id in ids if np.abs(free[id]).max(initial=0.0) > 1e-9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", NETWORKS)
def test_dead_channels_are_those_that_a_linear_program_lets_go(name, zeros, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        net = NETWORKS[name]().to(dtype)
        with torch.no_grad():
            for weight in net.parameters():
                weight[torch.rand(weight.shape) < zeros] = 0.0
        symmetries = equinorm.symmetries(net, INPUTS.to(dtype))
        balance = symmetries.balance()
        run_away, without_hold = by_program(symmetries)
        assert symmetries.num_free
        assert run_away <= {*balance.dead} <= without_hold, f"seed {seed}"
        assert not (without_hold and not zeros), f"seed {seed}"
        assert balance.converged or len(balance.dead) == symmetries.num_free


@pytest.mark.parametrize(("last", "dead"), [((2, -2.0), False), ((1, -1.0), False), (None, True)])
def test_what_others_make_room_for_adds_up(last, dead):
    """Energies z1, z2 − z1, z2 − z3, z1 + z3 − 2·z2: all fall together, unless one more energy holds one of them from below."""
    terms = [[(1, 1.0)], [(2, 1.0), (1, -1.0)], [(2, 1.0), (3, -1.0)], [(1, 1.0), (3, 1.0), (2, -2.0)]]
    terms += [[last]] if last else []
    blocks = tuple(
        Block(
            number,
            torch.ones(1, dtype=torch.float64),
            (torch.zeros(1, dtype=torch.float64),),
            tuple(Side(id - 1, torch.tensor([id]), exponent) for id, exponent in term),
        )
        for number, term in enumerate(terms)
    )
    problem = Problem(blocks, ((1, 2), (2, 3), (3, 4)), {}, 3, Norm(2.0))
    assert System(problem).dead(torch.zeros(4, dtype=torch.float64)).tolist() == [False, dead, dead, dead]
