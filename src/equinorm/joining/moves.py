"""Flips of sign, then a permutation: what must be found before the scales of two networks can be compared."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from equinorm._symmetries import Symmetries
from equinorm.discovery.graph.export import Graphs
from equinorm.joining.fitting import telling
from equinorm.joining.forms import Forms
from equinorm.joining.sign_choice import positive_signs
from equinorm.joining.signs import Signs, signs_of
from equinorm.permuting.arrangement import Sides
from equinorm.permuting.assignment import nearest
from equinorm.permuting.matching import matching, weights_of_places
from equinorm.permuting.permutations import Permutations, permutations_of
from equinorm.permuting.settling import bounded, settled

Orders = dict[str, Tensor]
"""Of channels, by family."""

_ROUNDS = 5
"""Most turns of matching and fitting signs."""

_COPIES = 0.5
"""Networks whose weights have a larger cosine, once matched, come from one another."""


@dataclass(frozen=True, slots=True)
class Search:
    """How long to look: runs of sweeps, most sweeps of each, and the seed of those that start at random."""

    starts: int
    sweeps: int
    seed: int


class Seen(Protocol):
    """Activations of two networks, standardized, by name."""

    theirs: dict[str, Tensor]

    def of(self, signs: Tensor) -> dict[str, Tensor]:
        """Those of the first network after flips of sign."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """The two groups of one model."""

    flips: Signs
    group: Permutations

    @staticmethod
    def of(graphs: Graphs, *, with_points: bool = False) -> "Moves":
        """Discover both."""
        return Moves(signs_of(graphs), permutations_of(graphs, with_points=with_points))

    @property
    def is_trivial(self) -> bool:
        """Is there nothing to move?"""
        return not self.flips.num_free and not self.group.num_families

    def canonical_signs(self, tensors: Forms) -> Tensor:
        """Signs that make sums of w³·r positive, the largest first, with numbers r > 0 that no permutation and no flip changes.

        Permuted copies of a network get the same, permuted; flipped copies get those that make them equal.
        """
        if not self.flips.num_free:
            return torch.ones(0, dtype=torch.int64)
        flips = [flip for flip in self.flips.flips if flip.ids]
        drawn = weights_of_places(self.group.layout, {name: tensor.abs() for name, tensor in tensors.items()})
        parts = ((flip.ids, tensors[flip.names[0]].double() ** 3 * drawn[flip.names[0]]) for flip in flips)
        return positive_signs(parts, self.flips.num_free)[1:].long()

    def mixes(self, found: Symmetries) -> bool:
        """Does a permutation take some scale class to a product of others, not to one?

        Where classes go over into classes, rounded scales of permuted copies are permuted too. They do not where a class is
        left out because others tell it, as of a mask that is a parameter: its rows and columns share one scale.
        """
        generator = Generator().manual_seed(0)
        order, image = self.group.random(generator), torch.arange(found.num_free + 1)
        for number in range(max((len(scaling.factors) for scaling in found.scalings), default=0)):
            own = {s.name: s.factors[number][1].expand(s.shape) for s in found.scalings if number < len(s.factors)}
            still = {s.name: torch.zeros(s.shape, dtype=torch.int64) for s in found.scalings if s.name not in own}
            for name, moved in self.group.layout.moved({**own, **still}, order).items():
                if name in own:
                    image[own[name]] = torch.where(moved == own[name], image[own[name]], moved)
        image[0] = 0
        drawn = torch.rand(found.num_free, generator=generator, dtype=torch.float64)
        after = torch.cat([drawn[:0].new_zeros(1), drawn])[image][1:]
        moved = self.group.layout.moved(_logarithms(found, drawn), order)
        return any(not torch.allclose(own, moved[name]) for name, own in _logarithms(found, after).items())

    def carried(self, found: Symmetries, log_scales: Tensor, order: Orders) -> Tensor:
        """Log-scales that do to permuted tensors what these do to tensors as they are."""
        return telling(found.scalings, self.group.layout.moved(_logarithms(found, log_scales), order), found.num_free)

    def carried_back(self, found: Symmetries, log_scales: Tensor, order: Orders) -> Tensor:
        """Log-scales that do to tensors as they are what these do to permuted ones."""
        return telling(found.scalings, self._back(_logarithms(found, log_scales), order), found.num_free)

    def matched(self, ours: Forms, theirs: Forms) -> tuple[Tensor, Orders]:
        """Signs and orders that bring one set of weights nearest to another where the two are copies."""
        alike = (self.flipped(side, self.canonical_signs(side)) for side in (ours, theirs))
        order = matching(self.group.layout, *alike)
        return self.fitted(ours, theirs, order), order

    def settled(self, ours: Forms, theirs: Forms) -> tuple[Tensor, Orders]:
        """Signs and orders that bring one set of weights nearest to another where most of them are copies."""
        layout = self.group.layout
        one, other = ({name: bounded(side[name], theirs[name]) for name in layout.names} for side in (ours, theirs))
        order = settled(Sides([*one.values()], [*other.values()], [*layout.axes.values()]), layout.atoms, layout.around)
        return self.fitted(one, other, layout.by_name(order)), layout.by_name(order)

    def moved(self, tensors: Forms, signs: Tensor, order: Orders) -> Forms:
        """Tensors after flips and a permutation; families that it does not name stay."""
        return self.group.layout.moved(self.flipped(tensors, signs), order)

    def assigned(self, ours: Forms, theirs: Forms, search: Search, seen: Seen | None) -> tuple[Tensor, Orders, int]:
        """Signs, orders and sweeps of the nearest member that is found: matching and fitting in turn, until both are still.

        Args:
            ours: weights of one network.
            theirs: of another.
            search: how long.
            seen: activations to match instead of weights, if there are any.
        """
        still = torch.ones(self.flips.num_free, dtype=torch.int64)
        generator = Generator().manual_seed(search.seed)
        here, near = (still, self.group.layout.by_name(self.group.identity())), self.settled(ours, theirs)
        are_copies = self._agreement(ours, theirs, *near) > _COPIES * math.sqrt(_square(ours) * _square(theirs))
        starts = [near, here] if are_copies else [here, near]
        starts += [(still, self.group.layout.by_name(self.group.random(generator))) for _ in range(search.starts - 2)]
        ended = [self._until_still((ours, theirs), start, search, seen) for start in starts[: search.starts]]
        if seen is None and search.starts == 1 and are_copies and ended[0][1] < self._agreement(ours, theirs, *here):
            ended.append(self._until_still((ours, theirs), here, search))  # which comes no less near than where it starts
        return max(ended, key=lambda end: end[1])[0]

    def _until_still(
        self, sides: tuple[Forms, Forms], start: tuple[Tensor, Orders], search: Search, seen: Seen | None = None
    ) -> tuple[tuple[Tensor, Orders, int], float]:
        """A fixed point, and how well it agrees."""
        (ours, theirs), (signs, order), total, agreement = sides, start, 0, 0.0
        for _ in range(_ROUNDS):
            points = self.group.points
            values = None if seen is None or points is None else points.sides(seen.of(signs), seen.theirs)
            sides = self.flipped(ours, signs), theirs
            order, taken, agreement = nearest(self.group.layout, sides, order, search.sweeps, values)
            total, better = total + taken, self.fitted(ours, theirs, order)
            if torch.equal(better, signs):
                break
            signs = better
        return (signs, order, total), agreement if seen is not None else self._agreement(ours, theirs, signs, order)

    def _agreement(self, ours: Forms, theirs: Forms, signs: Tensor, order: Orders) -> float:
        """⟨π(a), b⟩, the larger the nearer."""
        moved = self.moved(ours, signs, order)
        return sum(float((moved[name] * theirs[name]).sum(dtype=torch.float64)) for name in moved)

    def flipped(self, tensors: Forms, signs: Tensor) -> Forms:
        """Tensors after flips."""
        return self.flips.flipped(tensors, signs) if len(signs) else tensors

    def fitted(self, ours: Forms, theirs: Forms, order: Orders) -> Tensor:
        """The best signs before a given permutation."""
        if not self.flips.num_free:
            return torch.ones(0, dtype=torch.int64)
        return self.flips.fit(ours, self._back(theirs, order))

    def _back(self, tensors: Forms, order: Orders) -> dict[str, Tensor]:
        """Tensors before a permutation."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        places = self.group.layout.moved({n: torch.arange(t.numel()).reshape(t.shape) for n, t in whole.items()}, order)
        found: dict[str, Tensor] = {}
        for name, tensor in whole.items():
            before = torch.empty_like(tensor).flatten()
            before[places[name].flatten()] = tensor.flatten()
            found[name] = before.reshape(tensor.shape)
        return found

    def apply_(self, model: nn.Module, signs: Tensor, order: Orders) -> None:
        """Flip, then permute a copy of the model."""
        if self.flips.num_free:
            replace(self.flips, model=model).flip_(signs)
        replace(self.group, model=model).permute_(order)

    def named(self, order: Orders) -> Orders:
        """The orders that move something."""
        return {
            family.name: order[family.name]
            for family in self.group.families
            if family.name in order and bool((order[family.name] != torch.arange(family.size)).any())
        }


def _logarithms(found: Symmetries, log_scales: Tensor) -> dict[str, Tensor]:
    """Of what multiplies each weight."""
    return {scaling.name: scaling.log_scales(log_scales).expand(scaling.shape) for scaling in found.scalings}


def _square(tensors: Forms) -> float:
    return sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in tensors.values())
