"""Rules: what each operation asks of the labels of its inputs, and the labels of what it returns.

Takes a `Trace` and a `Call`. Gives labels, and laws between them. Never imports the graph nor the interpreter.

`TABLE` maps operators to rules. The modules, by kind: `movement` (entries only move), `placement` (to places that an index
names), `elementwise` (each entry on its own), `reduction` (sums, maxima, pooling along axes), `normalization`,
`contraction` (products summed over an axis), `algebra` (several products, functions of whole matrices), `recurrent`.
`inhomogeneous` lists functions that have none for a reason. `signs` has the rules where scales are −1.
"""

from equinorm.discovery.labels import Label
from equinorm.discovery.rules import algebra, elementwise, movement, normalization, placement, recurrent, reduction
from equinorm.discovery.rules.contraction import contract
from equinorm.discovery.rules.inhomogeneous import NOT_HOMOGENEOUS, why_not
from equinorm.discovery.rules.registry import TABLE, Call, find, key, qualified
from equinorm.discovery.rules.signs import SIGNS
from equinorm.discovery.trace import Trace

__all__ = [
    "NOT_HOMOGENEOUS",
    "SIGNS",
    "TABLE",
    "Call",
    "Label",
    "Trace",
    "contract",
    "find",
    "key",
    "qualified",
    "why_not",
]

del algebra, elementwise, movement, normalization, placement, recurrent, reduction
