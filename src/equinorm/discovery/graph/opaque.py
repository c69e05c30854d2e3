"""Opaque submodules: run once to see what they read, write and return; in the graph, one operation that pins all of it."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from equinorm._errors import ExportError, describe, describe_inputs
from equinorm.discovery.graph.side_effects import LIBRARY, run_once
from equinorm.discovery.graph.snapshot import Snapshot

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


@dataclass(frozen=True, slots=True)
class _View:
    """A returned tensor: which of a call's memories it lies in, and where."""

    memory: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of an opaque module. Memories are numbered: its input tensors, the model's that it read, those it made.

    Attributes:
        num_inputs: how many tensors it was given.
        read: names of the model's tensors that its operations read.
        written: memories that its operations changed.
        made: entries, dtype and device of the memories that its results lie in, as JSON.
        results: what it returned, tensors as views.
        structure: how the results are nested.
    """

    num_inputs: int
    read: tuple[str, ...]
    written: frozenset[int]
    made: str
    results: tuple[Any, ...]
    structure: pytree.TreeSpec


@dataclass(slots=True)
class _Record:
    """Calls of one opaque module in their order, where its forward left tensors, and whether another opaque one called it."""

    calls: list[_Call] = field(default_factory=list)
    left: list[tuple[dict, Any]] = field(default_factory=list)
    is_within: bool = False


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


def _records(model: nn.Module, modules: Mapping[str, nn.Module], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, _Record]:
    records = {name: _Record() for name in modules}
    around, calling = _Watching(), list[str]()
    recording = {name: _recorded(name, module, model, records[name], around, calling) for name, module in modules.items()}
    eager = torch.compiler.set_stance("force_eager")  # what is compiled, as FlexAttention is, does not run while it is watched
    with _forwards(modules, recording), around, eager:
        error = run_once(model, args, kwargs)
    if isinstance(error, ExportError):
        raise error
    if error is not None:
        raise ExportError(
            f"{describe(model)} does not run on inputs {describe_inputs(args, kwargs)}, and it must, once, to see what its "
            f"opaque modules return: {type(error).__name__}: {error}"
        ) from error
    for name, record in records.items():
        if not record.calls and not record.is_within:
            raise ExportError(f"opaque: {describe(model)} never calls its module {name!r}. Name one that it calls.")
    return records


class _Watching(TorchDispatchMode):
    """Collects the memory that operations read, write and make."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.written: set[int] = set()
        self.made: set[int] = set()
        self._alive: dict[int, torch.UntypedStorage] = {}  # so that no other memory takes the place of one that was freed

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(function, "_schema", None)  # torch.cond and the like have none
        if schema is None:
            self.read |= self._memories((args, kwargs))
        for position, argument in enumerate(schema.arguments if schema else ()):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            seen = self._memories(value)
            self.read |= seen
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written |= seen
        results = function(*args, **kwargs)
        self.made |= self._memories(results) - self.read
        return results

    def _memories(self, value: Any) -> set[int]:
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        self._alive |= {_memory(tensor): tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided}
        return {_memory(tensor) for tensor in tensors}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -id(tensor)


def _recorded(
    name: str, module: nn.Module, model: nn.Module, record: _Record, around: "_Watching", calling: list[str]
) -> Callable:
    """The module's forward, written down.

    Args:
        name: of the module.
        module: the module.
        model: the model.
        record: where to.
        around: what the whole model reads, writes and makes.
        calling: opaque modules that are running; what they call is theirs.
    """
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        if calling:
            record.is_within = True
            return forward(*args, **kwargs)
        before, computed = Snapshot(model), {*around.made}
        calling.append(name)
        try:
            with _Watching() as watching:
                output = forward(*args, **kwargs)
        finally:
            calling.pop()
        registered = {id(content) for inner in model.modules() for content in (inner._parameters, inner._buffers)}
        record.left += [place for place in before.new_entries() if id(place[0]) not in registered]
        named = dict([*model.named_parameters(), *model.named_buffers()])
        read = [key for key, tensor in named.items() if id(tensor) in own or _memory(tensor) in watching.read]
        memories: dict[int, int] = {}
        for position, tensor in enumerate([*inputs, *(named[key] for key in read)]):
            memories.setdefault(_memory(tensor), position)
        if watching.read & computed - watching.made - set(memories):
            raise ExportError(
                f"opaque: module {name!r} reads what the model has computed and does not give it in tensors, tuples, lists or "
                "dicts (but in a cache, an attribute or a closure). Pass it as an argument, or name a larger module."
            )
        if foreign := watching.written - watching.made - set(memories):
            raise ExportError(
                f"opaque: module {name!r} writes into {len(foreign)} tensors that are neither its inputs nor parameters or "
                "buffers of the model. Make them buffers (register_buffer), or name a larger module."
            )
        written = frozenset(memories[memory] for memory in watching.written & set(memories))
        leaves, structure = pytree.tree_flatten(output)
        made: list[tuple[int, str, str]] = []
        first, results = len(inputs) + len(read), []
        dtypes = {}
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                results.append(_plain(name, leaf))
                continue
            memory = _memory(leaf)
            if leaf.layout != torch.strided or dtypes.setdefault(memory, leaf.dtype) != leaf.dtype:
                raise ExportError(
                    f"opaque: module {name!r} returns sparse tensors, or one memory in several dtypes. Name a larger module."
                )
            if memory not in memories and memory not in watching.made:
                raise ExportError(
                    f"opaque: module {name!r} returns a tensor that no operation of PyTorch has made: one that it keeps, or "
                    "one of another library, such as NumPy. Make that a buffer (register_buffer), or return a copy (clone())."
                )
            if memory not in memories:
                memories[memory] = first + len(made)
                entries = leaf.untyped_storage().nbytes() // leaf.element_size()
                made.append((entries, str(leaf.dtype).removeprefix("torch."), str(leaf.device)))
            results.append(_View(memories[memory], tuple(leaf.shape), leaf.stride(), int(leaf.storage_offset())))
        record.calls.append(_Call(len(inputs), tuple(read), written, json.dumps(made), tuple(results), structure))
        return output

    return run


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return value
    raise ExportError(
        f"opaque: module {name!r} returns {type(value).__name__}. Opaque modules return tensors and numbers, in tuples, lists "
        "and dicts; name a larger module."
    )


def _replayed(name: str, model: nn.Module, record: _Record) -> Callable:
    """What stands for the module's forward in the graph."""
    calls = iter(record.calls)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call = next(calls, None)
        if call is None or call.num_inputs != len(inputs):
            raise ExportError(f"opaque: {describe(model)} calls its module {name!r} in another way while it is exported.")
        memories = [*inputs, *(_tensor(model, key) for key in call.read)]
        made = torch.ops.equinorm.opaque(memories, call.made)
        if call.written:
            torch.ops.equinorm.overwritten([memories[number] for number in sorted(call.written)])
        memories += made
        results = [_viewed(result, memories) if isinstance(result, _View) else result for result in call.results]
        return pytree.tree_unflatten(results, call.structure)

    return stand_in


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def _viewed(view: _View, memories: list[Tensor]) -> Tensor:
    return memories[view.memory].as_strided(view.size, view.stride, view.offset)
