"""How attributes, containers, closures and caches are read and written back.

Contents are copied and compared by identity, in C; nothing is written unless it has changed, and then through the base classes
of containers, so that frozen ones, counters and those that compute when they are set come back as they were.
"""

import functools
import gc
import operator
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Kind:
    """How to read all that a holder holds, into a list, and how to put it back.

    `write` gets a test of new values: only what it approves of is replaced, one by one where entries have names; None for all.
    """

    read: Callable[[Any], list]
    write: Callable[[Any, list, Callable[[Any], bool] | None], None]


def pairs(content: list) -> dict:
    """Keys and values of a dict, of what was read from it."""
    half = len(content) // 2
    return dict(zip(content[:half], content[half:], strict=True))


def _base(holder: Any) -> Any:
    return OrderedDict if isinstance(holder, OrderedDict) else dict


def _read_dict(holder: Any) -> list:
    if type(holder) is dict:
        return [*holder, *holder.values()]
    base = _base(holder)
    return [*base.keys(holder), *base.values(holder)]


def _write_dict(holder: Any, content: list, chosen: Callable[[Any], bool] | None) -> None:
    base, before = _base(holder), pairs(content)
    for key, value in list(base.items(holder)):
        if key not in before and (chosen is None or chosen(value)):
            base.__delitem__(holder, key)
        elif key in before and value is not before[key] and (chosen is None or chosen(value)):
            base.__setitem__(holder, key, before[key])
    if chosen is None and not same(content, _read_dict(holder)):  # entries are missing, or in another order
        base.clear(holder)
        for key, value in before.items():
            base.__setitem__(holder, key, value)


def _write_list(holder: Any, content: list, _: Any) -> None:
    list.__setitem__(holder, slice(None), content)


def _write_set(holder: Any, content: list, _: Any) -> None:
    set.clear(holder)
    set.update(holder, content)


def _write_deque(holder: Any, content: list, _: Any) -> None:
    deque.clear(holder)
    deque.extend(holder, content)


def _read_class(holder: Any) -> list:
    return _read_dict(dict(vars(holder)))


def _write_class(holder: Any, content: list, chosen: Callable[[Any], bool] | None) -> None:
    before = pairs(content)
    for key, value in dict(vars(holder)).items():
        if value is not before.get(key, _ABSENT) and (chosen is None or chosen(value)):
            type.__setattr__(holder, key, before[key]) if key in before else type.__delattr__(holder, key)


def _read_cell(holder: Any) -> list:
    try:
        return [holder.cell_contents]
    except ValueError:  # empty as yet
        return []


def _write_cell(holder: Any, content: list, _: Any) -> None:
    if content:
        holder.cell_contents = content[0]
    else:
        del holder.cell_contents


def slotted(owner: type) -> Kind | None:
    """How to read and write the slots that a class and its bases declare; None if there are none."""
    declared = [vars(base) for base in owner.__mro__ if "__slots__" in vars(base)]
    slots = [entry for entries in declared for entry in entries.values() if isinstance(entry, types.MemberDescriptorType)]
    getters = [slot.__get__ for slot in slots]

    def get(getter: Callable[[Any], Any], holder: Any) -> Any:
        try:
            return getter(holder)
        except AttributeError:
            return _ABSENT

    def read(holder: Any) -> list:
        if type(holder) is not owner:  # it has another class by now, with slots of the same names
            return _kind_now(holder).read(holder)
        try:
            return [getter(holder) for getter in getters]
        except AttributeError:
            return [get(getter, holder) for getter in getters]

    def write(holder: Any, content: list, chosen: Any) -> None:
        if type(holder) is not owner:
            _kind_now(holder).write(holder, content, chosen)
            return
        for slot, value, now in zip(slots, content, read(holder), strict=True):
            if now is not value:
                slot.__delete__(holder) if value is _ABSENT else slot.__set__(holder, value)

    return Kind(read, write) if slots else None


def _kind_now(holder: Any) -> Kind:
    found = slotted(type(holder))
    assert found is not None
    return found


def _entries(holder: Any) -> dict:
    """Arguments, and results or C objects that hold them, of a function under functools.lru_cache."""
    parts = [part for part in gc.get_referents(holder) if type(part) is dict and part is not vars(holder)]
    return parts[0] if parts else {}


def _read_cache(holder: Any) -> list:
    return list(_entries(holder).values())


def results(holder: Any) -> list:
    """What a function under functools.lru_cache keeps: it is asked again, and answers without being called."""
    parameters, found = holder.cache_parameters(), []
    if parameters["maxsize"] is None:
        return _read_cache(holder)
    for key in list(_entries(holder)):
        key = key if type(key) is tuple else (key,)
        count = next((i for i, part in enumerate(key) if type(part) is object), None)  # stands before keyword arguments
        if parameters["typed"]:  # their types stand behind the arguments
            key = key[: len(key) // 2 if count is None else count + 1 + 2 * ((len(key) - 2 * count - 1) // 3)]
        named = key[count + 1 :] if count is not None else ()
        found.append(holder(*key[:count], **dict(zip(named[::2], named[1::2], strict=True))))
    return found


def _write_cache(holder: Any, _: list, __: Any) -> None:
    holder.cache_clear()  # single entries cannot be taken out


DICT, CACHE = Kind(_read_dict, _write_dict), Kind(_read_cache, _write_cache)
CLASS = Kind(_read_class, _write_class)
CONTAINERS: Mapping[type, Kind] = {
    dict: DICT,
    list: Kind(list.copy, _write_list),
    set: Kind(lambda holder: list(set.__iter__(holder)), _write_set),
    deque: Kind(lambda holder: list(deque.__iter__(holder)), _write_deque),
    types.CellType: Kind(_read_cell, _write_cell),
    functools._lru_cache_wrapper: CACHE,
}


def same(left: list, right: list) -> bool:
    """Are these the same objects?"""
    return len(left) == len(right) and all(map(operator.is_, left, right))
