"""Choosing: what is measured decides, and chance does not."""

import pytest
import torch
from quantized_networks import perceptron

import equinorm
from equinorm.quantization import Scheme, choosing as real, solve
from equinorm.quantization.choosing import SHARES, TRIES, choose, sure
from equinorm.quantization.fake_quantization import Rounding
from equinorm.quantization.noise import Noise
from equinorm.quantization.points import find_points
from equinorm.quantization.statistics import gather
from equinorm.quantization.terms import by_name


class Trials:
    """Noise that is known: expected and measured, of ten samples alike, or as far apart as `spread` says."""

    def __init__(self, expected, measured, unseen=None, spread=lambda z: 0.0):
        self.seen, self.spread = [], spread
        self._expected, self._measured, self._unseen = expected, measured, unseen or measured

    def expected(self, z):
        return torch.full((10,), float(self._expected(z)))

    def measured(self, z):
        self.seen.append(z)
        return float(self._measured(z)) + float(self.spread(z)) * torch.linspace(-1, 1, 10)

    def glance(self, z):
        return self.measured(z)[:3]

    def unseen(self, z):
        return torch.full((10,), float(self._unseen(z)))


Z = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)


def test_neighbours_that_lose_less_are_taken():
    trials = Trials(distance := lambda z: (z - Z - 0.05).square().sum(), distance)
    calls = []
    found = choose(trials, Z, lambda z: z, 100, lambda *numbers: calls.append(numbers))
    assert calls == [(number, TRIES) for number in range(TRIES)]
    assert found.share == 1.0
    assert found.moves > 0
    assert float(distance(found.z)) < float(distance(Z))
    assert len(trials.seen) > 1 + len(SHARES)
    still = choose(Trials(lambda z: (z - Z).square().sum(), lambda z: (z + 1).square().sum() / 1e3), Z, lambda z: z, 100)
    assert still.moves == 0


def test_neighbours_that_look_no_better_are_not_measured():
    trials = Trials(distance := lambda z: (z - Z - 0.05).square().sum(), distance)
    trials.glance = lambda z: torch.ones(2)
    assert choose(trials, Z, lambda z: z, 100).moves == 0
    assert {tuple(z.tolist()) for z in trials.seen} == {tuple((share * Z).tolist()) for share in (0.0, *SHARES)}


@pytest.mark.parametrize("which", ["measured", "unseen"])
def test_what_loses_more_is_taken_back(which):
    """Up to half of the way it is better, then worse."""
    expected, real = (lambda z: (z - Z).square().sum()), (lambda z: (z - 0.4 * Z).square().sum())
    trials = Trials(expected, *((real,) if which == "measured" else (expected, real)))
    found = choose(trials, Z, lambda z: z, 10**6)
    assert found.share == 0.5
    torch.testing.assert_close(found.z, 0.5 * Z, rtol=0, atol=1e-4)
    worse = choose(Trials(expected, lambda z: z.square().sum()), Z, lambda z: z, 100)
    assert worse.share == 0.0
    assert not bool(worse.z.any())


def test_powers_of_two_are_tried_once():
    trials = Trials(distance := lambda z: (z - Z).square().sum(), distance)
    found = choose(trials, Z, torch.round, 100)
    assert found.z.tolist() == Z.tolist()
    assert found.moves == 0
    assert all(z.tolist() == z.round().tolist() for z in trials.seen)
    assert len(trials.seen) == 1 + 2 + 1  # at rest, parts that differ, and the last check


def test_the_smallest_part_is_taken_that_is_not_surely_worse():
    """All is least at the whole. Where samples differ much, half of it is as good for all that is known."""
    distance = lambda z: (z - Z).square().sum()  # noqa: E731
    clear, doubtful = (
        choose(Trials(distance, distance, spread=lambda z, by=by: by * z.norm()), Z, torch.round, 100) for by in (0.1, 50.0)
    )
    assert clear.share == 1.0
    assert doubtful.share < 1.0
    assert bool(doubtful.z.any())


def test_others_are_taken_where_they_are_better_with_unseen_bounds_too():
    other, far = torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64), lambda z: 30 + (z - Z).square().sum()
    near = lambda z: min(far(z), 2 * (z - other).square().sum())  # noqa: E731
    taken = choose(Trials(far, near), Z, torch.round, 100, others={"the other": other})
    assert (taken.start, taken.z.tolist(), taken.share) == ("the other", other.tolist(), 1.0)
    left = choose(Trials(far, near, far), Z, torch.round, 100, others={"the other": other})
    assert (left.start, left.z.tolist()) == ("", Z.tolist())


def test_nothing_is_tried_where_nothing_moves():
    trials = Trials(lambda z: 1.0, lambda z: 1.0)
    assert choose(trials, 0 * Z, lambda z: z, 100).share == 0.0
    assert trials.seen == []


def test_a_part_of_powers_of_two_is_rounded_again():
    """Half of the logarithm of a power of two need not be one."""
    odd = torch.tensor([3.0, -1.0, 5.0], dtype=torch.float64)
    found = choose(Trials(lambda z: (z - odd).square().sum(), lambda z: (z - 0.5 * odd).square().sum()), odd, torch.round, 100)
    assert found.share == 0.5
    assert found.z.tolist() == torch.round(0.5 * odd).tolist()


def test_chance_is_not_sure():
    less, more = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.1, 1.2, 1.1, 1.2])
    assert sure(less, more, 2.5)
    assert not sure(more, less, 0.0)
    assert not sure(torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([9.0, 0.0, 0.0, 0.0]), 1.0)
    assert sure(torch.tensor([1.0]), torch.tensor([2.0]), 2.5)


def real_trials(model, x):
    scheme = Scheme(8, "tensor")
    symmetries, points = find_points(model, (x,), None, scheme)
    seen = gather(model, points, [((x,), {})])
    rounding = Rounding(model, points, seen.activations, by_name(symmetries.scalings))
    return real.Trials(rounding, Noise([], symmetries.num_free), [((x,), {})], cuts=seen.cuts)


def test_a_glance_is_at_the_first_quarter_and_nothing_is_measured_twice():
    net, x = perceptron()
    trials = real_trials(net, x)
    z = torch.linspace(-1, 1, 13, dtype=torch.float64)
    whole = trials.measured(z)
    torch.testing.assert_close(trials.glance(z), whole[:10], rtol=1e-9, atol=0)
    assert trials.measured(z.clone()) is whole
    assert trials.unseen(z) is not whole
    assert trials.measured(-0.0 * z) is trials.measured(0.0 * z)
    fixed = real_trials(torch.export.export(net, (x,)).module(), x)
    torch.testing.assert_close(fixed.glance(z), whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (("", 0.5, 2), "50% of these log-scales, moved 2 times"),
        (("the other", 1.0, 1), "the other, moved 1 time"),
        (("the other", 0.25, 0), "25% of the other"),
    ],
)
def test_the_record_says_what_was_chosen(monkeypatch, chosen, words):
    start, share, moves = chosen
    monkeypatch.setattr(solve, "choose", lambda trials, z, *_: real.ChosenScales(0.5 * z + 0.1, share, moves, start))
    net, x = perceptron()
    assert equinorm.equalize_(net, x, calibration=[x]).reason.endswith(f"best when rounded for real: {words}")
