"""Rules: what each operation asks of the labels of its inputs, and the labels of what it returns.

`TABLE` maps operators to rules. The modules, by kind: `_movement` (entries only move), `_placement` (to places that an index
names), `_elementwise` (each entry on its own), `_reduction` (sums, maxima, pooling along axes), `_normalization`,
`_contraction` (products summed over an axis), `_algebra` (several products, functions of whole matrices), `_recurrent`.
`_inhomogeneous` lists functions that have none for a reason.
"""

from equinorm._labels import Label
from equinorm._trace import Trace
from equinorm.rules import _algebra, _elementwise, _movement, _normalization, _placement, _recurrent, _reduction
from equinorm.rules._contraction import contract
from equinorm.rules._inhomogeneous import NOT_HOMOGENEOUS, why_not
from equinorm.rules._registry import TABLE, Call, find, key, qualified

__all__ = ["NOT_HOMOGENEOUS", "TABLE", "Call", "Label", "Trace", "contract", "find", "key", "qualified", "why_not"]

del _algebra, _elementwise, _movement, _normalization, _placement, _recurrent, _reduction
