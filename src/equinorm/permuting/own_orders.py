"""Entries in an order of the operation's own, as of topk(sorted=False): nothing behind may tell their places apart."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from equinorm._scaling import Reason
from equinorm.permuting.atoms import Atom, Axis, atoms, pin, resolved, size_of
from equinorm.permuting.dependence import Dependence


@dataclass(frozen=True, slots=True, eq=False)
class OwnOrder:
    """One such axis.

    Attributes:
        axis: of the entries that are returned.
        rows: the other axes. In each of their places the order may be another one.
        chosen: the axis that the entries came from. If it is permuted, the order may change.
        reason: the operation.
    """

    axis: Axis
    rows: tuple[Axis, ...]
    chosen: Axis
    reason: Reason


def settle(orders: Iterable[OwnOrder], dependence: Dependence, stored: Iterable[Axis]) -> None:
    """Pin such axes, and those that entries were chosen from, wherever their order changes what the network computes.

    It does not where that axis is free by itself: permuted along with no tensor of the model and no other such axis, by
    another order in each row.

    Args:
        orders: of all graphs.
        dependence: which atoms stand together in all values.
        stored: axes of the model's tensors.
    """
    orders = list(orders)
    owners = Counter(atom for axes in (stored, (order.axis for order in orders)) for axis in axes for atom in {*atoms(axis)})
    left = [order for order in orders if size_of(order.axis) > 1]
    while (refused := next((order for order in left if not _is_free(order, dependence, owners)), None)) is not None:
        pin([refused.axis, refused.chosen], refused.reason)  # which another one may have chosen from
        left.remove(refused)


def _is_free(order: OwnOrder, dependence: Dependence, owners: Counter[Atom]) -> bool:
    found = resolved(order.axis)
    if len(found) != 1 or not isinstance(found[0], Atom) or found[0].pinned is not None or owners[found[0]] != 1:
        return False
    return all(_stands(row, dependence.around(found[0])) for row in order.rows)


def _stands(row: Axis, around: set[Atom]) -> bool:
    """Is every factor of an axis among these?"""
    factors: Sequence[object] = resolved(row)
    return all(factor in around for factor in factors)
