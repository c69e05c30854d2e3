"""Which channels of two networks that are nearly copies are the same: settled from the networks' ends inwards.

A channel is known by its weights at places that are known: those of inputs and outputs, and of channels that are settled
already. Weights count within bounds, so that one that has changed, however much, says no more than any other; their signs
do not count.
"""

import math
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from equinorm.permuting.arrangement import Arrangement, Sides
from equinorm.permuting.atoms import Atom
from equinorm.permuting.matching import paired
from equinorm.permuting.pieces import Piece, rows

MOST = 1024
"""Weights of a channel in one tensor that are looked at; drawn at random of more."""

_DRAWN = 1 << 16
"""Entries of a tensor, evenly spaced, of which the median is taken."""

_SWEEPS = 3
"""Most turns in which all families are matched once more, by all their weights."""


def bounded(tensor: Tensor, like: Tensor) -> Tensor:
    """w ↦ w / (|w| + s), with the median of another tensor's magnitudes for s; what is not finite becomes 0."""
    drawn = like.detach().reshape(-1)[:: max(like.numel() // _DRAWN, 1)]
    magnitudes = drawn[drawn.isfinite() & (drawn != 0)].abs()
    size = magnitudes.median() if magnitudes.numel() else torch.ones((), dtype=tensor.dtype)
    finite = torch.where(tensor.isfinite(), tensor.detach(), 0.0)
    return finite / (finite.abs() + size)


def settled(sides: Sides, atoms: Sequence[Atom], around: Sequence[tuple[Atom, ...]]) -> tuple[Tensor, ...]:
    """For each atom the order of our channels in which most of their weights are theirs.

    Args:
        sides: tensors of both networks, `bounded` by the second's, roughly at the same scales; of one dtype, on the CPU.
        atoms: that may be permuted.
        around: for each, those at each place of which its order may be another one.
    """
    ours, theirs = ([tensor.abs() for tensor in side] for side in (sides.ours, sides.theirs))
    return _Settling(Sides(ours, theirs, sides.axes), atoms, around).orders()


class _Settling(Arrangement):
    """Orders of families, found one after the other."""

    def orders(self) -> tuple[Tensor, ...]:
        """First the families of which most is known; then each once more, by all that is."""
        current = [tensor.clone(memory_format=torch.contiguous_format) for tensor in self.ours]
        found = {atom: torch.arange(atom.size).expand(shape).clone() for atom, shape in self.shapes.items()}
        known = set[Atom]()
        waiting = {atom: self._evidence(atom, known) for atom in found}
        while waiting:
            ready = [atom for atom in waiting if not any(outer in waiting for outer in self.around[atom])]
            atom = max(ready, key=waiting.__getitem__)
            del waiting[atom]
            step = self._step(current, atom, known)
            self.move(current, atom, step)
            found = self.composed(found, atom, step)
            known.add(atom)
            waiting |= {other: self._evidence(other, known) for other in self.neighbours[atom] if other in waiting}
        for _ in range(_SWEEPS):
            is_still = True
            for atom in found:
                step = self._step(current, atom, known)
                if bool((step != torch.arange(atom.size)).any()):
                    is_still = False
                    self.move(current, atom, step)
                    found = self.composed(found, atom, step)
            if is_still:
                break
        return tuple(found.values())

    def _unknown(self, piece: Piece, axis: int, outer: Sequence[int], known: Set[Atom]) -> list[int]:
        """Axes of a piece along which the order is not known."""
        others = (at for at in range(len(piece.atoms)) if at != axis and at not in outer)
        return [at for at in others if piece.atoms[at] in self.around and piece.atoms[at] not in known]

    def _evidence(self, atom: Atom, known: Set[Atom]) -> tuple[int, int]:
        """Weights of a channel at known places, and sums over unknown ones."""
        weights, sums = 0, 0
        for piece, axis, outer in self.standings[atom]:
            unknown = self._unknown(piece, axis, outer, known)
            rest = (own.size for at, own in enumerate(piece.atoms) if at not in (axis, *outer, *unknown))
            number = math.prod(rest)
            weights, sums = (weights, sums + number) if unknown else (weights + number, sums)
        return weights, sums

    def _step(self, current: Sequence[Tensor], atom: Atom, known: Set[Atom]) -> Tensor:
        """The order of one atom, by all that is known."""
        shape = self.shapes[atom]
        distances = torch.zeros(math.prod(shape[:-1]), shape[-1], shape[-1], dtype=current[0].dtype)
        for number, (piece, axis, outer) in enumerate(self.standings[atom]):
            unknown = self._unknown(piece, axis, outer, known)
            views = [piece.of(tensors[piece.tensor]) for tensors in (current, self.theirs)]
            if unknown:
                share = math.prod(views[0].shape[at] for at in unknown) ** -0.5
                both = [[view.sum(unknown, keepdim=True), view.square().sum(unknown, keepdim=True)] for view in views]
                views = [torch.cat([rows(part, axis, outer) for part in parts], -1) * share for parts in both]
            else:
                views = [rows(view, axis, outer) for view in views]
            if views[0].shape[-1] > MOST:
                drawn = torch.randperm(views[0].shape[-1], generator=torch.Generator().manual_seed(number))[:MOST]
                views = [view[..., drawn] for view in views]
            mean = views[1].mean(1, keepdim=True)
            one, other = (view - mean for view in views)
            distances += other.square().sum(-1)[:, :, None] + one.square().sum(-1)[:, None, :]
            distances.baddbmm_(other, one.transpose(-1, -2), alpha=-2)
        return torch.stack([paired(own) for own in distances]).reshape(shape)
