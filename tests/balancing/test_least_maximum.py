"""p = ∞ against linear programs: on random problems of every kind, on networks, and in as many passes as it may take."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, sparse
from torch import Tensor, nn

import equinorm
from equinorm import ENorm
from equinorm.balancing import active_set
from equinorm.balancing.active_set import Entries
from equinorm.balancing.blocks import Block
from equinorm.balancing.norm import Norm
from equinorm.balancing.options import BalanceOptions
from equinorm.balancing.policy_iteration import Differences
from equinorm.balancing.problem import Problem
from equinorm.balancing.sides import GROUND, Side
from equinorm.balancing.solver import Solution, solve

Program = tuple[list[Tensor], list[list[tuple[Tensor, float]]]]
"""log |w| of entries, and what moves them: ids and exponents, block by block."""


def linear_program(logs: list[Tensor], moves: list[list[tuple[Tensor, float]]], count: int) -> float:
    """min t with log |w_e| + Σ exponent · z[id] ≤ t for every entry that something moves."""
    rows, columns, values, bounds, first = [], [], [], [], 0
    for log, sides in zip(logs, moves, strict=True):
        log = log.flatten().double()
        for ids, exponent in sides:
            ids = ids.flatten()
            usable = ((ids > 0) & log.isfinite()).nonzero()[:, 0]
            rows.append(first + usable)
            columns.append(ids[usable] - 1)
            values.append(torch.full((len(usable),), exponent, dtype=torch.float64))
        bounds.append(-log)
        first += len(log)
    places = (torch.cat(rows).numpy(), torch.cat(columns).numpy())
    matrix = sparse.coo_matrix((torch.cat(values).numpy(), places), shape=(first, count)).tocsr()
    matrix.eliminate_zeros()
    moving = np.diff(matrix.indptr) > 0
    program = sparse.hstack([matrix[moving], -np.ones((int(moving.sum()), 1))]).tocsr()
    cost = np.append(np.zeros(count), 1.0)
    found = optimize.linprog(cost, A_ub=program, b_ub=torch.cat(bounds).numpy()[moving], bounds=(None, None), method="highs")
    assert found.status == 0, found.message
    return found.fun


class Draw:
    """A random problem, block by block."""

    def __init__(self, widths: list[int], seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        ends = np.cumsum([1, *widths])
        self.families = [(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        self.blocks: list[Block] = []
        self.logs: list[Tensor] = []
        self.moves: list[list[tuple[Tensor, float]]] = []

    def side(self, family: int, exponent: float, size: int = 4) -> Side:
        ids = torch.zeros(size, dtype=torch.long) if family == GROUND else torch.arange(*self.families[family])
        return Side(family, ids, exponent)

    def matrix(self, rows: Side, columns: Side, density: float = 1.0, scale: float = 1.0) -> None:
        shape = len(rows.ids), len(columns.ids)
        energies = torch.exp(scale * torch.randn(shape, generator=self.random, dtype=torch.float64))
        energies *= torch.rand(shape, generator=self.random) < density
        if rows.family == columns.family != GROUND:
            same = rows.ids[:, None] == columns.ids
            energies[same] = 0.0
        offsets = tuple(torch.randn(size, generator=self.random, dtype=torch.float64) for size in shape)
        self.blocks.append(Block(len(self.blocks), energies, offsets, (rows, columns)))
        self.logs.append((energies.log() + offsets[0][:, None] + offsets[1]).flatten())
        self.moves.append([(side.ids[:, None].expand(shape) if place == 0 else side.ids.expand(shape), side.exponent)
                           for place, side in enumerate((rows, columns))])  # fmt: skip

    def terms(self, kinds: list[tuple[int, float]], count: int) -> None:
        """Terms of which each picks a class of every family named; every class is picked by some term."""
        sides = []
        for family, exponent in kinds:
            first, last = (0, 1) if family == GROUND else self.families[family]
            ids = torch.randint(first, last, (count,), generator=self.random)
            ids[: last - first] = torch.arange(first, last)
            sides.append(Side(family, ids, exponent))
        same = [(one.ids == other.ids) & (one.ids > 0) for one, other in itertools.combinations(sides, 2)]
        energies = torch.exp(torch.randn(count, generator=self.random, dtype=torch.float64))
        energies[torch.stack([*same, torch.zeros(count, dtype=torch.bool)]).any(0)] = 0.0
        self.blocks.append(Block(len(self.blocks), energies, (torch.zeros(count, dtype=torch.float64),), tuple(sides)))
        self.logs.append(energies.log())
        self.moves.append([(side.ids, side.exponent) for side in sides])

    def solved(self) -> tuple[Solution, float]:
        """The solution, and the largest entry there."""
        problem = Problem(tuple(self.blocks), tuple(self.families), {}, self.families[-1][1] - 1, Norm(math.inf))
        solution = solve(problem, BalanceOptions(math.inf, tol=1e-9))
        for log, sides in zip(self.logs, self.moves, strict=True):  # entries of dead classes are left out
            log[torch.stack([solution.dead[ids].flatten() for ids, _ in sides]).any(0)] = -math.inf
        largest = max(
            float((log + sum(e * solution.z[ids].flatten() for ids, e in sides)).max())
            for log, sides in zip(self.logs, self.moves, strict=True)
        )
        return solution, largest

    def check(self) -> None:
        solution, largest = self.solved()
        least = linear_program(self.logs, self.moves, self.families[-1][1] - 1)
        assert largest == pytest.approx(least, abs=1e-8)
        assert solution.residuals[-1] <= 1e-9


@pytest.fixture
def passes(monkeypatch):
    """Counts what takes time: passes over all entries, and changes of the active set."""
    done: list[str] = []

    def count(kind: type, name: str) -> None:
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args: done.append(name) or method(*args))

    for kind, name in ((Entries, "moved"), (Differences, "best"), (active_set._Active, "join")):
        count(kind, name)
    return done


EXPONENTS = [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (0.5, 1.0), (1.0, 3.0), (3.0, 0.5)]


def chain(seed: int, density: float, mixed: bool) -> Draw:
    draw = Draw([9, 12, 7, 10], seed)
    pick = np.random.default_rng(seed)
    for front, back in [(GROUND, 0), (0, 1), (1, 2), (2, 3), (3, GROUND)]:
        up, down = EXPONENTS[pick.integers(len(EXPONENTS))] if mixed else (1.0, 1.0)
        draw.matrix(draw.side(back, up), draw.side(front, -down), density)
    return draw


def residual(seed: int, density: float, mixed: bool) -> Draw:
    """A stream that branches read and write; with `mixed`, through squares."""
    draw = Draw([10, 14, 8], seed)
    draw.matrix(draw.side(0, 1.0), draw.side(GROUND, -1.0))
    for inner in (1, 2):
        draw.matrix(draw.side(inner, 1.0), draw.side(0, -1.0), density)
        draw.matrix(draw.side(0, 1.0), draw.side(inner, -2.0 if mixed else -1.0), density)
    draw.matrix(draw.side(0, 1.0), draw.side(0, -2.0 if mixed else -1.0), density)
    draw.matrix(draw.side(GROUND, 1.0), draw.side(0, -1.0))
    return draw


def tied(seed: int, density: float, mixed: bool) -> Draw:
    """Weights used from both sides, and cycles that multiply exponents."""
    draw = Draw([8, 8], seed)
    draw.matrix(draw.side(0, 1.0), draw.side(GROUND, -1.0))
    draw.matrix(draw.side(0, 1.0), draw.side(1, 1.0 if mixed else -1.0), density)
    draw.matrix(draw.side(1, 1.0), draw.side(0, -3.0 if mixed else -1.0), density)
    draw.matrix(draw.side(1, 0.5 if mixed else 1.0), draw.side(1, -1.0), density)
    draw.matrix(draw.side(1, 1.0), draw.side(GROUND, -1.0))
    draw.matrix(draw.side(GROUND, 1.0), draw.side(0, -1.0))
    draw.matrix(draw.side(GROUND, 1.0), draw.side(1, -1.0))
    return draw


def products(seed: int, density: float, mixed: bool) -> Draw:
    """Gated units: the weight behind scales with the inverse of both."""
    draw = Draw([6, 15, 15], seed)
    draw.matrix(draw.side(0, 1.0), draw.side(GROUND, -1.0))
    for gate in (1, 2):
        draw.matrix(draw.side(gate, 2.0 if mixed else 1.0), draw.side(0, -1.0), density)
        draw.terms([(gate, 1.0), (GROUND, 1.0)], 15)
    draw.terms([(0, 1.0), (1, -1.0), (2, -0.5 if mixed else -1.0)], 90)
    for gate in (1, 2):
        draw.terms([(GROUND, 1.0), (gate, -1.0)], 15)
    draw.matrix(draw.side(GROUND, 1.0), draw.side(0, -1.0))
    draw.terms([(0, 1.0), (GROUND, 1.0)], 6)
    return draw


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("density", [1.0, 0.7])
@pytest.mark.parametrize("build", [chain, residual, tied, products])
@pytest.mark.parametrize("seed", range(6))
def test_least_maximum_of_random_problems(build, density, mixed, seed):
    build(seed, density, mixed).check()


def test_equal_entries():
    """Everything is in the way at once."""
    for build in (chain, residual, tied, products):
        draw = build(0, 1.0, True)
        for block, number in zip(draw.blocks, itertools.count()):
            block.energies[block.energies > 0] = 1.0
            for offset in block.offsets:
                offset.zero_()
            draw.logs[number] = block.energies.log().flatten()
        draw.check()


@pytest.mark.parametrize(("exponents", "limit"), [([1.0], 400), ([1.0, 2.0, 0.5, 3.0], 700)], ids=["unit", "mixed"])
def test_ten_thousand_classes_at_random(passes, exponents, limit):
    """Sparse edges between any two classes: families of 100, with every pair of exponents."""
    draw = Draw([100] * 100, 0)
    pick = np.random.default_rng(0)
    for one in range(100):
        for other in (*pick.integers(0, 100, 3).tolist(), GROUND):
            up, down = (float(pick.choice(exponents)) for _ in range(2))
            draw.terms([(one, up), (other, -down)], 150)
        draw.terms([(GROUND, 1.0), (one, -1.0)], 100)
    draw.check()
    assert len(passes) <= limit


@pytest.mark.parametrize(("depth", "limit"), [(20, 220), (500, 450)])
def test_ten_thousand_classes_in_layers(passes, depth, limit):
    width = 10_000 // depth
    draw = Draw([width] * depth, 0)
    draw.matrix(draw.side(0, 1.0), draw.side(GROUND, -1.0))
    for layer in range(1, depth):
        draw.terms([(layer, 1.0), (layer - 1, -1.0)], 5 * width)
    draw.matrix(draw.side(GROUND, 1.0), draw.side(depth - 1, -1.0))
    solution, _ = draw.solved()
    assert solution.residuals[-1] <= 1e-9
    assert len(passes) <= limit


# ------------------------------------------------------------------------------------------------------------- networks


class Activation(nn.Module):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) ** self.power


def multilayer(widths: list[int], power: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=False), Activation(power) if power != 1 else nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


class Recurrent(nn.Module):
    """h ← relu(W h + U x), three times."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        sizes = [(5, width), (width, width), (width, 3)]
        self.first, self.again, self.last = (nn.Linear(a, b, bias=False) for a, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        for _ in range(3):
            h = torch.relu(self.again(h) + self.first(x))
        return self.last(h)


def least_of(symmetries: equinorm.Symmetries) -> float:
    """The linear program of a network's weights, written out from its scalings."""
    logs, moves = [], []
    for scaling in symmetries.scalings:
        if scaling.factors and scaling.role == "weight" and scaling.kind == "parameter":
            logs.append(symmetries.tensors[scaling.name].detach().double().abs().log().flatten())
            moves.append([(ids.expand(scaling.shape).flatten(), exponent) for exponent, ids in scaling.factors])
    return linear_program(logs, moves, symmetries.num_free)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_relu(power, dtype):
    net = multilayer([5, 30, 20, 10, 3], power).to(dtype)
    symmetries = equinorm.symmetries(net, torch.randn(1, 5, dtype=dtype))
    balance = symmetries.balance(p=math.inf, tol=1e-9)
    assert balance.converged
    assert math.log(balance.norm_after) == pytest.approx(least_of(symmetries), abs=1e-8)
    assert balance.residual == pytest.approx(0.0, abs=1e-9)
    assert balance.residuals[0] == pytest.approx(1 - math.exp(least_of(symmetries)) / balance.norm_before, abs=1e-8)


@pytest.mark.parametrize("power", [0.5, 2.0, 3.0])
def test_hook_goes_to_the_least_maximum(power):
    """One hidden layer: in- and out-maxima meet, whatever their exponents."""
    net, inputs = multilayer([5, 30, 3], power), torch.randn(4, 5).double()
    least = least_of(equinorm.symmetries(net, (inputs,)))
    hook = ENorm(torch.optim.SGD(net.parameters(), lr=0.0), net, (inputs,), p=math.inf, cycles=3)
    hook.cycle_()
    assert math.log(max(float(w.detach().abs().max()) for w in net.parameters())) == pytest.approx(least, abs=1e-8)
    assert hook.residual() <= 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_recurrent_networks(seed):
    torch.manual_seed(seed)
    symmetries = equinorm.symmetries(Recurrent().double(), torch.randn(1, 5).double())
    balance = symmetries.balance(p=math.inf, tol=1e-9)
    assert balance.converged
    assert balance.cycles <= 60
    moving = least_of(symmetries)
    diagonal = float(symmetries.tensors["again.weight"].detach().diag().abs().max())
    assert math.log(balance.norm_after) == pytest.approx(max(moving, math.log(diagonal)), abs=1e-8)


def test_algorithm_1_says_where_it_stands_still():
    torch.manual_seed(12)
    symmetries = equinorm.symmetries(Recurrent(3).double(), torch.randn(1, 5).double())
    balance = symmetries.balance(p=math.inf, method="cyclic", tol=1e-6)
    assert balance.cycles <= 1100
    assert not balance.converged
    assert "method='two-level' reaches it" in balance.reason
    assert balance.residual == pytest.approx(1 - symmetries.balance(p=math.inf).norm_after / balance.norm_after, rel=1e-9)
    assert balance.residual > 0.03


@pytest.mark.parametrize(("depth", "limit"), [(60, 230), (100, 230)])
def test_deep_chains(passes, depth, limit):
    symmetries = equinorm.symmetries(multilayer([8] * (depth + 1) + [4]), torch.randn(1, 8).double())
    balance = symmetries.balance(p=math.inf, tol=1e-9)
    assert len(passes) <= limit
    assert balance.converged
    assert math.log(balance.norm_after) == pytest.approx(least_of(symmetries), abs=1e-8)


def test_large_matrices_take_their_largest_entries_only():
    """Wider than what is listed as a whole, in an order that turns matrices around."""
    net = multilayer([20, 150, 130, 160, 5])
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.mul_(torch.exp(2 * torch.randn_like(layer.weight)))
    symmetries = equinorm.symmetries(net, torch.randn(1, 20).double())
    balance = symmetries.balance(p=math.inf, tol=1e-9)
    assert math.log(balance.norm_after) == pytest.approx(least_of(symmetries), abs=1e-8)


def test_channels_below_the_maximum_are_even():
    net = multilayer([12, 40, 50, 6])
    equinorm.balance_(net, torch.randn(1, 12).double(), p=math.inf, tol=1e-12)
    for front, back in itertools.pairwise(layer.weight.detach() for layer in net[::2]):
        torch.testing.assert_close(front.abs().amax(1), back.abs().amax(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["two-level", "cyclic"])
def test_networks_without_a_live_path(method):
    """As where a layer starts at zero: there is no largest entry."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(net[2].weight)
    balance = equinorm.symmetries(net, torch.randn(1, 3)).balance(math.inf, method=method)
    assert (balance.norm_after, balance.converged, balance.dead) == (0.0, False, (1, 2, 3, 4))
    assert "the norm has no minimum" in balance.reason
