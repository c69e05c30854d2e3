"""Systems of laws against linear algebra: as many free classes as the equations leave."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from equinorm._scaling import Reason
from equinorm.discovery import trace
from equinorm.discovery.classes import PINNED, ZERO, Classes
from equinorm.discovery.labels import Factor
from equinorm.discovery.shorter_forms import shorter
from equinorm.discovery.sign_classes import SignClasses

LAWS = [
    [(1, [2, 2]), (-1, [3, 4])],
    [(1, [2, 3]), (2, [4, 4])],
    [(1, [2, PINNED]), (1, [3, 5]), (-1, [4, 4])],
]


def check(laws: list[list[tuple[int, list[int]]]], count: int) -> None:
    """The dimension, and that every law holds for the forms."""
    classes = Classes()
    classes.fresh(count)
    rows = []
    for law in laws:
        classes.equate([(Fraction(exponent), np.array(ids)) for exponent, ids in law], Reason("a law"))
        for place in range(len(law[0][1])):
            row = np.zeros(count + 2)
            for exponent, ids in law:
                row[ids[place]] += exponent
            rows.append(row[2:])  # without the classes that are always zero
    free = classes.free_roots(np.ones(classes.size, bool))
    assert len(free) == count - np.linalg.matrix_rank(np.array(rows))
    basis = {int(root): np.random.default_rng(int(root)).normal() for root in free}
    values = np.array([sum(float(c) * basis[root] for root, c in classes.form(id).items()) for id in range(2, count + 2)])
    assert np.abs(np.array(rows) @ values).max() <= 1e-9


@pytest.mark.parametrize("number", range(len(LAWS)))
def test_single_laws(number):
    check([LAWS[number]], 4)


def test_pins_and_pivots_in_one_law():
    check([[(1, [2, 3]), (2, [4, 4])], [(1, [2, 2]), (1, [PINNED, 3])]], 3)
    check([[(1, [2, PINNED]), (2, [4, 4])]], 3)


def drawn(seed: int) -> tuple[list[list[tuple[int, list[int]]]], int]:
    draw = np.random.default_rng(seed)
    count = int(draw.integers(2, 9))
    laws = []
    for _ in range(draw.integers(1, 6)):
        rows = int(draw.integers(1, 7))
        terms = int(draw.integers(1, 5))
        exponents = draw.choice([-2, -1, 1, 2, 3], terms).tolist()
        laws.append([(exponent, draw.integers(1, count + 2, rows).tolist()) for exponent in exponents])
    return laws, count


@pytest.mark.parametrize("seed", range(400))
def test_random_systems(seed):
    check(*drawn(seed))


@pytest.mark.parametrize("seed", range(400))
def test_random_systems_of_signs(seed):
    """All signs that satisfy every law, counted one by one; as many as the free classes have, and each is one of them."""
    laws, count = drawn(seed)
    classes = SignClasses()
    classes.fresh(count)
    for law in laws:
        classes.equate([(Fraction(exponent), np.array(ids)) for exponent, ids in law], Reason("a law"))
    flips = np.stack(np.meshgrid(*[[0, 1]] * count, indexing="ij"), -1).reshape(-1, count)
    padded = np.concatenate([np.zeros((len(flips), 2), int), flips], axis=1)
    holds = np.ones(len(flips), bool)
    for law in laws:
        holds &= (sum(exponent * padded[:, ids] for exponent, ids in law) % 2 == 0).all(axis=1)
    free = classes.free_roots(np.ones(classes.size, bool)).tolist()
    forms = [classes.form(id) for id in range(2, count + 2)]
    assert all(coefficient == 1 for form in forms for coefficient in form.values())
    found = {tuple(sum(flip[free.index(root)] for root in form) % 2 for form in forms) for flip in np.ndindex(*[2] * len(free))}
    assert found == {*map(tuple, flips[holds].tolist())}


def test_a_law_in_which_a_sign_counts_twice_is_the_reason_of_what_it_pins():
    classes = SignClasses()
    ids = classes.fresh(2)
    classes.equate([(Fraction(1), ids[:1]), (Fraction(1), ids[:1]), (Fraction(1), ids[1:])], Reason("a law"))
    assert classes.reasons(ids) == {Reason("a law"): 1}


def test_the_constant_zero_has_any_sign_its_square_too():
    classes = SignClasses()
    ids = classes.fresh(1)
    classes.equate([(Fraction(2), np.array([ZERO])), (Fraction(1), ids)], Reason("a law"))
    assert classes.free_roots(np.ones(classes.size, bool)).tolist() == ids.tolist()


def test_powers_that_are_no_whole_numbers_have_no_sign():
    classes = SignClasses()
    ids = classes.fresh(3)
    classes.equate([(Fraction(1, 2), ids[:1]), (Fraction(1), ids[1:2])], Reason("a law"))
    assert classes.free_roots(np.ones(classes.size, bool)).tolist() == ids[2:].tolist()


def test_laws_without_repeated_slices_are_the_same_laws(monkeypatch):
    """Slices equal to the one before say nothing new; all others are kept, also where they come again later."""
    monkeypatch.setattr(trace, "_MANY", 0)
    generator = torch.Generator().manual_seed(0)
    fewer = 0
    for _ in range(200):
        sizes = [(6, 1, 5), (6, 4, 1), (1, 4, 5)]
        factors = [Factor(Fraction(1), torch.randint(2, 4, size, generator=generator)) for size in sizes]
        for axis, length in enumerate((6, 4, 5)):
            runs = torch.randint(length, (length,), generator=generator).sort().values
            ids = [f.ids.index_select(axis, runs) if f.ids.size(axis) > 1 else f.ids for f in factors]
            factors = [Factor(f.exponent, own) for f, own in zip(factors, ids, strict=True)]
        kept = trace._without_repeats(factors)
        before, after = (torch.stack(torch.broadcast_tensors(*(f.ids for f in some))).flatten(1).T for some in (factors, kept))
        assert {*map(tuple, after.tolist())} == {*map(tuple, before.tolist())}
        fewer += len(after) < len(before)
    assert fewer > 150


def test_more_reasons_than_small_numbers_count():
    classes = Classes()
    ids = classes.fresh(3)
    classes.equate([(Fraction(1), ids[:1])], Reason("the first"))
    classes._reasons += [Reason("others")] * (1 << 15)
    classes.equate([(Fraction(1), ids[1:2])], Reason("the last"))
    assert classes.reasons(ids) == {Reason("the first"): 1, Reason("the last"): 1}
    assert classes.resolve(ids).tolist() == [PINNED, PINNED, ids[2]]


LOOP = [{row: 1, 9: 1, 2: -1} for row in (5, 6, 7)]
"""Rows of a layer that is applied again: s_row·u/s, with u as class 9 and s as class 2."""


@pytest.mark.parametrize(
    ("forms", "found"),
    [
        (LOOP, {9: (2, 1)}),  # t = u/s
        ([{row: 1, 9: 2, 2: -1} for row in (5, 6, 7)], {2: (9, 2)}),  # and not u = t·√s
        ([*LOOP, {9: 1}, {9: 1, 8: 1}], {2: (9, 1)}),  # two forms with u alone: there s gives way
        ([*LOOP, {9: 1}, {9: 1}, {2: 1}, {2: 1}], {}),  # as many would get longer
        (LOOP[:1], {}),
    ],
)
def test_free_classes_are_taken_so_that_forms_are_short(forms, found):
    assert shorter(forms) == found


def test_shorter_forms_say_the_same():
    classes = Classes()
    s, (u,) = classes.fresh(3), classes.fresh(1)
    rows = classes.fresh(3)
    classes.equate(
        [(Fraction(1), rows), (Fraction(-1), s), (Fraction(-1), np.repeat(u, 3)), (Fraction(1), np.repeat(s[:1], 3))],
        Reason("a law"),
    )
    before = [classes.form(int(row)) for row in rows]
    classes.simplify()
    after, (new,) = [classes.form(int(row)) for row in rows], {*classes.form(int(u))} - {*s.tolist()}
    value = dict(zip([*s.tolist(), int(u)], (1, 10, 100, 1000), strict=True))
    value[new] = value[int(u)] - value[int(s[0])]
    sums = [[sum(coefficient * value[id] for id, coefficient in form.items()) for form in forms] for forms in (before, after)]
    assert sums[0] == sums[1]
    assert sum(map(len, after)) < sum(map(len, before))
