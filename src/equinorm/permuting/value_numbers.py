"""Numbers of values: two have one where the same operations made them from the same values, though written down twice."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from equinorm.discovery.graph.nodes import bind
from equinorm.discovery.rules import key
from equinorm.permuting.values import Laid

_MOST = 1 << 12
"""Entries of a constant that are compared with those of another."""


class ValueNumbers:
    """A number for each value of a graph and its subgraphs, found when it is asked for.

    Operations in place count as those that return something new: what is read after it was changed is pinned already.

    Args:
        back: the same value where it was made, across the borders of subgraphs.
        laid: what is known of a value.
    """

    def __init__(self, back: Callable[[fx.Node], fx.Node], laid: Callable[[fx.Node], Any]) -> None:
        self._back, self._laid = back, laid
        self._found, self._numbers = dict[fx.Node, int](), dict[Any, int]()

    def of(self, node: fx.Node) -> int:
        """The number of a value."""
        waiting = [self._back(node)]
        while waiting:
            node = self._back(waiting[-1])
            missing = [part for part in map(self._back, node.all_input_nodes) if part not in self._found]
            if node in self._found or not missing:
                waiting.pop()
                self._found.setdefault(node, self._numbers.setdefault(self._key(node), len(self._numbers)))
            else:
                waiting += missing
        return self._found[node]

    def _key(self, node: fx.Node) -> Any:
        """What all values of one number share; the node itself where no other has its value."""
        laid = self._laid(node)
        if isinstance(laid, Laid) and laid.number is not None and laid.number.numel() <= _MOST:
            return "number", laid.number.dtype, laid.shape, tuple(laid.number.flatten().tolist())
        if node.target is operator.getitem:
            return "part", self._named(node.args)
        if not isinstance(node.target, torch._ops.OpOverload):
            return node
        given = bind(node.target, node.args, node.kwargs)
        if torch.Tag.nondeterministic_seeded in node.target.tags and not _is_off(given):
            return node
        return key(node.target).removesuffix("_"), self._named(given)

    def _named(self, arguments: Any) -> str:
        """Arguments in text, with numbers for values."""
        return repr(map_arg(arguments, lambda part: f"value {self._found[self._back(part)]}"))


def _is_off(given: dict[str, Any]) -> bool:
    """Does an operation that may draw numbers draw none, as dropout in evaluation?"""
    return given.get("train", given.get("training")) is False or given.get("dropout_p") == 0
