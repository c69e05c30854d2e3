"""Opaque submodules: run once to see what they read, write and return; in the graph, one operation that pins all of it."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from equinorm._errors import ExportError, describe, describe_inputs
from equinorm.discovery.graph.opaque_calls import ModuleRecord, Recorder, ResultView, Watching, tensors_in
from equinorm.discovery.graph.side_effects import LIBRARY, run_once

_NEVER_COMPUTED = (torch.Tag.nondeterministic_seeded,)  # even where all that it reads are constants
LIBRARY.define("opaque(Tensor[] read, str memories) -> Tensor[]", tags=_NEVER_COMPUTED)
LIBRARY.define("overwritten(Tensor(a!)[] tensors) -> ()", tags=_NEVER_COMPUTED)


@torch.library.register_fake("equinorm::opaque", lib=LIBRARY)
def _opaque_fake(read: list[Tensor], memories: str) -> list[Tensor]:
    return [torch.empty(size, dtype=getattr(torch, dtype), device=device) for size, dtype, device in json.loads(memories)]


@torch.library.register_fake("equinorm::overwritten", lib=LIBRARY)
def _overwritten_fake(tensors: list[Tensor]) -> None:
    pass


has_side_effect(torch.ops.equinorm.opaque.default)  # what it reads is pinned even where nothing uses its results


@contextlib.contextmanager
def opaque(model: nn.Module, modules: Mapping[str, nn.Module], args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While exporting, let one operation stand for each call of these submodules.

    Args:
        model: the model, which is run once as it is to see what the submodules read, write and return.
        modules: the submodules by name.
        args: positional inputs of the model.
        kwargs: its keyword inputs.

    Raises:
        ExportError: if the model does not run, does not call a submodule, or one does what cannot be followed.
    """
    if not modules:
        yield
        return
    if any(module is model for module in modules.values()):
        raise ExportError("opaque: the model itself was given; nothing would be left to analyse. Name some of its submodules.")
    records = _records(model, modules, args, kwargs)
    replaced = {name: _replayed(name, model, record) for name, record in records.items()}
    for record in records.values():
        for holder, key in record.left:  # what stands there from an earlier call would count as a constant
            holder.pop(key, None)
    for module in modules.values():
        for inner in module.modules():  # packed weights, which the exporter would look into
            held = [key for key, value in vars(inner).items() if isinstance(value, torch.ScriptObject)]
            for key in held if not isinstance(inner, torch.jit.ScriptModule) else ():
                del vars(inner)[key]
    with _forwards(modules, replaced):
        yield


@contextlib.contextmanager
def _forwards(modules: Mapping[str, nn.Module], functions: Mapping[str, Callable]) -> Iterator[None]:
    """Let modules compute something else."""
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.__dict__["forward"] = functions[name]
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]


def _records(
    model: nn.Module, modules: Mapping[str, nn.Module], args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, ModuleRecord]:
    around, calling = Watching(), list[str]()
    recorders = {name: Recorder(name, module, model, around, calling) for name, module in modules.items()}
    eager = torch.compiler.set_stance("force_eager")  # what is compiled, as FlexAttention is, does not run while it is watched
    with _forwards(modules, recorders), around, eager:
        error = run_once(model, args, kwargs)
    if isinstance(error, ExportError):
        raise error
    if error is not None:
        raise ExportError(
            f"{describe(model)} does not run on inputs {describe_inputs(args, kwargs)}, and it must, once, to see what its "
            f"opaque modules return: {type(error).__name__}: {error}"
        ) from error
    records = {name: recorder.record for name, recorder in recorders.items()}
    for name, record in records.items():
        if not record.calls and not record.is_within:
            raise ExportError(f"opaque: {describe(model)} never calls its module {name!r}. Name one that it calls.")
    return records


def _replayed(name: str, model: nn.Module, record: ModuleRecord) -> Callable:
    """What stands for the module's forward in the graph."""
    calls = iter(record.calls)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        call = next(calls, None)
        if call is None or call.num_inputs != len(inputs):
            raise ExportError(f"opaque: {describe(model)} calls its module {name!r} in another way while it is exported.")
        memories = [*inputs, *(attrgetter(key)(model) for key in call.read)]
        made = torch.ops.equinorm.opaque(memories, call.made)
        if call.written:
            torch.ops.equinorm.overwritten([memories[number] for number in sorted(call.written)])
        memories += made
        results = [_viewed(result, memories) if isinstance(result, ResultView) else result for result in call.results]
        return pytree.tree_unflatten(results, call.structure)

    return stand_in


def _viewed(view: ResultView, memories: list[Tensor]) -> Tensor:
    return memories[view.memory].as_strided(view.size, view.stride, view.offset)
