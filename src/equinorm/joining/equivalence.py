"""Functional equivalence: do flips of sign, a permutation and a rescaling of channels join the weights of two models?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._deviation import check_model, deviation
from equinorm._display import as_html, count, listed
from equinorm._errors import EquivalenceError, describe
from equinorm._modules import duplicate, on_cpu
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries, symmetries, symmetries_of
from equinorm.discovery.asked import asked
from equinorm.joining.moves import Moves
from equinorm.rescaling.write import scaled

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
TOLERANCES |= {torch.complex64: 1e-4, torch.complex128: 1e-9}
"""Default tolerance of `equivalence` by the narrowest dtype of the weights: some hundred roundings, of short ones a few."""


@dataclass(frozen=True, slots=True, eq=False)
class Equivalence:
    """Are two networks equivalent, and by which scales and permutation?

    Attributes:
        equivalent: is `difference` at most `tolerance`, and do the outputs agree: is `deviation` at most 100 times the
            tolerance (or its default for these dtypes, if that is larger; 0.5 at most)? They do not where something differs
            that is neither parameter nor buffer.
        log_scales: float64 natural logarithms of shape (num_free,) that take the weights of the first model (once permuted) to
            those of the second; the best there are where the two are not equivalent.
        difference: largest relative difference between the canonical forms: over all channels (slices along axis 0) of all
            tensors, ‖a − b‖_∞ / max(‖a‖_∞, ‖b‖_∞).
        tolerance: what `difference` was compared with.
        different: name and difference of every tensor above the tolerance, worst first.
        deviation: largest relative difference of outputs on the given inputs.
        permutation: for each family of `permutations` of the first model the order of its channels that comes before the
            scales, by name, as `Permutations.permute_` takes it; families that stay are left out. None where scales alone join
            the two, or nothing does.
        signs: −1 or 1 for each class of `signs` of the first model, which come before the permutation, as `Signs.flip_` takes
            them. None where nothing flips.
    """

    equivalent: bool
    log_scales: Tensor = field(repr=False)
    difference: float
    tolerance: float
    different: tuple[tuple[str, float], ...]
    deviation: float
    permutation: dict[str, Tensor] | None = field(default=None, repr=False)
    signs: Tensor | None = field(default=None, repr=False)

    def __str__(self) -> str:
        lines = [
            f"{self._verdict}: canonical forms differ by {self.difference:.1e} (tolerance {self.tolerance:g}), "
            f"outputs by {self.deviation:.1e}"
        ]
        return "\n".join([*lines, *(f"  {name}: {difference:.1e}" for name, difference in self.different), *self.notes])

    def _repr_html_(self) -> str:
        facts = [
            ("canonical forms differ by", f"{self.difference:.1e}"),
            ("tolerance", f"{self.tolerance:g}"),
            ("outputs differ by", f"{self.deviation:.1e}"),
            *(("note", note) for note in self.notes),
        ]
        rows = [(name, f"{difference:.1e}") for name, difference in self.different]
        return as_html(self._verdict.capitalize(), facts, (("tensor", "difference"), rows, "tensors"))

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
        if self.permutation is not None or self.signs is not None:
            return f"equivalent by {listed(self.joined_by)}"
        return "rescaling-equivalent" if self.equivalent else "not rescaling-equivalent"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the verdict does not say by itself."""
        if self.equivalent:
            moved = count(len(self.permutation or ()), "family", "families")
            flipped = count(int((self.signs < 0).sum()) if self.signs is not None else 0, "channel has", "channels have")
            orders = (f"Hidden channels of {moved} stand in another order.",) if self.permutation is not None else ()
            return (*orders, *((f"{flipped} the other sign.",) if self.signs is not None else ()))
        if self.difference <= self.tolerance:
            return (
                "A rescaling joins the weights, but the outputs differ: so does something that is neither a parameter nor a "
                "buffer, as a plain attribute, or a number inside of an opaque module.",
            )
        if self.deviation <= self.tolerance:
            return (
                "The outputs are the same on these inputs: a permutation of channels, or flips of sign, that are not found may "
                "join the weights.",
            )
        return ()


@on_cpu()
def equivalence(
    model_a: nn.Module,
    model_b: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float | None = None,
    opaque: str | Sequence[str] = (),
) -> Equivalence:
    """Decide whether some rescaling of channels, after flips of sign and a permutation, takes one network to another.

    Both are brought to their canonical form, the member of least ℓ2 norm (biases included), and compared there. Channels that
    no path of nonzero weights joins to an input and an output have no canonical scale; theirs are fitted to the logarithms of
    the ratios of weights. Where canonical forms differ although outputs agree, channels are matched by their canonical weights
    up to sign, signs are fitted, and a copy that was flipped and permuted is compared. Neither model is changed.

    Args:
        model_a: one network.
        model_b: another with the same parameters (names, shapes, ties) and the same graph.
        args: positional inputs of both.
        kwargs: keyword inputs of both.
        tolerance: on the relative difference of canonical forms; None for 1e-9 in float64, 1e-4 in float32, 3e-3 in float16,
            2e-2 in bfloat16.
        opaque: names of submodules that are not looked into, as in `symmetries`.

    Raises:
        EquivalenceError: if the two have different parameters or graphs, or hold no numbers (meta), or if a canonical form was
            not reached.

    >>> import copy, torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> twin = copy.deepcopy(net)
    >>> equinorm.balance_(twin, (torch.randn(1, 8),)).converged
    True
    >>> equinorm.equivalence(net, twin, (torch.randn(1, 8),)).equivalent
    True
    """
    for model in (model_a, model_b):
        check_model(model)
    if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0):
        raise EquivalenceError(f"tolerance must be None or a number of at least 0, not {tolerance!r}.")
    same_parameters(model_a, model_b)
    graphs = asked(model_a, args, kwargs, opaque)
    both = symmetries_of(graphs), symmetries(model_b, args, kwargs, opaque=opaque)
    same_group(*both)
    for found in both:
        if empty := [scaling.name for scaling in found.scalings if found.tensors[scaling.name].is_meta]:
            raise EquivalenceError(
                f"{empty[0]} of {describe(found.model)} is on the meta device and holds no numbers. Load it."
            )
    default = max(
        (TOLERANCES.get(s.dtype, max(TOLERANCES.values())) for s in both[0].scalings), default=TOLERANCES[torch.float64]
    )
    tolerance = default if tolerance is None else float(tolerance)
    apart = deviation(model_a, model_b, args, kwargs)
    agree = apart <= min(100 * max(tolerance, default), 0.5)
    found, forms = _by_rescaling(*both, tolerance, apart, agree)
    if found.equivalent or not agree:
        return found
    moves = Moves.of(graphs)
    if moves.is_trivial or any(scaling.dtype.is_complex for scaling in both[0].scalings):
        return found
    flips, order = moves.matched(*forms)
    twin = duplicate(both[0].model, "to permute the copy")
    moves.apply_(twin, flips, order)
    joined, _ = _by_rescaling(replace(both[0], model=twin), both[1], tolerance, apart, agree)
    if not joined.equivalent:
        return found
    return replace(joined, permutation=moves.named(order) or None, signs=flips if bool((flips < 0).any()) else None)


def _by_rescaling(
    a: Symmetries, b: Symmetries, tolerance: float, apart: float, agree: bool
) -> tuple[Equivalence, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Compare canonical forms; returns these too."""
    tensors = a.tensors, b.tensors
    z: list[Tensor] = []
    dead = torch.zeros(a.num_free, dtype=torch.bool)
    for found in (a, b):
        balance = found.balance(tol=1e-12, biases=True)
        if not balance.converged and balance.norm_after > 0:  # else all is dead, and fitted
            raise EquivalenceError(f"the canonical form of {describe(found.model)} was not reached: {balance.reason}.")
        z.append(balance.log_scales)
        dead[[id - 1 for id in balance.dead]] = True
    if bool(dead.any()):
        connecting = _fit(a.scalings, *tensors, torch.where(dead, 0.0, z[0] - z[1]), dead)
        z[0], z[1] = torch.where(dead, connecting, z[0]), torch.where(dead, 0.0, z[1])
    differences: list[tuple[str, float]] = []
    forms: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for scaling in a.scalings:
        for i, form in enumerate(forms):
            form[scaling.name] = scaled(_dense(scaling.effective(tensors[i][scaling.name])), scaling.log_factors(z[i]))
        differences.append((scaling.name, _relative(*(form[scaling.name] for form in forms))))
    worst = max((difference for _, difference in differences), default=0.0)
    different = sorted((pair for pair in differences if pair[1] > tolerance), key=lambda pair: -pair[1])
    return Equivalence(worst <= tolerance and agree, z[0] - z[1], worst, tolerance, tuple(different), apart), forms


def same_parameters(model_a: nn.Module, model_b: nn.Module) -> None:
    """Refuse models of other parameters or buffers."""
    shapes = [
        {n: tuple(p.shape) for n, p in [*m.named_parameters(remove_duplicate=False), *m.named_buffers(remove_duplicate=False)]}
        for m in (model_a, model_b)
    ]
    apart = [name for name in dict.fromkeys([*shapes[0], *shapes[1]]) if shapes[0].get(name) != shapes[1].get(name)]
    if apart:
        rows = [f"{name}: {shapes[0].get(name, 'absent')} and {shapes[1].get(name, 'absent')}" for name in apart[:8]]
        more = f" and {len(apart) - 8} more" if len(apart) > 8 else ""
        raise EquivalenceError(
            f"{describe(model_a)} and {describe(model_b)} have different parameters or buffers: {'; '.join(rows)}{more}. "
            "Rescalings join networks of one architecture only."
        )


def same_group(a: Symmetries, b: Symmetries) -> None:
    """Refuse models that run other operations."""
    if a.fingerprint != b.fingerprint:
        raise EquivalenceError(
            f"{describe(a.model)} and {describe(b.model)} have the same parameters but run different operations "
            "(other activations, constants or modes): rescalings join networks of one architecture only."
        )
    for one, other in zip(a.scalings, b.scalings, strict=True):
        same = one.names == other.names and len(one.factors) == len(other.factors)
        pairs = zip(one.factors, other.factors, strict=True) if same else ()
        if not same or not all(e == f and torch.equal(i, j) for (e, i), (f, j) in pairs):
            raise EquivalenceError(
                f"{one.name} moves differently in the two models: their parameters agree, but not their graphs, modes or ties."
            )


def _dense(tensor: Tensor) -> Tensor:
    """Real and dense, as what moves is anyway."""
    tensor = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    a, b = (x.reshape(x.shape[0], -1) if x.dim() else x.reshape(1, 1) for x in (a, b))
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).amax(1)
    scale = torch.maximum(a.abs(), b.abs()).amax(1)
    return float(torch.nan_to_num(torch.where(apart == 0, 0.0, apart / scale), nan=math.inf).max())


def _fit(scalings: Sequence[Scaling], a: Mapping[str, Tensor], b: Mapping[str, Tensor], known: Tensor, dead: Tensor) -> Tensor:
    """Fill in the log-scales of dead classes by least squares on log |b / a|, where both are nonzero."""
    size = int(dead.sum())
    place = torch.full((len(dead) + 1,), -1)  # by id: 0 is pinned
    place[1:][dead] = torch.arange(size)
    normal, right = torch.zeros(size * size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for scaling in scalings:
        if not any(bool((place[ids] >= 0).any()) for _, ids in scaling.factors):
            continue
        one, other = (scaling.effective(tensors[scaling.name]).cpu().double().abs() for tensors in (a, b))
        ratio = (other / one).log() - scaling.log_scales(known)
        usable = ratio.isfinite()
        for exponent, ids in scaling.factors:
            row = place[ids].expand(scaling.shape)
            picked = usable & (row >= 0)
            right.scatter_add_(0, row[picked], exponent * ratio[picked])
            for other, other_ids in scaling.factors:
                column = place[other_ids].expand(scaling.shape)
                pair = picked & (column >= 0)
                weight = torch.full((int(pair.sum()),), exponent * other, dtype=torch.float64)
                normal.scatter_add_(0, row[pair] * size + column[pair], weight)
    solution = torch.linalg.lstsq(normal.reshape(size, size), right[:, None], driver="gelsd").solution[:, 0]
    filled = known.clone()
    filled[dead] = solution
    return filled
