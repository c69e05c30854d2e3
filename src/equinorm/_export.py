"""From a model to a graph: `torch.export`, the identity of its tensors, and what else may read them."""

import contextlib
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from equinorm._errors import ExportError
from equinorm._interpret import Origin, fill_value
from equinorm._labels import Label
from equinorm._trace import Constant, Source, Value


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A model's graph and what enters it.

    Attributes:
        graph: operations without visible mutation.
        inputs: value and origin of every placeholder by its name.
        sources: every parameter and floating-point buffer with the model's own tensor.
        overlapping: sources whose memory partly overlaps another tensor of the model; nothing may rescale them.
    """

    graph: fx.GraphModule
    inputs: Mapping[str, tuple[Value, Origin]]
    sources: Mapping[Source, Tensor]
    overlapping: frozenset[Source]


def export(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> Exported:
    """Export a model and identify its tensors by their memory, so that tied ones count once.

    Raises:
        ExportError: if `torch.export` cannot handle the model with these inputs.
    """
    program = _program(model, args, dict(kwargs or {}))
    graph = program.graph_module
    if _has_visible_mutation(graph, program):
        program = program.run_decompositions({})
        graph = program.graph_module
    sources, overlapping = _sources(model)
    by_name = {name: source for source in sources for name in source.names}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    roots = _roots(graph)
    mutated = {roots[target].name for node in roots for target in _written(node)}
    mutated |= set(program.graph_signature.buffers_to_mutate.values())
    inputs: dict[str, tuple[Value, Origin]] = {}
    shapes = {node.name: node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        name, fixed = spec.arg.name, Origin(parameters=frozenset())
        if spec.kind == InputKind.USER_INPUT:
            shape = getattr(shapes[name], "shape", None)
            value: Any = shapes[name] if shape is None else Label(tuple(int(size) for size in shape))
            inputs[name] = (value, Origin())
        elif spec.target in by_name:
            source = by_name[spec.target]
            inputs[name] = (source, Origin(parameters=frozenset([source])) if source.kind == "parameter" else fixed)
        else:  # integers and constants: copied, because looking at the graph computes with them
            target = spec.target or ""
            tensor = buffers.get(target, program.constants.get(target))
            if isinstance(tensor, Tensor):
                changes = spec.kind == InputKind.BUFFER and (name in mutated or spec.target in mutated)
                value = Label(tuple(tensor.shape)) if changes or tensor.is_meta else Constant(tensor.detach().clone())
            else:
                value = tensor
            inputs[name] = (value, fixed)
    return Exported(graph, inputs, sources, overlapping)


def _program(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    training = {module: module.training for module in model.modules()}
    try:
        with _observed_hooks(model):
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise ExportError.of(model, args, kwargs, error) from error
    finally:
        for module, mode in training.items():
            module.training = mode


# What a user's hook reads must not scale. An operator without a rule pins whatever passes through it.
_library = torch.library.Library("equinorm", "DEF")
_library.define("observed(Tensor x) -> Tensor")
_library.impl("observed", lambda x: x.clone(), "CompositeExplicitAutograd")


@torch.library.register_fake("equinorm::observed", lib=_library)
def _observed_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _observe(values: Any) -> Any:
    def seen(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        return torch.ops.equinorm.observed(value) if is_float else value

    return pytree.tree_map(seen, values)


@contextlib.contextmanager
def _observed_hooks(model: nn.Module) -> Iterator[None]:
    """While exporting, mark what the model's own hooks can read."""
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
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_torch_own(hook: Any) -> bool:
    """Hooks of torch.nn.utils (weight norm, pruning) only prepare a module's own parameters."""
    return getattr(type(hook), "__module__", "").startswith("torch.nn.utils")


def _sources(model: nn.Module) -> tuple[dict[Source, Tensor], frozenset[Source]]:
    """Every parameter and floating-point buffer, tied ones once, by the memory that they occupy."""
    found: dict[tuple, tuple[list[str], str, Tensor]] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for kind, tensors in (("parameter", parameters), ("buffer", buffers)):
        for name, tensor in tensors:
            if kind == "parameter" or tensor.is_floating_point():
                found.setdefault(_memory(tensor), ([], kind, tensor))[0].append(name)
    sources = {Source(tuple(n), tuple(t.shape), kind, t.dtype): t for n, kind, t in found.values()}
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


# --------------------------------------------------------------------------------------------------------------- mutation

_SOMETIMES_ALIASES = (
    "dropout feature_dropout alpha_dropout feature_alpha_dropout type_as atleast_1d atleast_2d atleast_3d meshgrid"
)
"""Operations that may return their input itself although their schema does not say so."""


def _named(node: fx.Node) -> Iterator[tuple[torch.Argument, fx.Node]]:
    """Arguments of an operation that are graph nodes, with their entries in the schema."""
    if isinstance(node.target, torch._ops.OpOverload):
        for position, argument in enumerate(node.target._schema.arguments):
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                yield argument, value


def _written(node: fx.Node) -> list[fx.Node]:
    """Arguments that the operation changes in place."""
    return [value for argument, value in _named(node) if argument.alias_info is not None and argument.alias_info.is_write]


def _roots(graph: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The node that first owned the memory of each node."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        shared = [value for argument, value in _named(node) if argument.alias_info is not None]
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if node.target is operator.getitem or name in _SOMETIMES_ALIASES.split():
            shared = node.all_input_nodes
        roots[node] = roots[shared[0]] if shared else node
    return roots


def _has_visible_mutation(graph: fx.GraphModule, program: torch.export.ExportedProgram) -> bool:
    """Does any operation read memory that another has changed in place, other than through that one's result?"""
    if any(_written(node) for body in graph.children() if isinstance(body, fx.GraphModule) for node in body.graph.nodes):
        return True
    constants = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.CONSTANT_TENSOR}
    roots = _roots(graph)
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    aliases: dict[fx.Node, list[fx.Node]] = {}
    constant: set[fx.Node] = set()
    for node, root in roots.items():
        aliases.setdefault(root, []).append(node)
        known = all(argument in constant for argument in node.all_input_nodes) and node.op in ("call_function", "get_attr")
        if known or node.name in constants or fill_value(node) is not None:
            constant.add(node)
    for node in roots:
        for target in _written(node):
            earlier = [alias for alias in aliases[roots[target]] if order[alias] < order[node]]
            if node not in constant and any(order[user] > order[node] for alias in earlier for user in alias.users):
                return True
    return False
