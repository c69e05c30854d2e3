"""Where the channels of every family stand in the model's tensors, and what a permutation moves there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import PermutationError
from equinorm.discovery.values import Source
from equinorm.permuting.atoms import Atom, Axis
from equinorm.permuting.families import ChannelFamily, PermutationSpec
from equinorm.permuting.reading import Order, places
from equinorm.permuting.writing import Reordering

Orders = Sequence[Tensor] | Mapping[str, Tensor]
"""An order for each family, or some by their names."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Axes of all tensors in parts.

    Attributes:
        families: in words.
        axes: of every tensor of the model.
        atoms: of each family the part of axes that it is.
        around: of each family the atoms at each place of which its order may be another one.
    """

    families: tuple[ChannelFamily, ...]
    axes: Mapping[Source, Sequence[Axis]]
    atoms: Sequence[Atom]
    around: Sequence[tuple[Atom, ...]]

    @property
    def names(self) -> list[str]:
        """First name of every tensor."""
        return [source.names[0] for source in self.axes]

    def by_name(self, orders: Sequence[Tensor]) -> dict[str, Tensor]:
        """Orders of all families, by their names."""
        return {family.name: order for family, order in zip(self.families, orders, strict=True)}

    def orders(self, permutation: Any) -> dict[Atom, Order]:
        """The orders of channels that move, by their atoms.

        Raises:
            PermutationError: if it holds something else than orders of these families.
        """
        found: dict[Atom, Order] = {}
        for family, atom, around, order in zip(self.families, self.atoms, self.around, self._given(permutation), strict=True):
            if order is None:
                continue
            order = _checked(family, order)
            if bool((order != torch.arange(family.size)).any()):
                found[atom] = Order(around, order)
        return found

    def _given(self, permutation: Any) -> list[Any]:
        """What is given for each family; None where a dict holds nothing."""
        if isinstance(permutation, Mapping):
            names = {family.name for family in self.families}
            if unknown := [name for name in permutation if name not in names]:
                raise PermutationError(f"no family is called {unknown[0]!r}. The first are {', '.join(sorted(names)[:5])}.")
            return [permutation.get(family.name) for family in self.families]
        if isinstance(permutation, Sequence) and not isinstance(permutation, str) and len(permutation) == len(self.families):
            return list(permutation)
        length = f" of {len(permutation)}" if isinstance(permutation, Sequence) else ""
        raise PermutationError(
            f"permutation must hold {len(self.families)} orders, one for each family, or be a dict from names of families; "
            f"not {type(permutation).__name__}{length}."
        )

    def moved(self, tensors: Mapping[str, Tensor], permutation: Orders) -> dict[str, Tensor]:
        """Permuted copies of tensors on the CPU, one for each of the model's by its first name, whatever numbers they hold."""
        orders = self.orders(permutation)
        return {
            source.names[0]: Reordering(source.names[0], tensors[source.names[0]], places(axes, orders)).taken()
            for source, axes in self.axes.items()
        }

    def spec(self) -> PermutationSpec:
        """Which axes move with which family, in both directions."""
        moved: dict[tuple[str, int], list[str]] = {}
        forward: dict[str, list[tuple[str, int]]] = {}
        for family in self.families:
            forward[family.name] = list(dict.fromkeys((part.tensor, part.axis) for part in family.axes))
            for place in forward[family.name]:
                moved.setdefault(place, []).append(family.name)
        backward: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {}
        for source in self.axes:
            found = [moved.get((source.names[0], axis), []) for axis in range(len(source.shape))]
            backward[source.names[0]] = tuple(own[0] if len(own) == 1 else tuple(own) or None for own in found)
        return PermutationSpec(forward, backward)


def _checked(family: ChannelFamily, order: Any) -> Tensor:
    """An order of a family's channels."""
    shape = tuple(getattr(order, "shape", ()))
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or shape != family.shape or order.is_meta:
        kind = f"{order.dtype} of shape {shape}" if isinstance(order, Tensor) else type(order).__name__
        raise PermutationError(f"the order of {family.name} must be an int64 tensor of shape {family.shape}, not {kind}.")
    order = order.cpu()
    if not bool((order.sort(-1).values == torch.arange(family.size)).all()):
        raise PermutationError(f"the order of {family.name} must hold each of its channels 0 to {family.size - 1} once.")
    return order
