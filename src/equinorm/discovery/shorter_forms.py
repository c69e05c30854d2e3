"""Other free classes in which linear forms have fewer terms."""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import permutations

Form = Mapping[int, int | Fraction]
"""Coefficients by class."""


def shorter(forms: Sequence[Form]) -> dict[int, tuple[int, int]]:
    """Classes u to express as t·v^k, with a new class t in place of u, by which these forms lose terms: v and k for each u.

    That is so where more forms with u hold v^−k than do not. Powers are whole, so that exponents stay whole; no class is in
    two pairs. Of two classes that could give way the later does.
    """
    uses = Counter(id for form in forms for id in form)
    often = {id for id, count in uses.items() if count > 1}
    together: Counter[tuple[int, int]] = Counter()
    cancelled: Counter[tuple[int, int, int]] = Counter()
    for form in forms:
        for u, v in permutations([id for id in form if id in often], 2):
            together[u, v] += 1
            power = Fraction(-form[v]) / form[u]
            if power.denominator == 1:
                cancelled[u, v, int(power)] += 1
    saved = {(u, v, k): count - (uses[u] - together[u, v]) - 1 for (u, v, k), count in cancelled.items()}
    found: dict[int, tuple[int, int]] = {}
    taken: set[int] = set()
    for u, v, k in sorted(saved, key=lambda key: (-saved[key], -key[0], key)):
        if saved[u, v, k] > 0 and not {u, v} & taken:
            found[u] = v, k
            taken |= {u, v}
    return found
