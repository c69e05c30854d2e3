"""What a module holds besides its tensors comes back as it was, whatever it is, and no traced tensor stays anywhere."""

import functools
import io
import logging
import queue
import random
import re
import threading
import time
import types
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equinorm

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Frozen(OrderedDict):
    """A configuration that refuses every change, and is read by attributes too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            object.__setattr__(self, key, value)
        self.__frozen = True

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("frozen")

    __delitem__ = setdefault = pop = popitem = update = clear = _refuse

    def __setitem__(self, key: Any, value: Any) -> None:
        if hasattr(self, "_Frozen__frozen"):
            raise TypeError("frozen")
        super().__setitem__(key, value)


class Easy(dict):
    """Keys are attributes."""

    def __init__(self, **entries: Any) -> None:
        super().__init__()
        for key, value in entries.items():
            setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        super().__setitem__(name, value)

    __setitem__ = __setattr__


class Telling(list):
    """A list that notices changes through its methods."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("not through this")

    clear = extend = __setitem__ = __iter__ = _refuse


@dataclass
class Plain:
    number: int = 3
    names: list[str] = field(default_factory=lambda: ["a", "b"])


@dataclass(frozen=True)
class Fixed:
    number: int = 3
    names: dict[str, int] = field(default_factory=lambda: {"a": 1})


@dataclass(slots=True)
class Slotted:
    number: int = 3
    last: Any = None


class Colour(Enum):
    RED = 1


Point = namedtuple("Point", "x y")


@functools.lru_cache(maxsize=8)
def cached(size: int) -> int:
    return size + 1


def closing(start: int) -> Callable[[], int]:
    count = start

    def tick() -> int:
        nonlocal count
        count += 1
        return count

    return tick


def counting(x: int = 1) -> int:
    return x


KINDS: dict[str, Callable[[], Any]] = {
    "functional": lambda: F,
    "numpy": lambda: np,
    "torch": lambda: torch,
    "builtins": lambda: __builtins__,
    "class": lambda: Plain,
    "function": lambda: counting,
    "closure": lambda: closing(3),
    "partial": lambda: functools.partial(counting, x=2),
    "cached": lambda: cached,
    "method": lambda: Plain().names.append,
    "frozen": lambda: Frozen(sample_size=32, layers=[1, 2]),
    "counter": lambda: Counter(cat=3, dog=1),
    "defaultdict": lambda: defaultdict(list, a=[1]),
    "ordered": lambda: OrderedDict([("b", 1), ("a", [2])]),
    "easy": lambda: Easy(width=3, depth=2),
    "telling": lambda: Telling([1, [2]]),
    "chain": lambda: ChainMap({"a": 1}, {"b": 2}),
    "userdict": lambda: UserDict(a=1),
    "deque": lambda: deque([1, 2, 3], maxlen=3),
    "namedtuple": lambda: Point(1, [2]),
    "tuple": lambda: (1, (2, {"a": 3})),
    "set": lambda: {1, 2, "c"},
    "frozenset": lambda: frozenset({1, 2}),
    "dataclass": Plain,
    "fixed": Fixed,
    "slotted": Slotted,
    "enum": lambda: Colour.RED,
    "namespace": lambda: types.SimpleNamespace(a=1, b=[2]),
    "proxy": lambda: types.MappingProxyType({"a": 1}),
    "lock": threading.Lock,
    "condition": threading.Condition,
    "local": threading.local,
    "generator": lambda: (i for i in range(3)),
    "iterator": lambda: iter([1, 2]),
    "file": lambda: io.StringIO("text"),
    "logger": lambda: logging.getLogger("equinorm.tests"),
    "queue": queue.Queue,
    "pattern": lambda: re.compile("a+"),
    "random": lambda: random.Random(3),
    "numpy generator": lambda: np.random.default_rng(3),
    "torch generator": lambda: torch.Generator().manual_seed(3),
    "array": lambda: np.arange(3.0),
    "objects": lambda: np.array([None, "a"], dtype=object),
    "tensor": lambda: torch.arange(3.0),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "bytes": lambda: bytearray(b"abc"),
    "weak": lambda: weakref.WeakValueDictionary(),
    "module": lambda: [nn.ReLU()],
    "device": lambda: torch.device("cpu"),
}


def picture(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """All that can be said about a value, in what compares by value; of what cannot be told its identity."""
    if id(value) in seen or value is None or isinstance(value, (str, int, float, bytes, bytearray, Enum, re.Pattern)):
        return ("again",) if id(value) in seen else value
    seen = (*seen, id(value))
    kind = type(value).__name__
    parts: list[Any] = [id(value)]
    if isinstance(value, (types.ModuleType, type)):
        return kind, id(value)
    if isinstance(value, Tensor):
        return kind, id(value), value.to_dense().tolist()
    if isinstance(value, np.ndarray):
        return kind, id(value), value.tolist()
    if isinstance(value, OrderedDict):
        parts += [(key, picture(entry, seen)) for key, entry in OrderedDict.items(value)]
    elif isinstance(value, dict):
        parts += [(key, picture(entry, seen)) for key, entry in dict.items(value)]
    elif isinstance(value, (tuple, deque)):
        parts += [getattr(value, "maxlen", None), *(picture(entry, seen) for entry in value)]
    elif isinstance(value, list):
        parts += [picture(value[place], seen) for place in range(len(value))]
    elif isinstance(value, (set, frozenset)):
        parts.append(sorted(map(repr, value)))
    elif isinstance(value, types.FunctionType):
        parts += [[picture(cell.cell_contents, seen) for cell in value.__closure__ or ()], picture(vars(value), seen)]
    elif isinstance(value, functools.partial):
        parts += [picture(value.args, seen), picture(value.keywords, seen)]
    elif isinstance(value, functools._lru_cache_wrapper):
        parts.append(value.cache_info())
    elif isinstance(value, random.Random):
        parts.append(hash(value.getstate()))
    elif isinstance(value, queue.Queue):
        return kind, parts, list(value.queue)
    names = [name for base in type(value).__mro__ for name in vars(base).get("__slots__", ()) if hasattr(value, name)]
    parts += [(name, picture(getattr(value, name), seen)) for name in names]
    if hasattr(value, "__dict__") and not isinstance(value, (types.FunctionType, logging.Logger)):
        parts.append(picture(vars(value), seen))
    return kind, parts


class Public(nn.Module):
    """A network with attributes, and a function that its forward calls with itself and a hidden value."""

    def __init__(self, attributes: dict[str, Any], leave: Callable[[Any, Tensor], Any] = lambda *_: None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
        self.leave = leave
        for name, value in attributes.items():
            setattr(self, name.replace(" ", "_"), value)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.leave(self, h)
        return self.c(self.b(h).relu())


@pytest.mark.parametrize("kind", KINDS)
def test_one_attribute_of_each_kind(kind):
    net = Public({kind: KINDS[kind]()})
    before = picture(net)
    assert equinorm.symmetries(net, X).num_free == 11
    assert picture(net) == before


@pytest.mark.parametrize("seed", range(6))
def test_random_attributes_nested_in_one_another(seed):
    draw = random.Random(seed)

    def value(depth: int) -> Any:
        if depth == 0 or draw.random() < 0.3:
            return KINDS[draw.choice([*KINDS])]()
        inside = [value(depth - 1) for _ in range(draw.randint(1, 3))]
        around = [
            list,
            tuple,
            deque,
            lambda v: dict(enumerate(v)),
            lambda v: Frozen(entries=v),
            lambda v: Fixed(names={"v": v}),
        ]
        around += [lambda v: Point(v, 1), lambda v: Plain(names=v), lambda v: Slotted(last=v), lambda v: Easy(v=v)]
        around += [lambda v: functools.partial(counting, v), lambda v: defaultdict(list, {"v": v}), Telling]
        return draw.choice(around)(inside)

    net = Public({f"v{i}": value(5) for i in range(12)})
    net.itself = [net]
    before = picture(net)
    assert equinorm.symmetries(net, X).num_free == 11
    assert picture(net) == before


class Shared:
    """State of a class."""

    last: Any = None
    seen: list = []  # noqa: RUF012
    __slots__ = ("inside",)


LAST: Any = None
KEPT: dict[str, Any] = {"deep": {}}


def into_global(net, h):
    global LAST
    LAST = h


def into_closure():
    last = None

    def leave(net, h):
        nonlocal last
        last = h

    return leave


def into_function(net, h):
    into_function.last = h


@functools.lru_cache(maxsize=4)
def doubled(weight: Tensor) -> Tensor:
    return weight * 2


@functools.cache
def tripled(weight: Tensor) -> Tensor:
    return weight * 3


def deeper(depth: int) -> dict:
    return {"in": deeper(depth - 1)} if depth else {}


def innermost(value: dict) -> dict:
    return innermost(value["in"]) if "in" in value else value


LEAVING: dict[str, tuple[dict[str, Any], Callable[[Any, Tensor], Any]]] = {
    "slots": ({"s": Slotted()}, lambda net, h: setattr(net.s, "last", h)),
    "empty slots": ({"s": Shared()}, lambda net, h: setattr(net.s, "inside", h)),
    "deep": ({"d": deeper(9)}, lambda net, h: innermost(net.d).update(h=h)),
    "counter": ({"n": Counter(cat=3)}, lambda net, h: net.n.update(cat=1, h=4)),
    "deque": ({"q": deque([1, 2], maxlen=2)}, lambda net, h: net.q.append(h)),
    "default": ({"q": defaultdict(list)}, lambda net, h: net.q["a"].append(h)),
    "ordered": ({"q": OrderedDict(a=1, b=2)}, lambda net, h: net.q.move_to_end("a")),
    "removed": ({"q": {"a": 1, "b": 2, "c": 3}}, lambda net, h: net.q.pop("b", None)),
    "set": ({"q": {1, 2}}, lambda net, h: net.q.add(h)),
    "frozen": ({"q": Frozen(a=1)}, lambda net, h: OrderedDict.__setitem__(net.q, "h", h)),
    "telling": ({"q": Telling([1])}, lambda net, h: net.q.append(h)),
    "object in object": ({"q": Plain()}, lambda net, h: net.q.names.append(types.SimpleNamespace(h=(h,)))),
    "partial": ({"f": functools.partial(dict, a=1)}, lambda net, h: net.f.keywords.update(h=h)),
    "closure": ({}, into_closure()),
    "function": ({}, into_function),
    "class": ({"s": Shared()}, lambda net, h: setattr(Shared, "last", h)),
    "list of a class": ({"s": Shared()}, lambda net, h: Shared.seen.append(h)),
    "global": ({}, into_global),
    "dict in a global": ({}, lambda net, h: KEPT["deep"].update(h=h)),
    "module of a list": ({"m": [nn.ReLU()]}, lambda net, h: setattr(net.m[0], "last", h)),
    "own class": ({}, lambda net, h: setattr(type(net), "last", h)),
    "local": ({"t": threading.local()}, lambda net, h: setattr(net.t, "h", h)),
    "cached function": ({}, lambda net, h: doubled(net.a.bias)),
    "unbounded": ({}, lambda net, h: tripled(net.a.bias)),
}


def outside() -> tuple:
    """What the functions above may leave tensors in."""
    sizes = doubled.cache_info().currsize, tripled.cache_info().currsize
    return (
        vars(Shared).get("last"),
        [*Shared.seen],
        LAST,
        {**KEPT["deep"]},
        {**vars(into_function)},
        sizes,
        hasattr(Public, "last"),
    )


def tidy() -> None:
    """What calls with numbers have left."""
    globals()["LAST"] = None
    Shared.last, Shared.seen[:] = None, []
    KEPT["deep"].clear()
    vars(into_function).clear()
    doubled.cache_clear()
    tripled.cache_clear()
    if hasattr(Public, "last"):
        del Public.last


@dataclass(slots=True)
class Renamed:
    """As `Slotted` in memory."""

    number: int = 3
    last: Any = None


def test_slots_are_put_back_in_an_object_that_has_another_class_by_then():
    def leave(net, h):
        net.s.__class__ = Renamed
        net.s.last, net.s.number = h, 4

    net = Public({"s": Slotted()}, leave)
    assert equinorm.symmetries(net, X).num_free == 6  # what h leaves in is pinned
    assert net.s == Renamed(3, None)


@pytest.mark.parametrize("where", LEAVING)
def test_what_a_forward_leaves_is_taken_back_and_pinned(where):
    attributes, leave = LEAVING[where]
    net = Public(attributes, leave)
    before, around = picture(net), outside()
    found = equinorm.symmetries(net, X)
    assert picture(net) == before
    assert outside() == around
    holds = where not in ("counter", "ordered", "removed")
    assert found.num_free == (6 if holds else 11)
    expected = net(X)
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
    torch.testing.assert_close(net(X), expected, rtol=1e-12, atol=1e-12)
    tidy()


@pytest.mark.parametrize(
    "large",
    [lambda n: list(map(str, range(n))), lambda n: {str(i): i for i in range(n)}, lambda n: [(str(i), i) for i in range(n)]],
    ids=["list", "dict", "tuples"],
)
def test_a_million_entries_are_no_burden(large):
    net = Public({"vocabulary": large(1_000_000)})
    small = Public({})
    equinorm.symmetries(small, X)
    times = []
    for model in (small, net):
        started = time.process_time()
        equinorm.symmetries(model, X)
        times.append(time.process_time() - started)
    assert times[1] < times[0] + 2.0  # 0.3 s here


def test_globals_are_left_alone_but_for_traced_tensors():
    """A library that registers something once must not be told that it has not."""

    def leave(net, h):
        global LAST
        LAST = 3

    try:
        equinorm.symmetries(Public({}, leave), X)
        assert LAST == 3
    finally:
        globals()["LAST"] = None
