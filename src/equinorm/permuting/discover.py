"""From a model to its families of channels: export it for every call and mode, run the graphs on axes, read what is free."""

import itertools
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from equinorm._scaling import Reason
from equinorm.discovery.graph.export import Exported, Graphs
from equinorm.discovery.left_out import LEFT_OUT, left_out
from equinorm.discovery.resolve import UNUSED
from equinorm.discovery.values import Constant, Source
from equinorm.permuting.atoms import Axis, fresh, pin
from equinorm.permuting.dependence import Dependence
from equinorm.permuting.interpreter import Interpreter
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.movement import pieces
from equinorm.permuting.own_orders import settle
from equinorm.permuting.trail import Trail
from equinorm.permuting.values import Laid, constant


@dataclass(frozen=True, slots=True, eq=False)
class AxisDiscovery:
    """Axes of every tensor of the model in parts, which atoms depend on places of which others, and its own graph, run."""

    sources: Mapping[Source, Tensor]
    axes: Mapping[Source, tuple[Axis, ...]]
    dependence: Dependence
    seconds: tuple[float, float]
    own: tuple[ExportedProgram, Interpreter]


def discover(graphs: Graphs) -> AxisDiscovery:
    """Find what holds for all calls in all modes.

    Args:
        graphs: the network's graphs.

    Raises:
        ExportError: if the model cannot be exported.
    """
    started, exporting = time.perf_counter(), 0.0
    book = LawBook()
    exports: list[Exported] = []
    interpreters: list[Interpreter] = []
    laid: dict[Source, Laid] = {}
    for call in graphs:
        exported, exporting = call.exported, exporting + call.seconds
        exports.append(exported)
        if not laid:
            stored = {*graphs.model.state_dict(keep_vars=True)}
            laid = {source: _laid(source, stored) for source in exported.sources}
        entering = {name: _entering(value, laid) for name, (value, _) in exported.inputs.items()}
        weights = (name for name, (value, _) in exported.inputs.items() if getattr(value, "kind", None) == "parameter")
        interpreters.append(Interpreter(exported.aliases, book, exported.unsteady, Trail(frozenset(weights))))
        outputs = interpreters[-1].propagate(entering)
        book.reason = Reason("model output")
        book.pin(outputs)
    used = {value for exported in exports for value in _used(exported)}
    for source in laid.keys() - used:
        pin(laid[source].axes, UNUSED)
    book.reason = LEFT_OUT
    _pin_left_out(book, laid, left_out(zip(exports, (part.constant for part in interpreters), strict=True)))
    book.reason = Reason("storage")
    for exported in exports:
        for source, why in exported.held.items():
            pin(laid[source].axes, book.because(why))
    book.spaces += [value.axes for value in laid.values()]
    axes = {source: value.axes for source, value in laid.items()}
    dependence = Dependence(book.spaces)
    settle(book.own_orders, dependence, [axis for own in axes.values() for axis in own])
    seconds = exporting, time.perf_counter() - started - exporting
    return AxisDiscovery(exports[0].sources, axes, dependence, seconds, (exports[graphs.own].program, interpreters[graphs.own]))


def _pin_left_out(book: LawBook, laid: Mapping[Source, Laid], masks_of: Mapping[Source, Sequence[Tensor]]) -> None:
    """Entries that no operation reads stay where they are; the masks tell them, along each axis of a tensor."""
    for source, masks in masks_of.items():
        for axis, mask in enumerate(masks):
            runs = [(holds, len([*places])) for holds, places in itertools.groupby(mask.tolist())]
            parts = pieces(book, laid[source], axis, [length for _, length in runs]) if bool(mask.any()) else []
            pin([book.whole(part).axes[axis] for part, (holds, _) in zip(parts, runs, strict=False) if holds], LEFT_OUT)


def _used(exported: Exported) -> set[Source]:
    """Tensors of the model that some operation reads."""
    names = {node.name for node in exported.aliases.graph.graph.nodes if node.op == "placeholder" and node.users}
    return {value for name, (value, _) in exported.inputs.items() if name in names and isinstance(value, Source)}


def _laid(source: Source, stored: Set[str]) -> Laid:
    """A tensor of the model before anything is known of it. What no checkpoint holds is the code's, and stays."""
    reason = None
    if source.kind == "buffer" and not set(source.names) & stored:
        reason = Reason("model buffer", "made by the model's code, not stored with its weights")
    return Laid(tuple(fresh(size, reason) for size in source.shape))


def _entering(value: Any, laid: Mapping[Source, Laid]) -> Any:
    """A placeholder's value."""
    if isinstance(value, Source):
        return laid[value]
    if isinstance(value, Constant):
        return constant(value.value, Reason("a constant", "varies along the axis"))
    if hasattr(value, "shape"):
        return Laid(tuple(fresh(int(size), Reason("model input")) for size in value.shape))
    return value
