"""The table of operators, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

NEWEST = 26
"""Version of the operators up to which their definitions were read; nodes of newer ones are taken to be unknown."""


class UnreadError(Exception):
    """This use of an operator is not in the table: the node runs as a whole, and pins what it reads."""


@dataclass(frozen=True, slots=True)
class NodeCall:
    """One node.

    Attributes:
        operator: such as "Conv".
        opset: version of its definition.
        attributes: as Python values, by name.
        outputs: how many outputs it has.
        read: how many of these are needed: the others, such as the mask of Dropout, are listed and nothing reads them.
        floating: the dtype that the file's float32 has by now.
    """

    operator: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: int = 1
    read: int = 1
    floating: torch.dtype = torch.float32

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or what it is where absent."""
        return self.attributes.get(name, default)

    def need(self, holds: bool, reason: str) -> None:
        """Leave this use of the operator unread unless a condition holds."""
        if not holds:
            raise UnreadError(reason)


@dataclass(frozen=True, slots=True)
class Operator:
    """How nodes of one name are evaluated.

    Attributes:
        function: takes the call and the inputs; returns the output, or several.
        attributes: names that the function knows; a node with another one is not read.
        settings: places of inputs that must be numbers known beforehand, such as shapes and axes; given as arrays.
        weights: places of inputs that are weights even if they have one entry.
        statistics: places of inputs that are no weights, whatever their size.
    """

    function: Callable[..., Any]
    attributes: frozenset[str]
    settings: frozenset[int]
    weights: frozenset[int]
    statistics: frozenset[int]

    def role(self, place: int) -> str:
        """What an input is: "statistics", "weights", or nothing where its numbers decide."""
        return "statistics" if place in self.statistics else "weights" if place in self.weights else ""


TABLE: dict[str, Operator] = {}


def operator(
    names: str, attributes: str = "", settings: tuple = (), weights: tuple = (), statistics: tuple = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: enter a function into the table under these names."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names.split():
            places = frozenset(settings), frozenset(weights), frozenset(statistics)
            TABLE[name] = Operator(function, frozenset(attributes.split()), *places)
        return function

    return enter
