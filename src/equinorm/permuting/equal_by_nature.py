"""Scores that are equal by nature, as sums of softmax over what it normalizes: only rounding tells then which is the largest.

Any permutation of what they are made from rounds otherwise, so that all of that must stay.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from equinorm.discovery.graph.nodes import bind, operator_name
from equinorm.permuting.atoms import atoms
from equinorm.permuting.equal_entries import DEEPEST, ENTRYWISE, MOVED, PRODUCTS, chosen_along
from equinorm.permuting.trail import Atoms, Trail
from equinorm.permuting.values import Laid

WHY = "chooses among entries that only rounding tells apart"

_REDUCED = """sum mean amax amin max min logsumexp prod var std var_mean norm linalg_vector_norm"""

_SOFTMAX = "softmax _softmax log_softmax _log_softmax"

_OF_BATCHES = "batch_norm native_batch_norm group_norm native_group_norm instance_norm"

_BINARY = "add sub rsub mul div"

_CARRIED = f"{ENTRYWISE} {MOVED} expand clamp clamp_min clamp_max pow relu"


def made_from(chosen: fx.Node, trail: Trail) -> list[Laid]:
    """All values from which scores that are equal by nature are made; empty where scores are not.

    Args:
        chosen: a maximum, topk, sort.
        trail: what was before it.
    """
    scores = trail.back(chosen.all_input_nodes[0])
    if not _Scores(trail, chosen_along(chosen, trail)).are_equal(scores, frozenset(), 0):
        return []
    found, waiting, seen = list[Laid](), [scores], set[fx.Node]()
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
class _Scores:
    """Values that hold the parts of an axis along which something chooses."""

    trail: Trail
    along: Atoms
    known: dict[tuple[fx.Node, Atoms], bool] = field(default_factory=dict)

    def are_equal(self, node: fx.Node, summed: Atoms, depth: int) -> bool:
        """Are entries along the axis equal in exact arithmetic, whatever the weights?

        Args:
            node: the value.
            summed: parts of axes over which all entries are summed, or reduced otherwise, before something chooses.
            depth: of operations between.
        """
        node = self.trail.back(node)
        if node.target is operator.getitem:
            node = self.trail.back(node.all_input_nodes[0])
        if (node, summed) not in self.known:
            self.known[node, summed] = False  # until it is known
            self.known[node, summed] = depth < DEEPEST and self._are_equal(node, summed, depth)
        return self.known[node, summed]

    def _are_equal(self, node: fx.Node, summed: Atoms, depth: int) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
            return False
        name, given = operator_name(node).removesuffix("_"), bind(node.target, node.args, node.kwargs)
        met = (part for part in node.all_input_nodes if self.trail.meets(part, self.along))
        read = [part for part in met if isinstance(part.meta.get("val"), Tensor)]
        if not read or not read[0].meta["val"].is_floating_point():
            return False
        if (over := self._normalized(name, given)) is not None and (not over or over & summed) and not over & self.along:
            return True
        if name in _BINARY.split() and len(read) == 2 and self._cancels(name, read[0], read[1], summed):
            return True
        if name in PRODUCTS.split():
            summed = self.trail.atoms(read[0]) - self.trail.atoms(node) if self._is_by_constants(node, read) else frozenset()
        elif name in _REDUCED.split():
            summed |= self.trail.atoms(read[0]) - self.trail.atoms(node)
        return all(self.are_equal(part, summed, depth + 1) for part in read)

    def _normalized(self, name: str, given: dict[str, Any]) -> Atoms | None:
        """Parts of axes over which an operation makes sums, or means, that are known; None if it is no such operation."""
        source = given.get("self", given.get("input"))
        if not isinstance(source, fx.Node):
            return None
        axes = self.trail.axes(source)
        if name in _SOFTMAX.split():
            return frozenset(atoms(axes[given["dim"]])) if axes else None
        if "layer_norm" in name or name == "rms_norm":
            return frozenset(atom for axis in axes[-len(given["normalized_shape"]) :] for atom in atoms(axis))
        if name in _OF_BATCHES.split() and given.get("training", given.get("use_input_stats", True)):
            return self.trail.atoms(source) - self.along
        return None

    def _cancels(self, name: str, one: fx.Node, other: fx.Node, summed: Atoms) -> bool:
        """Is one operand made from the other's numbers, entry by entry, or from their sums?"""
        one, other = self._before_expansion(one), self._before_expansion(other)
        wide, narrow = (one, other) if self.trail.atoms(other) <= self.trail.atoms(one) else (other, one)
        lost = self.trail.atoms(wide) - self.trail.atoms(narrow)
        if not {*self._roots(wide, "")} & {*self._roots(narrow, _REDUCED if lost else "")}:
            return False
        if lost:
            return bool(lost & summed)
        return name in ("sub", "rsub", "div") or any(self._is_negative(part) for part in (one, other))

    def _before_expansion(self, node: fx.Node) -> fx.Node:
        """What was repeated along axes to fit another value."""
        node = self.trail.back(node)
        is_expanded = operator_name(node) in ("expand", "expand_as")
        return self.trail.back(node.all_input_nodes[0]) if is_expanded else node

    def _roots(self, node: fx.Node, reduced: str) -> Iterator[int]:
        """Numbers of what a value is made from by operations on single entries, and by sums if these are named."""
        names = {*f"{_CARRIED} {reduced}".split()}
        for _ in range(DEEPEST):
            node = self.trail.back(node)
            yield self.trail.numbers.of(node)
            if operator_name(node).removesuffix("_") not in names:
                return
            parts = [part for part in node.all_input_nodes if self.trail.meets(part, self.along)]
            if len(parts) != 1:
                return
            node = parts[0]

    def _is_negative(self, node: fx.Node) -> bool:
        node = self.trail.back(node)
        return operator_name(node) == "neg"

    def _is_by_constants(self, node: fx.Node, read: list[fx.Node]) -> bool:
        """Is a value multiplied with numbers that no weight changes?"""
        others = (self.trail.values.get(self.trail.back(part)) for part in node.all_input_nodes if part not in read)
        return all(isinstance(other, Laid) and other.number is not None for other in others) and len(read) == 1
