"""Scores that are equal by nature, as signs, x / |x|, or sums of softmax: found by trying them with random numbers.

What an operation chooses from is computed anew, in float64, from random numbers in the place of what products with weights
give. Entries that are equal then are so for many inputs, whatever the weights.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from equinorm.discovery.graph.nodes import bind, is_static, mapped, operator_name, results_of
from equinorm.permuting.equal_entries import CAME_FIRST, MOVED, PRODUCTS, chosen_along, masked
from equinorm.permuting.trail import Atoms, Trail
from equinorm.permuting.values import Laid

ROUNDED = "chooses among entries that only rounding tells apart"

_ROWS = 256
"""Rows of scores that are looked at, at least, where there are not more."""

_MOST = 1 << 22
"""Entries of a value that is computed."""

_SLIGHT = 1e-8
"""By how much random numbers are changed, in parts of each, to see what is only rounding."""

_MUCH = 1e-3
"""Scores that such a change moves by more, in parts of each, are only rounding."""

_NEAR = 1e-12
"""Scores that differ by less, in parts of each, are equal but for rounding."""


def why_equal_by_nature(chosen: fx.Node, trail: Trail) -> str | None:
    """Why several entries that an operation chooses from are equal for many inputs, whatever the weights; None if they are not.

    Args:
        chosen: a maximum, topk, sort.
        trail: what was before it.
    """
    scores, given = chosen.all_input_nodes[0], bind(chosen.target, chosen.args, chosen.kwargs)
    axes, place = trail.axes(scores), given["dim"] if isinstance(given.get("dim"), int) else -1
    shape = scores.meta["val"].shape
    if not axes or not _is_small(scores.meta["val"]) or not math.prod(shape):
        return None
    trials = _Trials(trail, chosen_along(chosen, trail))
    order = trials.order(scores)
    found = None
    for number in range(max(1, _ROWS * shape[place] // math.prod(shape))):
        one, other = (trials.computed(order, number, slight).movedim(place, -1) for slight in (0.0, _SLIGHT))
        if _is_rounding(one, other):
            return ROUNDED
        entries, order_of_size = one.sort(-1)
        is_near = _near(entries) & _near(other.gather(-1, order_of_size))  # neighbours by accident are so only once
        if bool((is_near & (entries[..., 1:] != entries[..., :-1])).any()):
            return ROUNDED
        found = CAME_FIRST if bool(is_near.any()) else found
    return found


def _near(entries: Tensor) -> Tensor:
    """Is each entry equal to the next one, but for rounding?"""
    one, other = entries[..., :-1], entries[..., 1:]
    return ((one - other).abs() <= _NEAR * torch.maximum(one.abs(), other.abs())) & one.isfinite()


def _is_rounding(one: Tensor, other: Tensor) -> bool:
    """Does a slight change of everything change most scores a lot?"""
    told = one.isfinite() & (one != 0)
    return bool(((one - other).abs() > _MUCH * one.abs())[told].double().mean() > 0.5)


def made_from(chosen: fx.Node, trail: Trail) -> list[Laid]:
    """All values from which scores are made: where only rounding tells these apart, any permutation rounds otherwise.

    Args:
        chosen: a maximum, topk, sort.
        trail: what was before it.
    """
    found, waiting, seen = list[Laid](), [chosen.all_input_nodes[0]], set[fx.Node]()
    while waiting:
        node = trail.back(waiting.pop())
        if node in seen:
            continue
        seen.add(node)
        waiting += node.all_input_nodes
        if isinstance(value := trail.values.get(node), Laid):
            found.append(value)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Trials:
    """Computes scores from random numbers.

    Attributes:
        trail: where they come from.
        along: parts of the axis along which something chooses.
        drawn: numbers of this trial that stand for values, by the number of the value; shared by values that are the same.
    """

    trail: Trail
    along: Atoms
    drawn: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def order(self, scores: fx.Node) -> list[fx.Node]:
        """What has to be computed, each after what it is made from."""
        found, waiting = dict[fx.Node, None](), [self.trail.back(scores)]
        while waiting:
            missing = [part for part in self._read(waiting[-1]) if part not in found]
            waiting += missing
            if not missing:
                found[waiting.pop()] = None
        return [*found]

    def computed(self, order: list[fx.Node], seed: int, slight: float) -> Tensor:
        """Scores of one trial, with numbers that are changed slightly."""
        values = dict[fx.Node, Any]()
        self.drawn.clear()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for place, node in enumerate(order):
                torch.default_generator.manual_seed(seed * len(order) + place)
                values[node] = self._computed(node, values, slight)
        return values[order[-1]]

    def _computed(self, node: fx.Node, values: dict[fx.Node, Any], slight: float) -> Any:
        if not [*self._read(node)]:
            return self._given(node, slight)
        if (scores := masked(node, self.trail)) is not None:
            return values[self.trail.back(scores[0])]

        def change(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return _wide(argument)
            source = self.trail.back(argument)
            value = values[source] if source in values else self._given(source, slight)
            return value.clone() if isinstance(value, Tensor) else value

        args, kwargs = mapped([*node.args], change), mapped(node.kwargs, change)
        try:
            return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        except (RuntimeError, IndexError, NotImplementedError, TypeError, ValueError):  # of numbers that only the network has
            return self._drawn(node, slight)

    def _read(self, node: fx.Node) -> Iterator[fx.Node]:
        """What a value is computed from; nothing where random numbers stand for it."""
        is_called = node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
        if node.op != "call_function" or not is_called or self._number(node) is not None or not _is_small(node.meta.get("val")):
            return
        read = [self.trail.back(part) for part in node.all_input_nodes]
        if (scores := masked(node, self.trail)) is not None:
            read = [self.trail.back(scores[0])]
        elif operator_name(node).removesuffix("_") in PRODUCTS.split():
            read = [part for part in read if self.trail.meets(part, self.along)]
            if all(map(self._is_weight, read)):
                return
        yield from read

    def _is_weight(self, node: fx.Node) -> bool:
        while operator_name(node) in MOVED.split() and len(node.all_input_nodes) == 1:
            node = self.trail.back(node.all_input_nodes[0])
        return node.op == "placeholder" and node.name in self.trail.parameters

    def _number(self, node: fx.Node) -> Tensor | None:
        """The numbers of a value that no input and no weight can change."""
        value = self.trail.values.get(node)
        return value.number if isinstance(value, Laid) else None

    def _given(self, node: fx.Node, slight: float) -> Any:
        """The numbers of a value that no weight can change; random ones in the place of any other."""
        number = self._number(node)
        return self._drawn(node, slight) if number is None else _wide(number)

    def _drawn(self, node: fx.Node, slight: float) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return [self._like(node, part, place, slight) for place, part in enumerate(results_of(value))]
        return self._like(node, value, 0, slight)

    def _like(self, node: fx.Node, value: Any, place: int, slight: float) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point() and not value.is_complex():
            return torch.rand(value.shape) < 0.5 if value.dtype == torch.bool else torch.zeros(value.shape, dtype=value.dtype)
        key = self.trail.numbers.of(node), place
        if key not in self.drawn:
            wide, is_other = _wide_type(value.dtype), node.op == "placeholder" and node.name not in self.trail.parameters
            numbers = torch.rand(value.shape, dtype=wide) + 0.5 if is_other else torch.randn(value.shape, dtype=wide)
            self.drawn[key] = numbers * (1 + slight * torch.randn(value.shape, dtype=torch.float64))
        return self.drawn[key]


def _is_small(value: Any) -> bool:
    return is_static(value) and all(part.numel() <= _MOST for part in results_of(value))


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


def _wide(argument: Any) -> Any:
    """Numbers and types in double precision, on the CPU."""
    if isinstance(argument, torch.dtype):
        return _wide_type(argument)
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    return argument.detach().cpu().to(_wide_type(argument.dtype)) if isinstance(argument, Tensor) else argument
