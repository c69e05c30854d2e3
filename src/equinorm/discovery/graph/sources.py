"""What identifies a model's tensors, in the model and where they enter its graph, and which of them cannot be rescaled."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, InputSpec

from equinorm._memory import is_wrapped, place_of
from equinorm._scaling import HALVES
from equinorm.discovery.graph.addresses import overlapping, overlaps_itself, touched
from equinorm.discovery.graph.aliasing import memory_of
from equinorm.discovery.labels import Label
from equinorm.discovery.values import Constant, Origin, Source, Value

OVERLAPS = "overlaps another tensor of the model"
ATTRIBUTE = "a plain attribute of the model shares its memory"

FLOATS = (*HALVES, torch.float32, torch.float64)
"""Dtypes of tensors that can be rescaled."""


class ModelTensors:
    """Every parameter and floating-point buffer of a model, tied ones once.

    Attributes:
        sources: each, with the model's own tensor.
        held: those that nothing may rescale, and why.

    Args:
        model: the model.
        known: sources to be used again.
        leaves: what its plain attributes hold: numbers of these may be read where no graph shows it.
    """

    def __init__(self, model: nn.Module, known: Mapping[Source, Tensor] | None, leaves: Sequence[Any]) -> None:
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        self._settings = {memory_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}  # their numbers may be set anew
        self.sources = _sources(model, known)
        self.held = {source: why for source, tensor in self.sources.items() if (why := _why_held(tensor))}
        self.held |= dict.fromkeys(overlapping(self.sources), OVERLAPS)
        self.held |= dict.fromkeys(touched(self.sources, leaves), ATTRIBUTE)

    def entering(self, program: torch.export.ExportedProgram, changing: Set[str]) -> dict[str, tuple[Value, Origin]]:
        """Value and origin of every placeholder by its name; holds the sources that enter as plain attributes too.

        Args:
            program: the exported model.
            changing: names of placeholders, and of buffers, whose memory operations change.
        """
        by_name = {name: source for source in self.sources for name in source.names}
        traced = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        specs = program.graph_signature.input_specs
        named = [(spec.arg.name, by_name[spec.target]) for spec in specs if spec.target in by_name]
        owners = {memory_of(traced[name]): source for name, source in named if name in traced}
        inputs: dict[str, tuple[Any, Origin]] = {}
        for spec in specs:
            name, source = spec.arg.name, by_name.get(spec.target or "")
            if spec.kind == InputKind.USER_INPUT:
                shape = getattr(traced[name], "shape", None)
                value = traced[name] if shape is None else Label(tuple(int(size) for size in shape))
                inputs[name] = value, Origin()
            elif source is not None:
                inputs[name] = source, Origin(parameters=frozenset([source] if source.kind == "parameter" else []))
            else:
                value = self._buffers.get(spec.target or "", program.constants.get(spec.target or ""))
                if isinstance(value, Tensor):
                    value = self._other(value, spec, owners.get(memory_of(traced[name])), changing)
                inputs[name] = value, Origin(parameters=frozenset())
        return inputs

    def _other(self, tensor: Tensor, spec: InputSpec, owner: Source | None, changing: Set[str]) -> Value:
        """An integer buffer or a constant: its numbers, if nothing can change them."""
        if owner is not None:  # a plain attribute that shares the memory of a parameter
            self.held.setdefault(owner, OVERLAPS)
        is_setting = tensor.is_floating_point() and memory_of(tensor) in self._settings
        is_unknown = tensor.is_meta or tensor.layout != torch.strided or is_setting
        if owner is not None or is_unknown or {spec.arg.name, spec.target} & changing:
            return Label(tuple(tensor.shape))
        return Constant(tensor.detach().clone())  # copied, because looking at the graph computes with it


def _sources(model: nn.Module, known: Mapping[Source, Tensor] | None) -> dict[Source, Tensor]:
    """Every parameter and floating-point buffer, tied ones once, by their memory."""
    found: dict[tuple, tuple[list[str], str, Tensor]] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for kind, tensors in (("parameter", parameters), ("buffer", buffers)):
        for name, tensor in tensors:
            if kind == "parameter" or tensor.is_floating_point():
                found.setdefault(place_of(tensor), ([], kind, tensor))[0].append(name)
    by_names, marked = {source.names: source for source in known or ()}, _scalable(model)
    return {
        by_names.get(tuple(n)) or Source(tuple(n), tuple(t.shape), kind, t.dtype, is_scalable=marked.issuperset(n)): t
        for n, kind, t in found.values()
    }


def _scalable(model: nn.Module) -> set[str]:
    """Names of the buffers that their modules list in `scalable_buffers`: bounds that scale with what they bound."""
    modules = model.named_modules(remove_duplicate=False)
    named = ((path, getattr(module, "scalable_buffers", ())) for path, module in modules)
    return {f"{path}.{name}" if path else name for path, names in named for name in names}


def _why_held(tensor: Tensor) -> str:
    if is_wrapped(tensor):
        return f"it is of type {type(tensor).__name__}, which holds its numbers in other tensors: only plain ones are rescaled"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}: only dense tensors are rescaled"
    if tensor.is_complex():
        return "complex weights are not rescaled"
    if tensor.dtype not in FLOATS:
        return f"its dtype is {tensor.dtype}: only floating-point weights of 16 bits and more are rescaled"
    return "its entries share memory" if overlaps_itself(tensor) else ""
