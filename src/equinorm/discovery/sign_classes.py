"""Classes of signs: (−1)^n for n = 0 or 1, so that laws are equations modulo 2."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from equinorm._scaling import Reason
from equinorm.discovery.classes import PINNED, ZERO, Classes, Rational, Term

_NO_SIGN = Reason("a power", "that is no whole number")


class SignClasses(Classes):
    """The solution space modulo 2: a class is its own inverse, and one that counts twice is free.

    A weight that is used as it is and transposed, around an odd function, may flip: z + z = 0 says nothing here.
    """

    def equate(self, terms: Sequence[Term], reason: Reason) -> None:
        """Impose Σ_k e_k·n[ids_k] = 0 modulo 2 on every row; classes with powers that are no whole numbers are pinned."""
        for exponent, ids in terms:
            if Fraction(exponent).denominator != 1:
                super().equate([(Fraction(1), ids)], _NO_SIGN)
        odd = [(Fraction(1), ids if exponent % 2 else np.where(ids == ZERO, ZERO, PINNED)) for exponent, ids in terms]
        super().equate(odd, reason)

    def _reduced(self, coefficient: Rational) -> Rational:
        return coefficient % 2

    def _cancel(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return left == right

    def _union(self, left: np.ndarray, right: np.ndarray, reason: Reason) -> None:
        super()._union(np.abs(left), np.abs(right), reason)
