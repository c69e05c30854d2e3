"""Rows of a table that data choose, as in mixtures of experts: channels of each row in an order of their own.

In table[index] any entry may hold any row. As long as a row meets only rows that the same index chose, the laws are those of
the table itself: the axis of entries stands for the axis of rows. An operation that is not known to keep rows apart reads them
as one value (`LawBook.whole`), in which the order of channels is the same in all rows.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equinorm.discovery.graph.nodes import results_of
from equinorm.discovery.rules import key
from equinorm.permuting.atoms import resolved
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws import LAWS, ON_ROWS, Call
from equinorm.permuting.laws.registry import Law
from equinorm.permuting.values import Chosen, Laid, Stacked

_ENTRYWISE = LAWS["add"], LAWS["clone"]
_BATCHED = "bmm matmul baddbmm"
_MOVED = "linear unsqueeze squeeze transpose permute t mT movedim swapaxes"
_CUT = "select slice narrow split split_with_sizes chunk unbind glu"


def follow(book: LawBook, law: Law, call: Call) -> Any:
    """The result of an operation on chosen rows, row by row; None if they do not stay apart."""
    chosen = {name: value for name, value in call.arguments.items() if isinstance(value, Chosen)}
    first = next(iter(chosen.values()), None)
    if first is None:
        return None
    if law in ON_ROWS:
        return law(book, call)
    behind = len(first.shape) - first.place
    if any(_differ(value, first) or len(value.shape) - value.place != behind for value in chosen.values()):
        return None
    name = key(call.operator).removesuffix("_")
    if law in _ENTRYWISE or (name in _BATCHED.split() and behind == 3 and all(len(c.shape) == 3 for c in chosen.values())):
        if not isinstance(call.result, Tensor) or len(call.shape) < behind:
            return None
        arguments = {name: _of_row(book, value, first, behind) for name, value in call.arguments.items()}
        shape = [*call.shape]
        shape[-behind] = first.table.shape[first.place]
        result: Any = torch.empty(shape, dtype=call.result.dtype, device="meta")
    elif call.input is first and len(chosen) == 1 and _is_of_rows(name, call, first):
        arguments = {**call.arguments, next(iter(call.arguments)): first.table}
        try:
            result = call.operator(**{name: _without_numbers(value) for name, value in arguments.items()})
        except (RuntimeError, IndexError):  # sizes of the entries, not of the rows
            return None
    else:
        return None
    return _entries(law(book, replace(call, arguments=arguments, result=result)), call, first)


def _differ(one: Chosen, other: Chosen) -> bool:
    return one.index is not other.index or one.by != other.by


def _is_of_rows(name: str, call: Call, chosen: Chosen) -> bool:
    """Does an operation on one value move or mix other axes only?"""
    return name in _MOVED.split() or (name in _CUT.split() and call.get("dim", 0) % len(chosen.shape) != chosen.place)


def _of_row(book: LawBook, value: Any, chosen: Chosen, behind: int) -> Any:
    """What a row sees of an operand: its own entry, or what is permuted alike at all entries."""
    if isinstance(value, Chosen):
        book.same(value.entries, chosen.entries)
        return value.table
    if isinstance(value, (list, tuple)):
        return [_of_row(book, part, chosen, behind) for part in value]
    if not isinstance(value, (Laid, Stacked)):
        return value
    value = book.whole(value)
    if len(value.axes) < behind:
        return value
    book.same(value.axes[-behind], chosen.entries)
    return value.with_axis(-behind, ())


def _without_numbers(value: Any) -> Any:
    return torch.empty(value.shape, device="meta") if isinstance(value, Laid) else value


def _entries(found: Any, call: Call, chosen: Chosen) -> Any:
    """The axis of entries where a result has that of the rows; None where that is not one whole axis."""
    rows = resolved(chosen.table.axes[chosen.place])
    made: list[Chosen] = []
    for part in results_of(found):
        places = [place for place, axis in enumerate(part.axes) if resolved(axis) == rows] if isinstance(part, Laid) else []
        if len(places) != 1:
            return None
        made.append(replace(chosen, table=part, place=places[0]))
    if [part.shape for part in made] != [tuple(result.shape) for result in results_of(call.result)]:
        return None
    return made[0] if isinstance(call.result, Tensor) else made
