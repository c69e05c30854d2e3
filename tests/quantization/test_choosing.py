"""Choosing: what is measured decides, and chance does not."""

import pytest
import torch

from equinorm.quantization.choosing import SHARES, TRIES, choose, sure


class Trials:
    """Noise that is known: expected and measured, of ten samples alike."""

    def __init__(self, expected, measured, unseen=None):
        self.seen = []
        self._expected, self._measured, self._unseen = expected, measured, unseen or measured

    def expected(self, z):
        self.seen.append(z)
        return torch.full((10,), float(self._expected(z)))

    def measured(self, z):
        return torch.full((10,), float(self._measured(z)))

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
    assert len(trials.seen) > len(SHARES)
    still = choose(Trials(lambda z: (z - Z).square().sum(), lambda z: (z + 1).square().sum() / 1e3), Z, lambda z: z, 100)
    assert still.moves == 0


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
    assert len(trials.seen) == len(SHARES)


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
