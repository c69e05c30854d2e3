"""From a model to a graph: `torch.export`, the identity of its tensors, and what else may read them."""

import contextlib
import io
import logging
import operator
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from equinorm._errors import ExportError
from equinorm._modules import by_default, without_cache
from equinorm.discovery.graph.addresses import overlapping, overlaps_itself, touched
from equinorm.discovery.graph.aliasing import (
    has_hidden_aliases,
    has_writing_subgraph,
    memory_of,
    mend_users,
    remove_idle_dropouts,
    roots,
    visibly_written,
    written,
)
from equinorm.discovery.graph.failures import failure
from equinorm.discovery.graph.opaque import opaque as opaque_calls
from equinorm.discovery.graph.side_effects import LIBRARY, observed_hooks, run_once, unchanged_attributes
from equinorm.discovery.labels import Label
from equinorm.discovery.values import Constant, Origin, Source, Value

OVERLAPS = "overlaps another tensor of the model"
ATTRIBUTE = "a plain attribute of the model shares its memory"

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of tensors that can be rescaled."""


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A model's graph and what enters it.

    Attributes:
        graph: operations; what they change in place, only their results read.
        unsteady: roots of memory for which that does not hold; nothing in it may scale.
        inputs: value and origin of every placeholder by its name.
        sources: every parameter and floating-point buffer with the model's own tensor.
        held: sources that nothing may rescale, and why.
    """

    graph: fx.GraphModule
    unsteady: frozenset[fx.Node]
    inputs: Mapping[str, tuple[Value, Origin]]
    sources: Mapping[Source, Tensor]
    held: Mapping[Source, str]


def export(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    known: Mapping[Source, Tensor] | None = None,
    opaque: Mapping[str, nn.Module] | None = None,
) -> Exported:
    """Export a model and identify its tensors by their memory, so that tied ones count once.

    Args:
        model: in the mode of interest.
        args: positional inputs.
        kwargs: keyword inputs.
        known: sources of an export of this model in the other mode, to be used again.
        opaque: submodules that are not looked into, by name.

    Raises:
        ExportError: if `torch.export` cannot handle the model with these inputs.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ExportError(
            "the model is wrapped by FullyShardedDataParallel, which makes its weights parts of flat parameters that the "
            "exporter would overwrite. Analyse and balance it before it is wrapped."
        )
    kwargs = without_cache(model, args, dict(kwargs or {}))
    program, leaves = _program(model, args, kwargs, opaque or {})
    graph = program.graph_module
    mend_users(graph)
    remove_idle_dropouts(graph)
    specs = program.graph_signature.input_specs
    changing = _changing(graph)
    fixed = {spec.arg.name for spec in specs if spec.kind == InputKind.CONSTANT_TENSOR} - changing
    unsteady = visibly_written(graph, fixed)
    if (unsteady or has_writing_subgraph(graph)) and not has_hidden_aliases(graph):  # it would lose writes through those
        with contextlib.suppress(Exception):  # it fails on an embedding's max_norm: then what is changed in place stays pinned
            program = program.run_decompositions({})
            graph, unsteady = program.graph_module, set()
            mend_users(graph)
    graph.graph.eliminate_dead_code(_acts)
    changing |= _changing(graph) | set(program.graph_signature.buffers_to_mutate.values())
    sources, held = _sources(model, known, leaves)
    by_name = {name: source for source in sources for name in source.names}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    traced = {node.name: node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"}
    owners = {memory_of(traced[s.arg.name]): by_name[s.target] for s in specs if s.target in by_name and s.arg.name in traced}
    attributes = {memory_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    inputs: dict[str, tuple[Value, Origin]] = {}
    for spec in program.graph_signature.input_specs:
        name, target, origin = spec.arg.name, spec.target or "", Origin(parameters=frozenset())
        value: Any = buffers.get(target, program.constants.get(target))
        if spec.kind == InputKind.USER_INPUT:
            shape = getattr(traced[name], "shape", None)
            value = traced[name] if shape is None else Label(tuple(int(size) for size in shape))
            origin = Origin()
        elif target in by_name:
            value = by_name[target]
            origin = Origin(parameters=frozenset([value])) if value.kind == "parameter" else origin
        elif isinstance(value, Tensor):
            owner = owners.get(memory_of(traced[name]))
            if owner is not None:  # a plain attribute that shares the memory of a parameter
                held.setdefault(owner, OVERLAPS)
            is_setting = value.is_floating_point() and memory_of(value) in attributes  # its numbers may be set anew
            is_unknown = value.is_meta or value.layout != torch.strided or is_setting
            if owner is not None or is_unknown or {name, target} & changing:
                value = Label(tuple(value.shape))
            else:  # integer buffers and constants: copied, because looking at the graph computes with them
                value = Constant(value.detach().clone())
        inputs[name] = (value, origin)
    return Exported(graph, frozenset(unsteady), inputs, sources, held)


def _acts(node: fx.Node) -> bool:
    """Does an operation matter even if nothing uses its result?"""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable or node.target.namespace == LIBRARY.ns
    return node.target is not operator.getitem


def _changing(graph: fx.GraphModule) -> set[str]:
    """Names of the placeholders whose memory some operation writes."""
    found = roots(graph)
    return {found[target].name for node in found for target in written(node)}


def _program(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], hidden: Mapping[str, nn.Module]
) -> tuple[torch.export.ExportedProgram, list[Any]]:
    """The exported model, and what its plain attributes hold."""
    try:
        with (
            _without_dumps(),
            _attributes_unchecked(),
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


def _sources(
    model: nn.Module, known: Mapping[Source, Tensor] | None, leaves: Sequence[Any]
) -> tuple[dict[Source, Tensor], dict[Source, str]]:
    """Every parameter and floating-point buffer, tied ones once, by their memory; and those that cannot move, and why.

    Args:
        model: the model.
        known: sources to be used again.
        leaves: what its plain attributes hold: numbers of these may be read where no graph shows it.
    """
    found: dict[tuple, tuple[list[str], str, Tensor]] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for kind, tensors in (("parameter", parameters), ("buffer", buffers)):
        for name, tensor in tensors:
            if kind == "parameter" or tensor.is_floating_point():
                found.setdefault(_memory(tensor), ([], kind, tensor))[0].append(name)
    by_names = {source.names: source for source in known or ()}
    sources = {by_names.get(tuple(n)) or Source(tuple(n), tuple(t.shape), kind, t.dtype): t for n, kind, t in found.values()}
    held = {source: _why_held(tensor) for source, tensor in sources.items() if _why_held(tensor)}
    held |= dict.fromkeys(overlapping(sources), OVERLAPS) | dict.fromkeys(touched(sources, leaves), ATTRIBUTE)
    return sources, held


def _why_held(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}: only dense tensors are rescaled"
    if tensor.is_complex():
        return "complex weights are not rescaled"
    if tensor.dtype not in FLOATS:
        return f"its dtype is {tensor.dtype}: only floating-point weights of 16 bits and more are rescaled"
    return "its entries share memory" if overlaps_itself(tensor) else ""


def _memory(tensor: Tensor) -> tuple:
    if tensor.layout != torch.strided:
        return (id(tensor),)
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
