"""Passes over weights in C++ (`passes.hpp`, `program.cpp`), compiled with the package or on first use.

Takes arrays. Gives sums and products. Never imports anything else of ours but errors.
"""

from equinorm.native.compute import Compute as Compute
from equinorm.native.kernels import (
    DEVICES as DEVICES,
    TYPES as TYPES,
    Kernels as Kernels,
    are_shipped as are_shipped,
    are_wanted as are_wanted,
    kernels_for as kernels_for,
    require as require,
)
from equinorm.native.structures import (
    Block as Block,
    Edge as Edge,
    Factor as Factor,
    Family as Family,
    Line as Line,
    Move as Move,
    Program as Program,
    array as array,
)
