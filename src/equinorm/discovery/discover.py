"""From a model to its scalings: export it for every call and mode, run the graphs on labels, resolve these."""

import time
from dataclasses import dataclass
from typing import Any

from equinorm._scaling import Cast, Family, Pin, Reason, Scaling
from equinorm.discovery.casts import casts
from equinorm.discovery.graph.export import Exported, Graphs
from equinorm.discovery.inner_values import InnerValues, Solution
from equinorm.discovery.interpreter import Interpreter, fingerprint
from equinorm.discovery.operation import flat
from equinorm.discovery.record_values import recorded
from equinorm.discovery.resolve import families, resolve
from equinorm.discovery.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """What was found; see `Symmetries`, which has the same attributes."""

    num_free: int
    scalings: tuple[Scaling, ...]
    families: tuple[Family, ...]
    pins: tuple[Pin, ...]
    seconds: tuple[float, float]
    fingerprint: str
    backward: tuple[str, ...]
    casts: tuple[Cast, ...]
    values: InnerValues


def discover(read: Graphs, batch_norm: str, *, signs: bool = False) -> Discovery:
    """Find what holds for all calls in all modes.

    Args:
        read: the network's graphs.
        batch_norm: how batch normalization is read, "affine", "evaluation" or "statistics".
        signs: find flips of sign, where integer exponents count by whether they are odd.

    Raises:
        ExportError: if the model cannot be exported.
    """
    started, exporting = time.perf_counter(), 0.0
    trace = Trace(batch_norm=batch_norm, signs=signs)
    graphs: list[Exported] = []
    interpreters: list[Interpreter] = []
    outputs: list[Any] = []
    backward: dict[str, None] = {}
    for call in read:
        exported, exporting = call.exported, exporting + call.seconds
        backward |= call.backward
        graphs.append(exported)
        interpreters.append(Interpreter(exported.aliases, trace, exported.unsteady))
        outputs.append(interpreters[-1].propagate(exported.inputs)[0])
    trace.reason = Reason("model output")
    for value in flat(outputs):
        trace.pin(value)
    trace.settle()
    trace.reason = Reason("storage")
    for exported in graphs:
        for source, why in exported.held.items():
            trace.pin(source, why)
    sources = list(graphs[0].sources)
    scalings, roots = resolve(sources, trace.classes)
    own = interpreters[read.own]
    found, pins = families(sources, scalings, trace.classes, roots)
    return Discovery(
        num_free=len(roots),
        scalings=scalings,
        families=found,
        pins=pins,
        seconds=(exporting, time.perf_counter() - started - exporting),
        fingerprint="+".join(fingerprint(exported.aliases.graph, exported.inputs) for exported in graphs),
        backward=tuple(backward),
        casts=casts(trace, scalings, roots),
        values=recorded(own, trace, Solution(trace.classes, roots)),
    )
