"""Rules: what each operation asks of the labels of its inputs, and the labels of what it returns.

`TABLE` maps operators to rules. The modules, by kind: `_movement` (entries only move), `_placement` (to places that an index
names), `_elementwise` (each entry on its own), `_reduction` (sums, maxima, pooling along axes), `_normalization`,
`_contraction` (products summed over an axis), `_algebra` (several products, functions of whole matrices), `_recurrent`.
"""

from equinorm._labels import Label
from equinorm._trace import Trace
from equinorm.rules import _algebra, _elementwise, _movement, _normalization, _placement, _recurrent, _reduction
from equinorm.rules._contraction import contract
from equinorm.rules._registry import TABLE, Call, find, key, qualified

__all__ = ["TABLE", "Call", "Label", "Trace", "contract", "find", "key", "qualified"]

del _algebra, _elementwise, _movement, _normalization, _placement, _recurrent, _reduction
