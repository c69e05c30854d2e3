"""From a model to a graph: `torch.export`, the identity of its tensors, and what else may read them."""

import contextlib
import gc
import io
import itertools
import logging
import operator
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from equinorm._errors import ExportError
from equinorm._memory import is_sharded
from equinorm.discovery.graph.aliasing import (
    GraphAliases,
    has_hidden_aliases,
    has_writing_subgraph,
    mend_users,
    remove_idle_dropouts,
)
from equinorm.discovery.graph.failures import failure
from equinorm.discovery.graph.opaque import opaque as opaque_calls
from equinorm.discovery.graph.side_effects import LIBRARY, observed_hooks, run_once, unchanged_attributes
from equinorm.discovery.graph.sources import ModelTensors
from equinorm.discovery.values import Origin, Source, Value
from equinorm.modules.running import by_default, in_mode, own_backward, without_cache
from equinorm.sharding.modules import without_composed_hooks


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A model's graph and what enters it.

    Attributes:
        aliases: the graph, and what its values share; what operations change in place, only their results read.
        unsteady: roots of memory for which that does not hold; nothing in it may scale.
        inputs: value and origin of every placeholder by its name.
        sources: every parameter and floating-point buffer with the model's own tensor.
        held: sources that nothing may rescale, and why.
        program: whose graph it is.
    """

    aliases: GraphAliases
    unsteady: frozenset[fx.Node]
    inputs: Mapping[str, tuple[Value, Origin]]
    sources: Mapping[Source, Tensor]
    held: Mapping[Source, str]
    program: torch.export.ExportedProgram


@dataclass(frozen=True, slots=True, eq=False)
class ExportedCall:
    """An export of one call in one mode.

    Attributes:
        exported: the graph.
        seconds: that it took; 0 if it was kept from an earlier reading.
        backward: names of the model's own autograd functions that were called.
    """

    exported: Exported
    seconds: float
    backward: Mapping[str, None]


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    """A graph as the exporter left it, its memory steadied, and what plain attributes of the model held."""

    program: torch.export.ExportedProgram
    aliases: GraphAliases
    unsteady: frozenset[fx.Node]
    changing: set[str]
    leaves: Sequence[Any]

    def read(self, model: nn.Module, known: Mapping[Source, Tensor] | None) -> Exported:
        """What enters the graph, tensors of the model identified by their memory, so that tied ones count once."""
        tensors = ModelTensors(model, known, self.leaves)
        inputs = tensors.entering(self.program, self.changing)
        return Exported(self.aliases, self.unsteady, inputs, tensors.sources, tensors.held, self.program)


class Graphs:
    """The graphs of a model for every call in every mode: exported when they are first read, kept for further readings.

    Whoever reads them writes on what enters them, never on the graphs: each reading has sources and constants of its own.

    Args:
        model: the network.
        calls: positional and keyword inputs of each.
        modes: training (True), evaluation (False), or as the model is (None).
        opaque: submodules that are not looked into, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[tuple[Any, Mapping[str, Any] | None]],
        modes: Sequence[bool | None],
        opaque: Mapping[str, nn.Module],
    ) -> None:
        self.model, self.calls, self.modes, self.opaque = model, calls, modes, opaque
        self._kept: dict[int, tuple[_Recorded, Mapping[str, None]]] = {}

    def __iter__(self) -> Iterator[ExportedCall]:
        """Every call in every mode; all identify the model's tensors by the sources of the first.

        Raises:
            ExportError: if the model cannot be exported.
        """
        known: Mapping[Source, Tensor] | None = None
        for number, (training, (args, kwargs)) in enumerate(itertools.product(self.modes, self.calls)):
            entered, is_kept = time.perf_counter(), number in self._kept
            if not is_kept:
                with in_mode(self.model, training), own_backward() as called:
                    inputs = (args,) if isinstance(args, Tensor) else tuple(args)
                    self._kept[number] = _record(self.model, inputs, kwargs, self.opaque), called
            recorded, called = self._kept[number]
            exported = recorded.read(self.model, known)
            known = exported.sources if known is None else known
            yield ExportedCall(exported, 0.0 if is_kept else time.perf_counter() - entered, called)

    def forget(self) -> None:
        """Drop the graphs; a further reading would export them again."""
        self._kept.clear()
        gc.collect()  # graphs refer to themselves

    @property
    def own(self) -> int:
        """Number of the graph of the first call in the model's own mode, or else in the first."""
        return next((i for i, mode in enumerate(self.modes) if mode in (None, self.model.training)), 0) * len(self.calls)


def _record(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, opaque: Mapping[str, nn.Module]) -> _Recorded:
    """Export a model, in the mode that it is in."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ExportError(
            "the model is wrapped by FullyShardedDataParallel, which makes its weights parts of flat parameters that the "
            "exporter would overwrite. Analyse and balance it before it is wrapped."
        )
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if sharded:
        raise ExportError(
            f"{sharded} is sharded over processes (fully_shard, tensor parallelism), and none holds whole channels. "
            "Analyse and balance the model before it is sharded."
        )
    kwargs = without_cache(model, args, dict(kwargs or {}))
    program, leaves = _program(model, args, kwargs, opaque)
    program, aliases, unsteady, changing = _steadied(program)
    program.graph_module.graph.eliminate_dead_code(_acts)
    return _Recorded(program, aliases, unsteady, changing, leaves)


def _steadied(
    program: torch.export.ExportedProgram,
) -> tuple[torch.export.ExportedProgram, GraphAliases, frozenset[fx.Node], set[str]]:
    """A program whose memory no operation reads after another has changed it, but for that one's result; if it can be had.

    Returns the program, what its values share, the roots of memory for which that does not hold, and the names of placeholders
    and buffers that change.
    """
    mend_users(program.graph_module)
    remove_idle_dropouts(program.graph_module)
    aliases = GraphAliases(program.graph_module)
    changing = aliases.written_inputs()
    specs = program.graph_signature.input_specs
    unsteady = aliases.visibly_written({s.arg.name for s in specs if s.kind == InputKind.CONSTANT_TENSOR} - changing)
    is_in_place = bool(unsteady) or has_writing_subgraph(program.graph_module)
    if is_in_place and not has_hidden_aliases(program.graph_module):  # decomposing would lose writes through those
        with contextlib.suppress(Exception):  # it fails on an embedding's max_norm: then what is changed in place stays pinned
            program, unsteady = program.run_decompositions({}), frozenset[fx.Node]()
    if program.graph_module is not aliases.graph:
        mend_users(program.graph_module)
        aliases = GraphAliases(program.graph_module)
        changing |= aliases.written_inputs()
    return program, aliases, unsteady, changing | set(program.graph_signature.buffers_to_mutate.values())


def _acts(node: fx.Node) -> bool:
    """Does an operation matter even if nothing uses its result?"""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable or node.target.namespace == LIBRARY.ns
    return node.target is not operator.getitem


def _program(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], hidden: Mapping[str, nn.Module]
) -> tuple[torch.export.ExportedProgram, list[Any]]:
    """The exported model, and what its plain attributes hold."""
    try:
        with (
            _without_dumps(),
            _attributes_unchecked(),
            without_composed_hooks(model),
            unchanged_attributes(model) as attributes,
            opaque_calls(model, hidden, args, kwargs),
            observed_hooks(model, attributes.kept),
            by_default(),
        ):
            return torch.export.export(model, args, kwargs, strict=False), attributes.leaves
    except ExportError:
        raise
    except Exception as error:
        eager = run_once(model, args, kwargs)
        raise failure(model, args, kwargs, error, eager) from eager  # the exporter's traceback has hundreds of lines


@contextlib.contextmanager
def _attributes_unchecked() -> Iterator[None]:
    """Spare the exporter its own copy of all attributes: where they are large it costs seconds. They are put back anyway."""
    from torch.export import _trace as place  # importing it takes a second

    name = "_detect_attribute_assignment"
    if (check := getattr(place, name, None)) is None:
        yield
        return
    setattr(place, name, lambda *_: contextlib.nullcontext())
    try:
        yield
    finally:
        setattr(place, name, check)


@contextlib.contextmanager
def _without_dumps() -> Iterator[None]:
    """Keep the exporter from writing whole graphs to stderr where it fails, unless TORCH_LOGS asks for them."""
    if "TORCH_LOGS" in os.environ:
        yield
        return
    before, text = logging.root.manager.disable, io.StringIO()
    logging.disable(max(before, logging.ERROR))
    try:
        with contextlib.redirect_stderr(text):
            yield
        sys.stderr.write(text.getvalue())
    finally:
        logging.disable(before)
