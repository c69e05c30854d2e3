"""Clips of an ONNX graph whose bounds differ by channel: a Relu or Max, and a Min, with numbers that broadcast.

A Relu is written as a Clip up to the largest bound. The Min makes the same of it, and a runtime that rounds what stands between
them then spends its steps on what passes.
"""

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equinorm.integrations.onnx.errors import library
from equinorm.integrations.onnx.files import Stored
from equinorm.integrations.onnx.surgery import Surgery

LARGEST = 3.4e38
"""Bounds beyond it, as in files from before version 11, are none."""


@dataclass(frozen=True, eq=False)
class Bounded:
    """A Clip between numbers.

    Attributes:
        node: the Clip.
        low: its least result, −∞ if none is set.
        high: its largest.
    """

    node: Any
    low: float
    high: float

    @property
    def name(self) -> str:
        """Of the node."""
        return self.node.name or self.node.output[0]

    @property
    def output(self) -> str:
        """What it makes, which names it in the graph."""
        return self.node.output[0]


@dataclass(frozen=True, eq=False)
class Freed:
    """A Clip whose bounds may differ.

    Attributes:
        was: the Clip.
        first: what takes its place first makes.
        bounds: names of the stored bounds, by the operator that reads them.
    """

    was: Bounded
    first: str
    bounds: dict[str, str]


def clips(surgery: Surgery) -> list[Bounded]:
    """The Clips of a graph between numbers that no caller may replace, where not all bounds are 0 or absent."""
    found = []
    for node in surgery.nodes("Clip"):
        bounds = _bounds(surgery, node)
        if bounds is not None and not {*bounds} <= {0.0, -math.inf, math.inf} and bounds[0] < bounds[1]:
            found.append(Bounded(node, *bounds))
    return found


def as_relus_(file: Stored, which: Set[str]) -> None:
    """Put a Relu, which scales, in the place of the Clips that make these: what bounds could then scale with."""
    surgery = Surgery(file)
    for clip in [clip for clip in clips(surgery) if clip.output in which]:
        surgery.swap(clip.node, [_node("Relu", list(clip.node.input[:1]), [clip.output], clip.node.name)])
    surgery.done()


def free_(file: Stored, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> list[Freed]:
    """Give Clips bounds of these shapes, by what the Clips make: all alike at first."""
    surgery = Surgery(file)
    found = []
    for clip in clips(surgery):
        if clip.output in shapes:
            found.append(_freed(surgery, clip, *shapes[clip.output]))
    if found:
        surgery.done()
    return found


def settle_(file: Stored, freed: list[Freed]) -> int:
    """Turn those whose bounds are all equal back into Clips, with other numbers perhaps; returns how many are left.

    In those that are left a Relu becomes a Clip up to the largest bound.

    Numbers that no Clip reads any more go.
    """
    surgery = Surgery(file)
    idle: list[str] = []
    left = 0
    for part in freed:
        numbers = {kind: torch.unique(_known(surgery, name)) for kind, name in part.bounds.items()}
        idle += part.was.node.input[1:]
        if any(len(found) != 1 for found in numbers.values()):
            left += 1
            if "Max" not in part.bounds and part.first != part.was.output:
                _limit(surgery, part, numbers["Min"].max())
            continue
        low, high = (numbers[kind].item() if kind in numbers else bound for kind, bound in _both(part.was))
        clip = part.was.node
        if (low, high) != (part.was.low, part.was.high):
            dtype = _known(surgery, next(iter(part.bounds.values()))).dtype
            clip = _clip(surgery, part.was, low, high, dtype)
        for name in _chain(part):
            surgery.swap(surgery.makers[name], [clip] if name == part.first else [])
        idle += part.bounds.values()
    surgery.done(idle)
    return left


def _freed(surgery: Surgery, clip: Bounded, shape: tuple[int, ...], dtype: torch.dtype) -> Freed:
    """Swap a Clip; the last node makes what it made."""
    kinds = [kind for kind, bound in _both(clip) if math.isfinite(bound)]
    kinds = ["Relu" if kind == "Max" and clip.low == 0 else kind for kind in kinds]
    values = [surgery.free(f"{clip.output}_{kind.lower()}") for kind in kinds[:-1]] + [clip.output]
    stem, nodes, bounds, given = clip.node.name or clip.output, [], {}, clip.node.input[0]
    for kind, made in zip(kinds, values, strict=True):
        inputs = [given]
        if kind != "Relu":
            bound = dict(_both(clip))[kind]
            bounds[kind] = surgery.add(f"{stem}.{'lower' if kind == 'Max' else 'upper'}", torch.full(shape, bound, dtype=dtype))
            inputs.append(bounds[kind])
        nodes.append(_node(kind, inputs, [made], clip.node.name if kind == kinds[-1] else f"{stem}/{kind}"))
        given = made
    surgery.swap(clip.node, nodes)
    was = type(clip.node).FromString(clip.node.SerializeToString())
    return Freed(Bounded(was, clip.low, clip.high), values[0], bounds)


def _limit(surgery: Surgery, part: Freed, largest: Tensor) -> None:
    """Put a Clip up to the largest bound in the place of the Relu in front of a Min."""
    relu = surgery.makers[part.first]
    clip = _clip(surgery, part.was, 0.0, largest.item(), largest.dtype)
    clip.name, clip.output[0] = f"{relu.name.removesuffix('/Relu')}/Clip", part.first
    surgery.swap(relu, [clip])


def _chain(part: Freed) -> list[str]:
    """What the nodes in the place of a Clip make."""
    return [part.first] if part.first == part.was.output else [part.first, part.was.output]


def _both(clip: Bounded) -> tuple[tuple[str, float], tuple[str, float]]:
    return ("Max", clip.low), ("Min", clip.high)


def _clip(surgery: Surgery, was: Bounded, low: float, high: float, dtype: torch.dtype) -> Any:
    """A Clip with other bounds."""
    if surgery.file.opsets.get("", 1) < 11:
        bounds = {key: bound for key, bound in (("min", low), ("max", high)) if math.isfinite(bound)}
        return _node("Clip", list(was.node.input[:1]), [was.output], was.node.name, **bounds)
    stem = was.node.name or was.output
    names = [
        surgery.add(f"{stem}.{key}", torch.tensor(bound, dtype=dtype)) if math.isfinite(bound) else ""
        for key, bound in (("min", low), ("max", high))
    ]
    return _node("Clip", [was.node.input[0], *names], [was.output], was.node.name)


def _node(kind: str, inputs: list[str], outputs: list[str], name: str, **settings: float) -> Any:
    return library("onnx.helper").make_node(kind, inputs, outputs, name=name or None, **settings)


def _known(surgery: Surgery, name: str) -> Tensor:
    found = surgery.numbers(name)
    assert found is not None
    return found


def _bounds(surgery: Surgery, node: Any) -> tuple[float, float] | None:
    """Both numbers; None where they are not known."""
    given: dict[str, float] = {attribute.name: attribute.f for attribute in node.attribute}
    for key, name in zip(("min", "max"), node.input[1:], strict=False):
        if name:
            numbers = surgery.numbers(name)
            if numbers is None or numbers.numel() != 1:
                return None
            given[key] = float(numbers)
    low, high = given.get("min", -math.inf), given.get("max", math.inf)
    return (-math.inf if low <= -LARGEST else low), (math.inf if high >= LARGEST else high)
