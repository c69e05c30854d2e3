"""From a model to its scalings: export it for every call and mode, run the graphs on labels, resolve these."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from equinorm._scaling import Cast, Family, Pin, Reason, Scaling
from equinorm.discovery.casts import casts
from equinorm.discovery.classes import Classes
from equinorm.discovery.graph.export import Exported, Graphs
from equinorm.discovery.inner_values import InnerValues, SolvedClasses
from equinorm.discovery.interpreter import Interpreter, fingerprint
from equinorm.discovery.left_out import LEFT_OUT, left_out
from equinorm.discovery.operation import flat
from equinorm.discovery.record_values import recorded
from equinorm.discovery.resolve import families, introduced, resolve
from equinorm.discovery.sign_classes import SignClasses
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import Source, source_of


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


def discover(graphs: Graphs, batch_norm: str, *, signs: bool = False, inner: bool = True) -> Discovery:
    """Find what holds for all calls in all modes.

    Args:
        graphs: the network's graphs.
        batch_norm: how batch normalization is read, "affine", "evaluation" or "statistics".
        signs: find flips of sign, where integer exponents count by whether they are odd.
        inner: record the values inside too. If not, graphs and labels are dropped before what replaces them is made.

    Raises:
        ExportError: if the model cannot be exported.
    """
    started = time.perf_counter()
    trace = Trace(SignClasses() if signs else Classes(), batch_norm=batch_norm, signs=signs)
    laws = _laws(graphs, trace, inner)
    drop: set[Source] = set()
    if laws.own is None:
        graphs.forget()
        drop = {*laws.sources} - {source_of(value) for value, *_ in trace.casts}
    if not signs:
        trace.classes.simplify()
    owner, pins = introduced(laws.sources, trace.classes)
    scalings, roots = resolve(laws.sources, trace.classes, drop)
    solved = SolvedClasses(trace.classes, roots)
    return Discovery(
        num_free=len(roots),
        scalings=scalings,
        families=families(owner, scalings, trace.classes, roots),
        pins=pins,
        seconds=(laws.seconds, time.perf_counter() - started - laws.seconds),
        fingerprint=laws.fingerprint,
        backward=laws.backward,
        casts=casts(trace, scalings, roots),
        values=InnerValues(()) if laws.own is None else recorded(laws.own, trace, solved),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Laws:
    """What is left of graphs whose laws are gathered.

    Attributes:
        sources: every parameter and floating-point buffer.
        fingerprint: of all graphs.
        seconds: that exporting took.
        backward: names of the model's own autograd functions that were called.
        own: has run the graph whose values are recorded, if they are.
    """

    sources: Sequence[Source]
    fingerprint: str
    seconds: float
    backward: tuple[str, ...]
    own: Interpreter | None


def _laws(graphs: Graphs, trace: Trace, inner: bool) -> _Laws:
    """Run all graphs on labels."""
    seconds = 0.0
    exports: list[Exported] = []
    interpreters: list[Interpreter] = []
    outputs: list[Any] = []
    backward: dict[str, None] = {}
    for call in graphs:
        exported, seconds = call.exported, seconds + call.seconds
        backward |= call.backward
        exports.append(exported)
        interpreters.append(Interpreter(exported.aliases, trace, exported.unsteady))
        outputs.append(interpreters[-1].propagate(exported.inputs)[0])
    trace.reason = Reason("model output")
    for value in flat(outputs):
        trace.pin(value)
    trace.settle()
    trace.reason = LEFT_OUT
    runs = zip(exports, (interpreter.constant for interpreter in interpreters), strict=True)
    for source, masks in left_out(runs).items():  # what is not read can only scale as all that is
        if source.label is not None:
            trace.merge(source, [axis for axis, mask in enumerate(masks) if bool(mask.any())])
    trace.reason = Reason("storage")
    for exported in exports:
        for source, why in exported.held.items():
            trace.pin(source, why)
    hashed = "+".join(fingerprint(exported.aliases.graph, exported.inputs) for exported in exports)
    return _Laws([*exports[0].sources], hashed, seconds, (*backward,), interpreters[graphs.own] if inner else None)
