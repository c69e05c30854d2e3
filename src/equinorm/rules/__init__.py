"""Rules: what each operation asks of the labels of its inputs, and the labels of what it returns.

`TABLE` maps operators to rules. The modules, by kind: `_movement` (entries only move), `_elementwise` (each entry on its own),
`_reduction` (sums, maxima, pooling along axes), `_normalization`, `_contraction` (products summed over an axis).
"""

from equinorm.rules import _contraction, _elementwise, _movement, _normalization, _reduction
from equinorm.rules._registry import TABLE, Call

__all__ = ["TABLE", "Call"]

del _contraction, _elementwise, _movement, _normalization, _reduction
