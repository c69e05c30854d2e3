"""Laws: what each operation asks of the axes of its inputs, and the axes of what it returns.

Takes a `LawBook` and a `Call`. Gives axes, and what must be permuted alike. Never imports the graph nor the interpreter.

`LAWS` maps operators to laws. The modules, by kind: `elementwise`, `movement` (entries only move), `placement` (to places that
an index names), `reduction` (along whole axes), `normalization`, `contraction` (products summed over an axis), `diagonals`,
`spectral` (Fourier's transforms), `recurrent`.
"""

from equinorm.permuting.laws import (
    contraction,
    diagonals,
    elementwise,
    movement,
    normalization,
    placement,
    recurrent,
    reduction,
    spectral,
)
from equinorm.permuting.laws.registry import LAWS, ON_NAMES, ON_ROWS, ON_STACKS, Call, find

__all__ = ["LAWS", "ON_NAMES", "ON_ROWS", "ON_STACKS", "Call", "find"]

del contraction, diagonals, elementwise, movement, normalization, placement, recurrent, reduction, spectral
