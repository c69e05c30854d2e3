"""Where values come from, by way of all subgraphs that they were handed through."""

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from equinorm.permuting.atoms import Axis, atoms
from equinorm.permuting.value_numbers import ValueNumbers
from equinorm.permuting.values import Chosen, Laid

Atoms = frozenset[Any]
"""Of some axes."""


@dataclass(eq=False)
class Trail:
    """Where values come from, across the borders of subgraphs.

    Attributes:
        parameters: names of the placeholders of the whole graph that are parameters.
        values: axes of everything so far, in all graphs.
        sources: what inputs and results of subgraphs are on the other side.
        numbers: of values, one where the same was written down twice.
    """

    parameters: frozenset[str] = frozenset()
    values: dict[fx.Node, Any] = field(default_factory=dict)
    sources: dict[fx.Node, fx.Node] = field(default_factory=dict)
    numbers: ValueNumbers = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = ValueNumbers(self.back, self.values.get)

    def back(self, node: fx.Node) -> fx.Node:
        """The same value where it was made."""
        while node in self.sources:
            node = self.sources[node]
        return node

    def axes(self, node: fx.Node) -> tuple[Axis, ...]:
        """Axes of a value, where it was made; none of a stack."""
        value = self.values.get(self.back(node))
        return value.axes if isinstance(value, (Laid, Chosen)) else ()

    def atoms(self, node: fx.Node) -> Atoms:
        """Those of all axes of a value."""
        return frozenset(atom for axis in self.axes(node) for atom in atoms(axis))

    def meets(self, node: fx.Node, along: Atoms) -> bool:
        """Does a value have any of these atoms?"""
        return bool(along & self.atoms(node))
