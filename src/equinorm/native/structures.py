"""Structures that the kernels read, as `program.cpp` and `passes.hpp` declare them."""

import ctypes
from collections.abc import Sequence
from ctypes import Structure
from typing import Any

POINTER, SIZE, NUMBER, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int


class Factor(Structure):
    """As in `program.cpp`."""

    _fields_ = (("ids", POINTER), ("exponent", NUMBER), ("family", SIZE))


class Line(Structure):
    """As in `program.cpp`."""

    _fields_ = (("size", SIZE), ("count", SIZE), ("factors", POINTER), ("base", POINTER))


class Block(Structure):
    """As in `program.cpp`."""

    _fields_ = (("tensor", SIZE), ("first", SIZE), ("pitch", SIZE), ("lines", Line * 2))


class Edge(Structure):
    """As in `program.cpp`."""

    _fields_ = (("block", SIZE), ("line", SIZE), ("factor", SIZE))


class Family(Structure):
    """As in `program.cpp`."""

    _fields_ = (("first", SIZE), ("last", SIZE), ("count", SIZE), ("edges", POINTER), ("step", NUMBER))


class Program(Structure):
    """As in `program.cpp`."""

    _fields_ = (
        ("blocks", SIZE),
        ("families", SIZE),
        ("block", POINTER),
        ("family", POINTER),
        ("order", POINTER),
        ("p", SIZE),
        ("ids", SIZE),
        ("newton_steps", SIZE),
        ("longest_step", NUMBER),
    )


class Move(Structure):
    """As in `passes.hpp`."""

    _fields_ = (
        ("tensor", POINTER),
        ("part", POINTER),
        ("rows", SIZE),
        ("columns", SIZE),
        *((name, POINTER) for name in ("r", "c", "part_r", "part_c")),
    )


def array(kind: Any, items: Sequence[Any]) -> ctypes.Array:
    """Structures end to end in memory."""
    return (kind * len(items))(*items)
