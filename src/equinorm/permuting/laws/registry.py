"""The table of laws: for each operator, what it asks of the axes of its inputs, and the axes of what it returns."""

from collections.abc import Callable
from typing import Any

import torch

from equinorm.discovery.rules import Call as Operation, key
from equinorm.permuting.law_book import LawBook


class Call(Operation):
    """One operation of the graph, whose tensors are axes in parts."""

    @property
    def input(self) -> Any:
        """The first argument, whatever its schema calls it."""
        return next(iter(self.arguments.values()))


Law = Callable[[LawBook, Call], Any]

LAWS: dict[str, Law] = {}
"""Law of every known operator, by its name in `torch.ops.aten`."""

ON_STACKS: set[Law] = set()
"""Laws that know stacks; all others are given one value instead."""

ON_ROWS: set[Law] = set()
"""Laws that know chosen rows."""

ON_NAMES: dict[Law, tuple[str, ...]] = {}
"""Arguments of laws that may name places along an axis; for all others that axis is pinned, or the values only move."""


WHICH = "tells which entry it was"
"""Why an axis is pinned whose places are named by numbers that something computes with."""

APART = "an index tells its entries apart"
"""Why an axis is pinned at whose places an index looks."""


def law(names: str, on_stacks: bool = False, on_names: str = "", on_rows: bool = False) -> Callable[[Law], Law]:
    """Enter a law for these operators, separated by blanks; a second law for one of them is an error.

    A name that this version of PyTorch lacks never occurs in a graph.
    """

    def enter(function: Law) -> Law:
        for name in names.split():
            if name in LAWS:
                raise ValueError(f"aten.{name} has two laws: {LAWS[name].__qualname__} and {function.__qualname__}")
            LAWS[name] = function
        if on_stacks:
            ON_STACKS.add(function)
        if on_rows:
            ON_ROWS.add(function)
        if on_names:
            ON_NAMES[function] = tuple(on_names.split())
        return function

    return enter


def find(operator: Any) -> Law | None:
    """An operator's law; its in-place form has the same, and all that the dispatcher calls pointwise share one."""
    name = key(operator)
    own = LAWS.get(name) or (LAWS.get(name.removesuffix("_")) if operator._schema.is_mutable else None)
    return own or (LAWS["add"] if torch.Tag.pointwise in operator.tags else None)
