"""What one run of a model shows of its opaque submodules: what each call reads, writes, leaves and returns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from equinorm._display import count
from equinorm._errors import ExportError, dtype_name
from equinorm._memory import storage_of
from equinorm.discovery.graph.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class ResultView:
    """A returned tensor: which of a call's memories it lies in, and where."""

    memory: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class CallRecord:
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
class ModuleRecord:
    """Calls of one opaque module in their order, where its forward left tensors, and whether another opaque one called it."""

    calls: list[CallRecord] = field(default_factory=list)
    left: list[tuple[dict, Any]] = field(default_factory=list)
    is_within: bool = False


class Watching(TorchDispatchMode):
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
        tensors = tensors_in(value)
        self._alive |= {storage_of(tensor): tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided}
        return {storage_of(tensor) for tensor in tensors}


class _Memories:
    """Memories of one call, numbered: its input tensors, the model's that it read, those that it made.

    Attributes:
        numbers: of each memory, by its identity.
        made: entries, dtype and device of those that the results lie in.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.numbers: dict[int, int] = {}
        self.made: list[tuple[int, str, str]] = []
        self._first_made, self._dtypes = len(given), dict[int, torch.dtype]()
        for position, tensor in enumerate(given):
            self.numbers.setdefault(storage_of(tensor), position)

    def view(self, name: str, tensor: Tensor, made: set[int]) -> ResultView:
        """Where a result of a module lies; new memory must be among what operations have made."""
        memory = storage_of(tensor)
        if tensor.layout != torch.strided or self._dtypes.setdefault(memory, tensor.dtype) != tensor.dtype:
            raise ExportError(
                f"opaque: module {name!r} returns sparse tensors, or one memory in several dtypes. Name a larger module."
            )
        if memory not in self.numbers and memory not in made:
            raise ExportError(
                f"opaque: module {name!r} returns a tensor that no operation of PyTorch has made: one that it keeps, or "
                "one of another library, such as NumPy. Make that a buffer (register_buffer), or return a copy (clone())."
            )
        if memory not in self.numbers:
            self.numbers[memory] = self._first_made + len(self.made)
            entries = tensor.untyped_storage().nbytes() // tensor.element_size()
            self.made.append((entries, dtype_name(tensor.dtype), str(tensor.device)))
        return ResultView(self.numbers[memory], tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


class Recorder:
    """Stands for a module's forward: runs it, and writes down what the call reads, writes, leaves and returns.

    Args:
        name: of the module.
        module: the module.
        model: the model.
        around: what the whole model reads, writes and makes.
        calling: opaque modules that are running; what they call is theirs.
    """

    def __init__(self, name: str, module: nn.Module, model: nn.Module, around: Watching, calling: list[str]) -> None:
        self.record = ModuleRecord()
        self._name, self._module, self._model, self._forward = name, module, model, module.forward
        self._around, self._calling = around, calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        inputs, own = tensors_in((args, kwargs)), [*self._module.parameters(), *self._module.buffers()]
        if self._calling:
            self.record.is_within = True
            return self._forward(*args, **kwargs)
        before, computed = Snapshot(self._model), {*self._around.made}
        output, watching = self._watched(args, kwargs)
        self._note_left(before)
        read = self._read(own, watching)
        memories = _Memories([*inputs, *read.values()])
        known = set(memories.numbers)
        self._check(watching, known, computed)
        leaves, structure = pytree.tree_flatten(output)
        results = tuple(self._result(leaf, memories, watching) for leaf in leaves)
        written = frozenset(memories.numbers[memory] for memory in watching.written & known)
        self.record.calls.append(CallRecord(len(inputs), tuple(read), written, json.dumps(memories.made), results, structure))
        return output

    def _watched(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Watching]:
        """What the forward returns, and what it reads, writes and makes."""
        self._calling.append(self._name)
        try:
            with Watching() as watching:
                return self._forward(*args, **kwargs), watching
        finally:
            self._calling.pop()

    def _note_left(self, before: Snapshot) -> None:
        """Where the forward has left tensors since, other than among parameters and buffers."""
        registered = {id(content) for inner in self._model.modules() for content in (inner._parameters, inner._buffers)}
        self.record.left += [place for place in before.new_entries() if id(place[0]) not in registered]

    def _read(self, own: Sequence[Tensor], watching: Watching) -> dict[str, Tensor]:
        """The model's tensors that count as read, by name: all of the module's own, and those that it takes from elsewhere."""
        ids, named = {id(tensor) for tensor in own}, [*self._model.named_parameters(), *self._model.named_buffers()]
        return {name: tensor for name, tensor in named if id(tensor) in ids or storage_of(tensor) in watching.read}

    def _check(self, watching: Watching, known: set[int], computed: set[int]) -> None:
        """Refuse a call that reads or writes, past its arguments, what cannot be followed.

        Args:
            watching: what the call read, wrote and made.
            known: memories of its inputs and of the model's tensors that it read.
            computed: memories that the model had made before.
        """
        if watching.read & computed - watching.made - known:
            raise ExportError(
                f"opaque: module {self._name!r} reads what the model has computed and does not give it in tensors, tuples, "
                "lists or dicts (but in a cache, an attribute or a closure). Pass it as an argument, or name a larger module."
            )
        if foreign := watching.written - watching.made - known:
            raise ExportError(
                f"opaque: module {self._name!r} writes into {count(len(foreign), 'tensor')} that the model neither gives to it "
                "nor holds as a parameter or buffer. Make a buffer of each (register_buffer), or name a larger module."
            )

    def _result(self, leaf: Any, memories: _Memories, watching: Watching) -> Any:
        """A result as it can be returned again: a tensor as a view of a memory, a number as it is."""
        if isinstance(leaf, Tensor):
            return memories.view(self._name, leaf, watching.made)
        if leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device)):
            return leaf
        raise ExportError(
            f"opaque: module {self._name!r} returns {type(leaf).__name__}. Opaque modules return tensors and numbers, in "
            "tuples, lists and dicts; name a larger module."
        )


def tensors_in(values: Any) -> list[Tensor]:
    """Tensors in tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
