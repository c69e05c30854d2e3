"""Functional equivalence: do flips of sign, a permutation and a rescaling of channels join the weights of two models?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equinorm._arguments import is_number
from equinorm._deviation import deviation
from equinorm._display import as_html, count, listed, percent
from equinorm._errors import BalanceError, EquivalenceError, describe
from equinorm._memory import is_wrapped
from equinorm._scaling import HALVES
from equinorm._symmetries import Symmetries, symmetries, symmetries_of
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.joining.canonical import balanced
from equinorm.joining.differences import Change, Tolerance, changes
from equinorm.joining.fitting import joining, settled
from equinorm.joining.forms import each, forms, real
from equinorm.joining.moves import Moves
from equinorm.joining.nearness import nearest
from equinorm.joining.same_architecture import check_batch_norm, same_group, same_parameters
from equinorm.modules.copying import duplicate
from equinorm.modules.running import on_cpu

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
TOLERANCES |= {torch.complex64: 1e-4, torch.complex128: 1e-9}
"""Default tolerance of `equivalence` by the narrowest dtype of the weights: some hundred roundings, of short ones a few."""


@dataclass(frozen=True, slots=True, eq=False)
class Equivalence:
    """Are two networks equivalent, and by which scales and permutation?

    Attributes:
        equivalent: are there no `changes`, and do the outputs agree: is `deviation` at most 100 times the tolerance (or its
            default for the dtypes of weights, or of what the network computes, if that is larger; 0.5 at most)? They do not
            where something differs that is neither parameter nor buffer.
        log_scales: float64 natural logarithms of shape (num_free,) that take the weights of the first model (once flipped and
            permuted) to those of the second; the best that were found where the two are not equivalent.
        difference: largest relative difference between the canonical forms: over all channels (slices along axis 0) of all
            tensors, ‖a − b‖_∞ / max(‖a‖_∞, ‖b‖_∞). Where the two are not equivalent, of the first as near to the second as
            was found.
        tolerance: what `difference` was compared with.
        changes: every tensor that differs by more than the tolerance, with the entries that do, worst first. In half precision
            (with the default tolerance) also those with entries that differ by more than eight roundings of their own: a little
            training moves no channel as far as the tolerance, but many small weights by more than a rounding.
        size: number of entries of all tensors.
        deviation: largest relative difference of outputs on the given inputs.
        permutation: for each family of `permutations` of the first model the order of its channels that comes before the
            scales, by name, as `Permutations.permute_` takes it; families that stay are left out. None where all stay.
        signs: −1 or 1 for each class of `signs` of the first model, which come before the permutation, as `Signs.flip_` takes
            them. None where nothing flips.
    """

    equivalent: bool
    log_scales: Tensor = field(repr=False)
    difference: float
    tolerance: float
    changes: tuple[Change, ...]
    size: int
    deviation: float
    permutation: dict[str, Tensor] | None = field(default=None, repr=False)
    signs: Tensor | None = field(default=None, repr=False)

    def __str__(self) -> str:
        verdict = (
            f"{self._verdict}: {self._compared} by {self.difference:.1e} (tolerance {self.tolerance:g}), "
            f"outputs by {self.deviation:.1e}"
        )
        return "\n".join([verdict, *(f"  {change}" for change in self.changes), *self.notes])

    def _repr_html_(self) -> str:
        facts = [
            (self._compared, f"by {self.difference:.1e}"),
            ("tolerance", f"{self.tolerance:g}"),
            ("outputs differ", f"by {self.deviation:.1e}"),
            *(("note", note) for note in self.notes),
        ]
        rows = [
            (change.tensor, f"{change.difference:.1e}", f"{change.entries:,} of {change.size:,}", change.entry)
            for change in self.changes
        ]
        columns = ("tensor", "difference", "entries", "most")
        return as_html(self._verdict.capitalize(), facts, (columns, rows, "tensors"))

    @property
    def different(self) -> tuple[tuple[str, float], ...]:
        """Name and difference of every tensor above the tolerance, worst first."""
        return tuple((change.tensor, change.difference) for change in self.changes)

    @property
    def joined_by(self) -> tuple[str, ...]:
        """Of "flips of sign", "permutation", "rescaling" those that join the weights; empty if equal, or not equivalent."""
        if not self.equivalent:
            return ()
        is_rescaled = bool((self.log_scales.abs() > self.tolerance).any())
        parts = {"flips of sign": self.signs is not None, "permutation": self.permutation is not None, "rescaling": is_rescaled}
        return tuple(name for name, is_there in parts.items() if is_there)

    @property
    def _verdict(self) -> str:
        if not self.equivalent:
            return "not equivalent"
        is_rescaled = self.permutation is None and self.signs is None
        return "rescaling-equivalent" if is_rescaled else f"equivalent by {listed(self.joined_by)}"

    @property
    def _compared(self) -> str:
        return "brought together, weights differ" if self.changes else "canonical forms differ"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the verdict does not say by itself."""
        moved = count(len(self.permutation or ()), "family", "families")
        flipped = count(int((self.signs < 0).sum()) if self.signs is not None else 0, "channel has", "channels have")
        notes = [f"Hidden channels of {moved} stand in another order."] if self.permutation is not None else []
        notes += [f"{flipped} the other sign."] if self.signs is not None else []
        if self.equivalent:
            return tuple(notes)
        if not self.changes:
            moves = "A rescaling joins" if not notes else "These and a rescaling join"
            notes.append(
                f"{moves} the weights, but the outputs differ: so does something that is neither a parameter nor a buffer, as "
                "a plain attribute, or a number inside of an opaque module."
            )
        elif self.difference <= self.tolerance:
            notes.append(
                "No channel differs by more than the tolerance, but single entries by more than rounding to half precision "
                "explains, as after a little training."
            )
        elif self.deviation <= self.tolerance:
            notes.append(
                "The outputs agree on these inputs within the tolerance."
                if self._is_mostly_joined
                else "The outputs agree on these inputs: a permutation of channels, or flips of sign, that are not "
                "found may join the weights."
            )
        return (*notes, *([self._extent] if self.changes else []))

    @property
    def _entries(self) -> int:
        return sum(change.entries for change in self.changes)

    @property
    def _is_mostly_joined(self) -> bool:
        return 2 * self._entries <= self.size

    @property
    def _extent(self) -> str:
        """How much differs, in a sentence."""
        if self._is_mostly_joined:
            return f"All other {self.size - self._entries:,} of {self.size:,} entries agree."
        share, tensors = percent(self._entries, self.size), count(len(self.changes), "tensor")
        return f"{share} of all entries differ, in {tensors}, as after training; the most changed tensors come first."


@on_cpu()
def equivalence(
    model_a: nn.Module,
    model_b: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float | None = None,
    batch_norm: str = "affine",
    opaque: str | Sequence[str] = (),
) -> Equivalence:
    """Decide whether some rescaling of channels, after flips of sign and a permutation, takes one network to another.

    Both are brought to their canonical form, the member of least ℓ2 norm (biases included), and compared there. Channels that
    no path of nonzero weights joins to an input and an output have no canonical scale; theirs are fitted to the logarithms of
    the ratios of weights. Where canonical forms differ although outputs agree, channels are matched by their canonical weights
    up to sign, signs are fitted, and a copy that was flipped and permuted is compared. Where the two are not equivalent, the
    first is brought near to the second by what a few changed weights do not disturb, and what differs then is listed. Neither
    model is changed.

    Args:
        model_a: one network.
        model_b: another with the same parameters (names, shapes, ties) and the same graph; torch.compile,
            DistributedDataParallel, DataParallel and AveragedModel are looked through.
        args: positional inputs of both.
        kwargs: keyword inputs of both.
        tolerance: on the relative difference of canonical forms; None for 1e-9 in float64, 1e-4 in float32, 3e-3 in float16,
            2e-2 in bfloat16, and in these two for eight roundings of every entry, too.
        batch_norm: "affine", or "evaluation" for scales of the weights in front of batch normalization too, which hold in
            evaluation mode only; as in `symmetries`.
        opaque: names of submodules that are not looked into, as in `symmetries`.

    Returns:
        The verdict, what joins the two, and what differs.

    Raises:
        EquivalenceError: if the two have different parameters or graphs, or hold no numbers (meta), NaN or inf in channels that
            scale, or if a canonical form was not reached.

    >>> import copy, torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> twin = copy.deepcopy(net)
    >>> equinorm.balance_(twin, (torch.randn(1, 8),)).converged
    True
    >>> equinorm.equivalence(net, twin, (torch.randn(1, 8),)).equivalent
    True
    """
    model_a, model_b = same_parameters(model_a, model_b)
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise EquivalenceError(f"tolerance must be None or a number of at least 0, not {tolerance!r}.")
    check_batch_norm(batch_norm, model_a, model_b)
    graphs = graphs_of(model_a, args, kwargs, opaque)
    other = symmetries(model_b, args, kwargs, batch_norm=batch_norm, opaque=opaque)
    both = same_group(symmetries_of(graphs, batch_norm), other)
    for found in both:
        _check_numbers(found)
    verdict = _verdict(both, tolerance, deviation(model_a, model_b, args, kwargs))
    canonical = [_Canonical.of(found, which) for which, found in zip(("first", "second"), both, strict=True)]
    rescaled, alone, z = _by_rescaling(both, canonical, verdict)
    if rescaled.equivalent or not rescaled.changes:
        return rescaled
    moves = Moves.of(graphs)
    if verdict.agree and not moves.is_trivial:
        flips, order = moves.matched(*(real(forms(side, own)) for side, own in zip(both, alone, strict=True)))
        twin = duplicate(both[0].model, "to permute the copy")
        moves.apply_(twin, flips, order)
        moved = replace(both[0], model=twin)
        joined, _, _ = _by_rescaling((moved, both[1]), (_Canonical.of(moved, "first"), canonical[1]), verdict)
        if joined.equivalent:
            return replace(joined, permutation=moves.named(order) or None, signs=_flipping(flips))
    near = nearest(both, moves, z, verdict.tolerance)
    if near.entries >= sum(change.entries for change in rescaled.changes):
        return rescaled
    by = {"log_scales": near.log_scales, "permutation": near.order or None, "signs": _flipping(near.signs)}
    is_joined = not near.changes and verdict.agree
    return replace(rescaled, equivalent=is_joined, difference=near.difference, changes=near.changes, **by)


def _check_numbers(found: Symmetries) -> None:
    """Refuse a network whose weights hold no numbers of their own."""
    tensors = found.tensors
    if empty := [scaling.name for scaling in found.scalings if tensors[scaling.name].is_meta]:
        raise EquivalenceError(f"{empty[0]} of {describe(found.model)} is on the meta device and holds no numbers. Load it.")
    if wrapped := [scaling.name for scaling in found.scalings if is_wrapped(tensors[scaling.name])]:
        kind = type(tensors[wrapped[0]]).__name__
        raise EquivalenceError(
            f"{wrapped[0]} of {describe(found.model)} is of type {kind}, which holds its numbers in other tensors. Compare "
            "the networks before their weights are wrapped, or quantized."
        )


def _verdict(both: Sequence[Symmetries], tolerance: float | None, apart: float) -> "_Verdict":
    """What decides, where outputs are so far apart."""
    pairs = [[one.dtype, other.dtype] for one, other in zip(both[0].scalings, both[1].scalings, strict=True)]
    known = [TOLERANCES.get(dtype, max(TOLERANCES.values())) for pair in pairs for dtype in pair]
    default = max(known, default=TOLERANCES[torch.float64])
    halves = [_half(pair) if tolerance is None else None for pair in pairs]
    tolerance = default if tolerance is None else float(tolerance)
    computed = [TOLERANCES.get(value.dtype, 0.0) for value in both[0].values if value.depth]
    return _Verdict(Tolerance(tolerance, halves), apart, apart <= min(100 * max(tolerance, default, *computed), 0.5))


def _half(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    """The coarser half precision of these."""
    return max((dtype for dtype in dtypes if dtype in HALVES), key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _flipping(signs: Tensor) -> Tensor | None:
    """Signs, if any is −1."""
    return signs if bool((signs < 0).any()) else None


class _Verdict(NamedTuple):
    """What decides: the tolerance of weights, how far outputs are apart, and whether that is within theirs."""

    tolerance: Tolerance
    deviation: float
    agree: bool


class _Canonical(NamedTuple):
    """Log-scales that balance a network, those of its canonical form, and a mask of the classes that no path tells."""

    log_scales: Tensor
    alone: Tensor
    dead: Tensor

    @staticmethod
    def of(found: Symmetries, which: str) -> "_Canonical":
        """Those of the first or the second network."""
        try:
            balance = balanced(found, f"the {which} network")
        except BalanceError as error:
            raise EquivalenceError(f"the {which} network has no canonical form: {error}") from error
        alone, dead = settled(found, balance)
        return _Canonical(balance.log_scales, alone, dead)


def _by_rescaling(
    both: Sequence[Symmetries], canonical: Sequence[_Canonical], verdict: _Verdict
) -> tuple[Equivalence, Sequence[Tensor], Sequence[Tensor]]:
    """Compare canonical forms; returns the log-scales of those of each network by itself, and of those that were compared."""
    (a, b), scalings = both, both[0].scalings
    z = [side.log_scales for side in canonical]
    dead = canonical[0].dead | canonical[1].dead
    if bool(dead.any()):
        connecting = joining(scalings, a.tensors, b.tensors, torch.where(dead, 0.0, z[0] - z[1]), dead)
        z = [torch.where(dead, connecting, z[0]), torch.where(dead, 0.0, z[1])]
    compared = zip(each(a, z[0]), each(b, z[1]), strict=True)
    worst, different = changes(scalings, compared, z, verdict.tolerance)
    size = sum(scaling.numel for scaling in scalings)
    is_joined = not different and verdict.agree
    found = Equivalence(is_joined, z[0] - z[1], worst, verdict.tolerance.relative, different, size, verdict.deviation)
    return found, [side.alone for side in canonical], z
