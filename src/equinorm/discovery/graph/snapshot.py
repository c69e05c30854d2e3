"""What a model holds besides its tensors: all that a forward can leave behind, or read that no graph records."""

import functools
import gc
import math
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equinorm.discovery.graph.holders import CACHE, CLASS, CONTAINERS, DICT, Kind, pairs, results, same, slotted

LEAVES = (Tensor, np.ndarray, torch.UntypedStorage, torch.TypedStorage)
"""What holds numbers; not looked into."""

_UNTRACKED = (dict, np.ndarray, np.flatiter, torch.UntypedStorage, torch.TypedStorage)
"""What the garbage collector may not know although it holds something."""

_IMMUTABLE = (
    *(tuple, frozenset, types.CellType, types.MethodType, types.MappingProxyType, functools.partial),
    *(property, staticmethod, classmethod),
)
"""What is looked through: all that these refer to is what they hold. So it is with views, iterators and methods of C."""

_CALLS = (types.FrameType, types.TracebackType, types.CodeType)
"""What refers to code that runs, and by it to anything."""

_STOPS = (
    *(types.ModuleType, type, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
    *(torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.DataLoader),
)
"""What is never looked into: none of it is the model's, or a forward's to change."""

_FOREIGN = (
    *("asyncio", "concurrent", "contextvars", "io", "logging", "multiprocessing", "queue", "selectors", "socket", "subprocess"),
    *("tempfile", "threading", "_io", "_thread", "equinorm", "torch._C", "torch._dynamo", "torch._inductor", "torch._ops"),
    *("torch._subclasses", "torch.distributed", "torch.export", "torch.fx", "torch.optim", "torch.utils.data"),
    *("_pytest", "hypothesis", "ipykernel", "IPython", "pluggy", "traitlets"),
)
"""Modules whose objects other threads, the system, the exporter, or what runs tests and notebooks may change."""


class Reach:
    """Follows objects to all that they hold, nearest first.

    Attributes:
        seen: every object met, by identity; nothing is followed twice.
        leaves: tensors, arrays and storages.
        holders: what can change, and its kind.
        kinds: classes of the objects met, by identity (a metaclass may forbid hashing), and where these hold others.
        functions: functions met.

    Args:
        start: the objects.
        known: objects by identity that are not followed.
        limit: stop after so many holders.
    """

    def __init__(self, start: Iterable[Any], known: Mapping[int, Any], limit: float = math.inf) -> None:
        self.seen, self._known = dict[int, Any](), known
        self.leaves, self.holders = list[Any](), list[tuple[Any, Kind]]()
        self.kinds, self.functions = dict[int, tuple[type, _Contents]](), list[types.FunctionType]()
        level = list(start)
        while level and len(self.holders) <= limit:
            level = self._step(level)

    def _step(self, level: list) -> list:
        """Look into these, and return what they hold."""
        seen, known, is_tracked = self.seen, self._known, gc.is_tracked
        new = {id(x): x for x in level if (is_tracked(x) or type(x) in _UNTRACKED) and id(x) not in seen and id(x) not in known}
        seen.update(new)
        direct: list[Any] = [x for x in new.values() if type(x) is tuple]
        held: list[Any] = []
        for item in new.values() if len(direct) < len(new) else ():
            kind = type(item)
            if kind is dict:
                self.holders.append((item, DICT))
                held += gc.get_referents(item) or item.values()  # Python 3.13 counts attributes as held by their object alone
            elif issubclass(kind, LEAVES):
                self.leaves.append(item)
            elif kind is np.flatiter:
                held.append(item.base)
            elif kind is types.FunctionType:
                held += self._inside_function(item)
            elif kind is not tuple:
                _, parts = self.kinds.get(id(kind)) or self.kinds.setdefault(id(kind), (kind, _contents(kind)))
                for part in parts.holders:
                    self.holders.append((item, part))
                    held += part.read(item)
                if parts.has_dict:
                    held.append(_attributes(item))
                if parts.is_seen_through:
                    direct.append(item)
        return held + gc.get_referents(*direct)

    def _inside_function(self, function: types.FunctionType) -> list:
        if str(function.__module__).partition(".")[0] in ("torch", "equinorm"):
            return []
        self.functions.append(function)
        return [function.__closure__, function.__defaults__, function.__kwdefaults__, function.__dict__]


def _attributes(item: Any) -> dict | None:
    """The object's own attributes, whatever its class makes of them."""
    try:
        return vars(item) if issubclass(type(item), threading.local) else object.__getattribute__(item, "__dict__")
    except AttributeError:
        return None


@dataclass(frozen=True, slots=True)
class _Contents:
    """Where objects of a class hold others."""

    holders: tuple[Kind, ...] = ()
    has_dict: bool = False
    is_seen_through: bool = False


def _contents(kind: type) -> _Contents:
    name = f"{kind.__module__}."
    is_stop = any(base is stop for base in kind.__mro__ for stop in _STOPS)  # an abstract base class would hash it
    is_foreign = is_stop or any(name.startswith(f"{other}.") for other in _FOREIGN)
    if is_foreign and not issubclass(kind, (nn.Module, threading.local)):
        return _Contents()
    holders = [container for base, container in CONTAINERS.items() if issubclass(kind, base)]
    holders += filter(None, [slotted(kind)])
    is_of_python = kind.__module__ in ("builtins", "itertools") and not holders and not issubclass(kind, _CALLS)
    has_dict = bool(kind.__dictoffset__) or issubclass(kind, threading.local)
    return _Contents(tuple(holders), has_dict, is_of_python or issubclass(kind, _IMMUTABLE))


def _is_users(name: Any) -> bool:
    """May a Python module's globals and classes hold what a user's forward leaves there?"""
    package = str(name).partition(".")[0]
    return package not in ("None", "torch", "numpy", "equinorm") and package not in sys.stdlib_module_names


_SHARED = 20_000
"""How many holders are followed from classes and globals."""


class Snapshot:
    """What a model's modules hold, and, if asked, the classes and Python modules that define what they hold.

    Attributes:
        leaves: tensors, arrays and storages in attributes; not those that are registered as parameters or buffers only.
    """

    def __init__(self, model: nn.Module, shared: bool = False) -> None:
        modules = list(model.modules())
        named = [vars(module).get(key) for module in modules for key in ("_parameters", "_buffers")]
        registered: list[Any] = [part for part in named if isinstance(part, dict)]
        registered += [vars(module)["_flat_weights"] for module in modules if "_flat_weights" in vars(module)]  # of nn.RNN
        own = Reach(modules, {id(part): part for part in registered})
        self.leaves: list[Any] = own.leaves
        self._seen = own.seen
        self._seen.update((id(item), item) for item in (*registered, *model.parameters(), *model.buffers()))
        self._own = _read([*own.holders, *((part, CONTAINERS[type(part)]) for part in registered)])
        self._shared = _read(self._around(own)) if shared else []

    def _around(self, own: Reach) -> list[tuple[Any, Kind]]:
        """Classes of what is held, globals of where they and functions are defined, and what these hold."""
        bases = [base for kind, _ in own.kinds.values() for base in kind.__mro__ if _is_users(base.__module__)]
        classes = list({id(base): base for base in bases}.values())
        modules = [sys.modules.get(base.__module__) for base in classes]
        near = [vars(module) for module in modules if isinstance(module, types.ModuleType)]
        near += [function.__globals__ for function in own.functions if _is_users(function.__module__)]
        scopes = {id(scope): scope for scope in near}
        for value in [value for scope in scopes.values() for value in scope.values()]:  # what they import
            if type(value) is types.FunctionType and _is_users(value.__module__):
                scopes.setdefault(id(value.__globals__), value.__globals__)
            elif type(value) is types.ModuleType and _is_users(value.__name__):
                scopes.setdefault(id(vars(value)), vars(value))
        self._seen.update(scopes)
        values = [value for scope in scopes.values() for value in scope.values()]
        reach = Reach([*values, *(value for base in classes for value in vars(base).values())], self._seen, _SHARED)
        self._seen.update(reach.seen)
        return [*((scope, DICT) for scope in scopes.values()), *((base, CLASS) for base in classes), *reach.holders]

    def new_tensors(self) -> list[Tensor]:
        """Tensors that are held now, and were not before."""
        new: list[Any] = []
        for holder, kind, before in (*self._own, *self._shared):
            new += _new(holder, kind, before)
        return [leaf for leaf in Reach(new, self._seen).leaves if isinstance(leaf, Tensor)]

    def new_entries(self) -> Iterator[tuple[dict, Any]]:
        """Dicts of the model's own and their keys under which new tensors stand."""
        for holder, kind, before in self._own:
            if kind is DICT and not same(before, DICT.read(holder)):
                known = pairs(before)
                for key, value in holder.items():
                    if isinstance(value, Tensor) and value is not known.get(key):
                        yield holder, key

    def restore(self) -> None:
        """Put back everything that modules held; of what is shared with others, and of caches, only what holds new tensors."""

        def is_new(value: Any) -> bool:
            return any(isinstance(leaf, Tensor) for leaf in Reach([value], self._seen).leaves)

        for is_own, holders in ((True, self._own), (False, self._shared)):
            for holder, kind, before in holders:
                if same(before, kind.read(holder)):
                    continue
                if is_own and kind is not CACHE:
                    kind.write(holder, before, None)
                elif any(map(is_new, _new(holder, kind, before))):
                    kind.write(holder, before, is_new)


def _read(holders: list[tuple[Any, Kind]]) -> list[tuple[Any, Kind, list]]:
    return [(holder, kind, kind.read(holder)) for holder, kind in holders]


def _new(holder: Any, kind: Kind, before: list) -> list:
    """What it holds now, and did not before."""
    now = kind.read(holder)
    if same(before, now):
        return []
    known = {*map(id, before)}
    return [value for value in (results(holder) if kind is CACHE else now) if id(value) not in known]
