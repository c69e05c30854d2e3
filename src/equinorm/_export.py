"""From a model to a graph: `torch.export`, the identity of its tensors, and what else may read them."""

import contextlib
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.node import has_side_effect
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from equinorm._errors import ExportError
from equinorm._interpret import Origin
from equinorm._labels import Label
from equinorm._mutation import has_hidden_aliases, has_writing_subgraph, memory_of, roots, visibly_written, written
from equinorm._values import Constant, Source, Value


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A model's graph and what enters it.

    Attributes:
        graph: operations; what they change in place, only their results read.
        unsteady: roots of memory for which that does not hold; nothing in it may scale.
        inputs: value and origin of every placeholder by its name.
        sources: every parameter and floating-point buffer with the model's own tensor.
        overlapping: sources whose memory is also that of another tensor of the model; nothing may rescale them.
    """

    graph: fx.GraphModule
    unsteady: frozenset[fx.Node]
    inputs: Mapping[str, tuple[Value, Origin]]
    sources: Mapping[Source, Tensor]
    overlapping: frozenset[Source]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside of torch.compile, DistributedDataParallel, DataParallel and AveragedModel."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # importing OptimizedModule takes seconds
            model = inner
        else:
            return model


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Put every module into training or evaluation mode, and back; None: leave them as they are."""
    before = [(module, module.training) for module in model.modules()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def export(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, known: Mapping[Source, Tensor] | None = None
) -> Exported:
    """Export a model and identify its tensors by their memory, so that tied ones count once.

    Args:
        model: in the mode of interest.
        args: positional inputs.
        kwargs: keyword inputs.
        known: sources of an export of this model in the other mode, to be used again.

    Raises:
        ExportError: if `torch.export` cannot handle the model with these inputs.
    """
    program = _program(model, args, dict(kwargs or {}))
    graph = program.graph_module
    specs = program.graph_signature.input_specs
    changing = _changing(graph)
    fixed = {spec.arg.name for spec in specs if spec.kind == InputKind.CONSTANT_TENSOR} - changing
    unsteady = visibly_written(graph, fixed)
    if (unsteady or has_writing_subgraph(graph)) and not has_hidden_aliases(graph):  # it would lose writes through those
        program = program.run_decompositions({})
        graph, unsteady = program.graph_module, set()
    graph.graph.eliminate_dead_code(_acts)
    changing |= _changing(graph) | set(program.graph_signature.buffers_to_mutate.values())
    sources, overlapping = _sources(model, known)
    by_name = {name: source for source in sources for name in source.names}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    traced = {node.name: node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"}
    owners = {memory_of(traced[s.arg.name]): by_name[s.target] for s in specs if s.target in by_name and s.arg.name in traced}
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
                overlapping |= {owner}
            if owner is not None or value.is_meta or {name, target} & changing:
                value = Label(tuple(value.shape))
            else:  # integer buffers and constants: copied, because looking at the graph computes with them
                value = Constant(value.detach().clone())
        inputs[name] = (value, origin)
    return Exported(graph, frozenset(unsteady), inputs, sources, overlapping)


def _acts(node: fx.Node) -> bool:
    """Does an operation matter even if nothing uses its result?"""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable or node.target is torch.ops.equinorm.observed.default
    return node.target is not operator.getitem


def _changing(graph: fx.GraphModule) -> set[str]:
    """Names of the placeholders whose memory some operation writes."""
    found = roots(graph)
    return {found[target].name for node in found for target in written(node)}


def _program(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    try:
        with _unchanged_attributes(model) as kept, _observed_hooks(model, kept):
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise ExportError.of(model, args, kwargs, error) from error


@contextlib.contextmanager
def _unchanged_attributes(model: nn.Module) -> Iterator[Callable[[], list[Tensor]]]:
    """Put back what a traced forward assigns to the model, and what it puts into lists and dicts there.

    Traced tensors would stay in them, and hooks that a model installs at its first call would be installed again. Yields a
    function that returns the tensors that the forward has left there so far.
    """
    held = {
        id(holder): (holder, list(holder.items()) if isinstance(holder, dict) else list(holder)) for holder in _holders(model)
    }
    known = {id(item) for holder, _ in held.values() for item in _items(holder)}
    recomputed = [
        (vars(module), name)
        for module in model.modules()
        for name in vars(module)
        if f"{name}_v" in module._parameters or f"{name}_orig" in module._parameters
    ]  # by torch.nn.utils before every call

    def kept() -> list[Tensor]:
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        own |= {id(attributes.get(name)) for attributes, name in recomputed}
        found = {id(item): item for holder in _holders(model) for item in _items(holder) if isinstance(item, Tensor)}
        return [tensor for number, tensor in found.items() if number not in known and number not in own]

    try:
        yield kept
    finally:
        for holder, content in held.values():
            holder.clear()
            (holder.update if isinstance(holder, (dict, set)) else holder.extend)(content)


_DEPTH = 4
"""How far below a module's attributes its containers are followed."""


def _items(holder: Any) -> Iterator[Any]:
    """What it holds; what tuples hold by itself."""
    for item in list(holder.values() if isinstance(holder, dict) else holder):
        if isinstance(item, tuple):
            yield from _items(item)
        else:
            yield item


def _holders(model: nn.Module) -> list[Any]:
    """Everything in which a forward can leave values: attributes of modules, containers and plain objects in them."""
    found: dict[int, Any] = {}

    def follow(value: Any, depth: int) -> None:
        if isinstance(value, (nn.Module, Tensor, type, str)) or callable(value) or depth > _DEPTH or id(value) in found:
            return
        if not isinstance(value, (dict, list, set, deque)):
            value = getattr(value, "__dict__", None)
            if not isinstance(value, dict) or id(value) in found:
                return
        found[id(value)] = value
        for item in _items(value):
            follow(item, depth + 1)

    for module in model.modules():
        follow(vars(module), 0)
    return list(found.values())


# What a user's hook reads must not scale. An operator without a rule pins whatever passes through it.
_library = torch.library.Library("equinorm", "DEF")
_library.define("observed(Tensor x) -> Tensor")
_library.impl("observed", lambda x: x.clone(), "CompositeExplicitAutograd")


@torch.library.register_fake("equinorm::observed", lib=_library)
def _observed_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


has_side_effect(torch.ops.equinorm.observed.default)  # decompositions would drop it where nothing uses its result


def _observe(values: Any) -> Any:
    def seen(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        return torch.ops.equinorm.observed(value) if is_float else value

    return pytree.tree_map(seen, values)


@contextlib.contextmanager
def _observed_hooks(model: nn.Module, kept: Callable[[], list[Tensor]]) -> Iterator[None]:
    """While exporting, mark what the model's own hooks can read, and what its forward keeps for later calls."""
    handles = []
    for module in model.modules():
        before = [hook for hook in module._forward_pre_hooks.values() if not _is_torch_own(hook)]
        after = [hook for hook in module._forward_hooks.values() if not _is_torch_own(hook)]
        after += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if before or after:
            handles.append(
                module.register_forward_pre_hook(lambda _, a, k: (_observe(a), _observe(k)), prepend=True, with_kwargs=True)
            )
        if after:
            handles.append(module.register_forward_hook(lambda _, a, output: _observe(output), prepend=True))

    def observe_kept(*_: Any) -> None:
        _observe(kept())

    handles.append(model.register_forward_hook(observe_kept))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_torch_own(hook: Any) -> bool:
    """Hooks of torch.nn.utils (weight norm, pruning) only prepare a module's own parameters."""
    return getattr(type(hook), "__module__", "").startswith("torch.nn.utils")


def _sources(model: nn.Module, known: Mapping[Source, Tensor] | None) -> tuple[dict[Source, Tensor], frozenset[Source]]:
    """Every parameter and floating-point buffer, tied ones once, by the memory that they occupy."""
    found: dict[tuple, tuple[list[str], str, Tensor]] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for kind, tensors in (("parameter", parameters), ("buffer", buffers)):
        for name, tensor in tensors:
            if kind == "parameter" or tensor.is_floating_point():
                found.setdefault(_memory(tensor), ([], kind, tensor))[0].append(name)
    by_names = {source.names: source for source in known or ()}
    sources = {by_names.get(tuple(n)) or Source(tuple(n), tuple(t.shape), kind, t.dtype): t for n, kind, t in found.values()}
    storages: dict[int, list[Source]] = {}
    for source, tensor in sources.items():
        storages.setdefault(tensor.untyped_storage()._cdata, []).append(source)
    shared = [group for group in storages.values() if len(group) > 1]
    return sources, frozenset(source for group in shared for source in group if _overlaps(source, group, sources))


def _memory(tensor: Tensor) -> tuple:
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())


def _overlaps(source: Source, group: list[Source], tensors: Mapping[Source, Tensor]) -> bool:
    def extent(tensor: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return int(tensor.storage_offset()), int(tensor.storage_offset() + last)

    first, last = extent(tensors[source])
    others = [extent(tensors[other]) for other in group if other is not source]
    return any(start <= last and first <= end for start, end in others)
