"""The table of operations: one entry for each ATen operator that has a rule.

A rule is called as `rule(trace, call)` and returns the label of the result (a list for several results). Whatever has no
rule pins its inputs: unknown is safe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from equinorm.discovery.trace import Trace
from equinorm.discovery.values import Value

Rule = Callable[[Trace, "Call"], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One operation of the graph.

    Attributes:
        operator: the ATen overload; rules run its functional form on ids.
        arguments: every argument of its schema by name, defaults filled in; tensors as values.
        result: shape, dtype of the result, as the exporter recorded it: a fake tensor or a sequence of them.
    """

    operator: Any
    arguments: dict[str, Any]
    result: Any

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(f"{self.operator} has no argument {name!r}") from None

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, if the operator has it."""
        return self.arguments.get(name, default)

    @property
    def operator_name(self) -> str:
        """Without its namespace and overload; with the underscore of an operator that works in place."""
        return self.operator.overloadpacket.__name__

    @property
    def input(self) -> Value:
        """The first argument, whatever its schema calls it."""
        return next(iter(self.arguments.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the only result."""
        return tuple(self.result.shape)


TABLE: dict[str, Rule] = {}
"""Rule of every known operator, by its name in `torch.ops.aten`; of others by "namespace::name.overload"."""


def key(operator: Any) -> str:
    """Under which name the table knows an operator."""
    return operator.overloadpacket.__name__ if operator.namespace == "aten" else qualified(operator)


def qualified(operator: Any) -> str:
    """An operator's full name."""
    return f"{operator.namespace}::{operator.overloadpacket.__name__}.{operator._overloadname}"


def find(operator: Any, table: Mapping[str, Rule] = TABLE) -> Rule | None:
    """An operator's rule; its in-place form has the same."""
    name = key(operator)
    own = table.get(qualified(operator)) or table.get(name)
    return own or (table.get(name.removesuffix("_")) if operator._schema.is_mutable else None)


def rule(names: str) -> Callable[[Rule], Rule]:
    """Enter a rule for these operators, separated by blanks; a second rule for one of them is an error.

    Versions of PyTorch differ in which operators they have: a name that this one lacks never occurs in a graph.
    """

    def enter(function: Rule) -> Rule:
        for name in names.split():
            if name in TABLE:
                raise ValueError(f"aten.{name} has two rules: {TABLE[name].__qualname__} and {function.__qualname__}")
            TABLE[name] = function
        return function

    return enter
