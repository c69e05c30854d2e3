"""The canonical form: balanced, signs fixed, and every family of channels in an order that permutations cannot change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from equinorm._deviation import check_model
from equinorm._display import count
from equinorm._errors import EquivalenceError, ExportError, describe
from equinorm._symmetries import Symmetries, symmetries_of
from equinorm.balancing.balance import Balance
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.joining.fitting import settled
from equinorm.joining.forms import forms, real
from equinorm.joining.moves import Moves, Orders
from equinorm.joining.same_architecture import check_batch_norm
from equinorm.modules.choosing import Choice, chosen, unwrapped
from equinorm.modules.copying import duplicate
from equinorm.modules.running import on_cpu
from equinorm.permuting.matching import sorting
from equinorm.rescaling.powers_of_two import round_to_unit, unit_of_powers_of_two

TOLERANCE = 1e-12
"""Residual of the balance."""

_OFF_CENTER = math.sqrt(2) - 1.4
"""What is added to binary logarithms of scales before they are rounded, so that copies never differ in a tie.

Weights such as ±1 have balances halfway between two powers of two. Balances are algebraic numbers, and 2 to a power that is
irrational and algebraic is none (Gelfond, Schneider): with this added, none lies halfway.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Canonical:
    """How a network was brought to its canonical form.

    Attributes:
        log_scales: natural logarithms that rescaled it, of shape (num_free,).
        signs: −1 or 1 for each class of `signs`, which came after the scales.
        permutation: for each family of `permutations` the order of its channels, which came last, by name.
        ties: channels that weights do not tell from another one of their family. Where the two are copies of each other the
            form is the same in any order; where the network only looks the same from both, copies of it may get two forms.
    """

    log_scales: Tensor = field(repr=False)
    signs: Tensor = field(repr=False)
    permutation: dict[str, Tensor] = field(repr=False)
    ties: int

    @property
    def num_flipped(self) -> int:
        """Number of sign classes that changed."""
        return int((self.signs < 0).sum())

    def __str__(self) -> str:
        flipped = f", {count(self.num_flipped, 'sign')} flipped" if len(self.signs) else ""
        tied = f"; {count(self.ties, 'channel')} that weights do not tell from others" if self.ties else ""
        scales, families = count(len(self.log_scales), "scale"), count(len(self.permutation), "family", "families")
        return f"canonical: {scales} balanced{flipped}, {families} sorted{tied}"


def balanced(found: Symmetries, whose: str) -> Balance:
    """The balance of a canonical form.

    Raises:
        EquivalenceError: if it was not reached.
    """
    balance = found.balance(tol=TOLERANCE, biases=True)
    if not balance.converged and balance.norm_after > 0:  # else all is dead, and fitted
        raise EquivalenceError(f"the canonical form of {whose} was not reached: {balance.reason}.")
    return balance


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """Signs and orders of a network, and how many channels tie."""

    flips: Tensor
    order: Orders
    ties: int

    @staticmethod
    def of(moves: Moves, found: Symmetries, log_scales: Tensor | None = None) -> "_Member":
        """Those of a network that is rescaled, or as it is."""
        weights = real(forms(found, log_scales))
        flips = moves.canonical_signs(weights)
        return _Member(flips, *sorting(moves.group.layout, moves.flipped(weights, flips)))


def _rounded(found: Symmetries, log_scales: Tensor) -> Tensor:
    """Powers of two, the same in all copies whose channels have one order."""
    unit = unit_of_powers_of_two([*found.scalings, *found.casts])
    return round_to_unit(log_scales + _OFF_CENTER * unit, unit)


@on_cpu()
def canonical_(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    power_of_two: bool = False,
    batch_norm: str = "affine",
    opaque: Choice = (),
) -> Canonical:
    """Bring a network to its canonical form in place: the same for all that permutations, rescalings and flips make of it.

    It is balanced (least ℓ2 norm, biases included, residual 1e-12); scales that no norm tells, as those of dead channels, make
    the logarithms of their weights least in square. Channels whose sign may flip get the one that makes sums of cubes of their
    weights positive, the largest first. Then the channels of each family are sorted by fingerprints: numbers that sums over
    their weights give, and that no order of any channels changes. The network computes what it did.

    Args:
        model: any module that `torch.export` can handle.
        args: its positional inputs.
        kwargs: its keyword inputs.
        power_of_two: round scales to powers of two: the canonical forms of all copies that were permuted, flipped and rescaled
            by powers of two are bitwise the same. Without it the forms of copies agree to rounding.
        batch_norm: "affine", or "evaluation" for scales of the weights in front of batch normalization too, which hold in
            evaluation mode only; as in `symmetries`.
        opaque: names or submodules that are not looked into, as in `symmetries`.

    Returns:
        What was done to the network.

    Raises:
        EquivalenceError: if weights are NaN or inf, or the balance was not reached; nothing is written then.
        RescaleError: if tensors cannot be rescaled in place.
        PermutationError: if tensors cannot be permuted in place.

    >>> import copy, torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> twin, x = copy.deepcopy(net), torch.randn(1, 8)
    >>> permutations = equinorm.permutations(twin, x)
    >>> permutations.permute_(permutations.random())
    >>> for model in (net, twin):
    ...     print(equinorm.canonical_(model, x, power_of_two=True))
    canonical: 16 scales balanced, 1 family sorted
    canonical: 16 scales balanced, 1 family sorted
    >>> all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))
    True
    """
    check_model(model)
    check_batch_norm(batch_norm, model)
    graphs = graphs_of(model, args, kwargs, opaque)
    found = symmetries_of(graphs, batch_norm)
    for name, tensor in found.tensors.items():
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise EquivalenceError(f"{name} of {describe(model)} holds NaN or inf: it has no canonical form.")
    log_scales, _ = settled(found, balanced(found, describe(model)))
    moves = Moves.of(graphs)
    member = None
    if power_of_two and moves.mixes(found):  # rounded as channels will lie, which is the same in all copies
        member = _Member.of(moves, found, log_scales)
        there = _rounded(found, moves.carried(found, log_scales, member.order))
        log_scales = moves.carried_back(found, there, member.order)
    elif power_of_two:
        log_scales = _rounded(found, log_scales)
    if found.num_free:
        found.rescale_(log_scales)
    member = member or _Member.of(moves, found)
    try:
        moves.apply_(found.model, member.flips, member.order)
    except BaseException:
        if found.num_free:
            found.rescale_(-log_scales)
        raise
    return Canonical(log_scales, member.flips, moves.named(member.order), member.ties)


def canonical(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    power_of_two: bool = False,
    batch_norm: str = "affine",
    opaque: Choice = (),
) -> nn.Module:
    """A copy of a network in its canonical form: `canonical_` on a copy. The model is untouched.

    Args:
        model: any module that `torch.export` can handle and `copy.deepcopy` can copy.
        args: its positional inputs.
        kwargs: its keyword inputs.
        power_of_two: round scales to powers of two, as in `canonical_`.
        batch_norm: "affine", or "evaluation" for scales of the weights in front of batch normalization too, which hold in
            evaluation mode only; as in `symmetries`.
        opaque: names or submodules that are not looked into, as in `symmetries`.

    Returns:
        The copy.

    Raises:
        EquinormError: if the model cannot be copied, or has no canonical form.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> x = torch.randn(5, 8)
    >>> equinorm.deviation(equinorm.canonical(net, x), net, x) < 1e-5
    True
    """
    check_model(model)
    hidden = list(chosen(unwrapped(model), opaque, ExportError, "opaque"))  # of the copy, by name
    copied = duplicate(model, "to bring the copy to its canonical form")
    canonical_(copied, args, kwargs, power_of_two=power_of_two, batch_norm=batch_norm, opaque=hidden)
    return copied
