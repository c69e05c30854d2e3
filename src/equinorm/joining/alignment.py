"""Alignment: the member of one network's orbit, under permutations and rescalings, that is nearest to another network."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._arguments import check_count, check_flag, is_whole
from equinorm._display import count
from equinorm._errors import EquivalenceError
from equinorm._scaling import HALVES
from equinorm._symmetries import Symmetries, symmetries, symmetries_of
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.joining.activations import measured
from equinorm.joining.canonical import TOLERANCE
from equinorm.joining.fitting import joining, settled
from equinorm.joining.forms import Forms, dtype_of, forms, real
from equinorm.joining.moves import Moves, Search, Seen
from equinorm.joining.same_architecture import check_batch_norm, same_dtypes, same_group, same_parameters
from equinorm.modules.choosing import tensors_of
from equinorm.modules.copying import duplicate
from equinorm.modules.running import on_cpu
from equinorm.rescaling.powers_of_two import round_to_powers_of_two


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The nearest member that was found, and how far it is.

    Attributes:
        model: a copy of the first network, permuted and rescaled; it computes what the first does.
        permutation: for each family of `permutations` the order of its channels, by name.
        signs: −1 or 1 for each class of `signs`, which come before the permutation.
        log_scales: natural logarithms that rescale the first network after the permutation.
        distance_before: ‖a − b‖₂ / ‖b‖₂ over all parameters.
        distance_after: the same of the copy.
        sweeps: over the families, of the best start.
    """

    model: nn.Module = field(repr=False)
    permutation: dict[str, Tensor] = field(repr=False)
    signs: Tensor = field(repr=False)
    log_scales: Tensor = field(repr=False)
    distance_before: float
    distance_after: float
    sweeps: int

    def __str__(self) -> str:
        return (
            f"aligned in {count(self.sweeps, 'sweep')}: distance {self.distance_before:.4g} before, "
            f"{self.distance_after:.4g} after, of the norm of the other network"
        )


@on_cpu()
def align(
    model_a: nn.Module,
    model_b: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    rescale: bool | None = None,
    flip: bool = True,
    power_of_two: bool = False,
    starts: int = 1,
    sweeps: int = 100,
    seed: int = 0,
    data: Iterable[tuple | Tensor] | None = None,
    batch_norm: str = "affine",
    opaque: str | Sequence[str] = (),
) -> Alignment:
    """Permute, flip and rescale a copy of one network so that it comes near to another: by weights, or by activations.

    Each family in turn gets the order of largest Σ_i ⟨a_π(i), b_i⟩, a linear assignment, until none moves; signs that may flip
    are fitted to the match, and the match to them. With scales both are balanced before (least ℓ2 norm, biases included), and
    scales are made those of the second network afterwards. Scales help where some tool has moved them; two networks that were
    trained alike often come nearer without, so both is tried and the nearer kept. What is found is a fixed point, the best of
    several starts, and need not be the nearest of all. The copy computes what the first network does.

    With data, activations are matched instead of weights: each family gets the order of the largest sum of correlations
    between channels of the two networks, over the values that layers read. Scales do not matter to correlations. Signs
    are still fitted to weights, and families whose channels no value shows (those between two weights, or inside of stacked
    experts) matched by them.

    Args:
        model_a: the network to be copied and moved; untouched.
        model_b: another with the same parameters and the same graph; torch.compile, DistributedDataParallel, DataParallel and
            AveragedModel are looked through.
        args: positional inputs of both.
        kwargs: keyword inputs of both.
        rescale: True to bring scales to those of the second network (by weights, they stay where it would end farther away
            than it began), False to leave them, None for what comes nearer. In half precision None leaves them, unless
            `power_of_two` is given.
        flip: False to leave signs as they are.
        power_of_two: round scales to powers of two, as networks in half precision need: others would round their weights.
        starts: where the weights are, and where channels agree from the network's ends inwards, which comes first where one
            network was trained on from the other, unless that ends farther away; more than two are drawn at random.
        sweeps: most of each start.
        seed: of random starts.
        data: batches of positional inputs, each a tuple or one tensor of the shapes of args, to match activations on, in the
            mode that the networks are in; their activations are held in memory together. None to match weights.
        batch_norm: "affine", or "evaluation" for scales of the weights in front of batch normalization too, which hold in
            evaluation mode only; as in `symmetries`.
        opaque: names of submodules that are not looked into, as in `symmetries`.

    Returns:
        The copy, what moved it, and how far it is.

    Raises:
        RescaleError: if scales would round weights in half precision, without power_of_two.
        EquivalenceError: if rescale, flip, power_of_two or seed is something else; if the two have different parameters or
            graphs; if data hold no batch, one of other shapes, or give NaN or inf, or come with opaque modules, which the graph
            cannot run.
        PermutationError: if scipy is not installed.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, Sections 3.1 and 3.2, there with permutations written by
    hand; correlations as in Li, Yosinski, Clune, Lipson, Hopcroft, Convergent learning, ICLR 2016.

    >>> import copy, torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    >>> twin, x = copy.deepcopy(net), (torch.randn(1, 8),)
    >>> permutations = equinorm.permutations(twin, x)
    >>> permutations.permute_(permutations.random())
    >>> equinorm.align(net, twin, x).distance_after
    0.0
    """
    model_a, model_b = same_parameters(model_a, model_b)
    if rescale not in (None, True, False):
        raise EquivalenceError(f"rescale must be True, False or None, not {rescale!r}.")
    for name, given in (("flip", flip), ("power_of_two", power_of_two)):
        check_flag(given, name, EquivalenceError)
    if not is_whole(seed):
        raise EquivalenceError(f"seed must be a whole number, not {seed!r}.")
    check_count(starts, "starts")
    check_count(sweeps, "sweeps")
    check_batch_norm(batch_norm, model_a, model_b)
    same_dtypes(model_a, model_b)
    graphs = graphs_of(model_a, args, kwargs, opaque)
    other = symmetries(model_b, args, kwargs, batch_norm=batch_norm, opaque=opaque)
    both = same_group(symmetries_of(graphs, batch_norm), other)
    if data is not None and graphs.opaque:
        raise EquivalenceError(
            "activations are measured on the graph, which does not hold what opaque modules compute "
            f"({', '.join(graphs.opaque)}). Leave out data to match weights."
        )
    moves = Moves.of(graphs, with_points=data is not None)
    if not flip:
        moves = replace(moves, flips=replace(moves.flips, num_free=0))
    tried = {False, _is_scaled(both[0], power_of_two)} if rescale is None else {rescale}
    search = Search(starts, sweeps, seed)
    seen = None if data is None else measured((both[0].model, both[1].model), moves, data, args, kwargs)
    found = [_aligned(both, moves, search, seen, scales, power_of_two) for scales in sorted(tried)]
    if rescale and seen is None and found[0].distance_after > found[0].distance_before:
        found.append(_aligned(both, moves, search, seen, False, power_of_two))
    return min(found, key=lambda alignment: alignment.distance_after)


def _is_scaled(found: Symmetries, power_of_two: bool) -> bool:
    """Are there scales, and can weights take them?"""
    return found.num_free > 0 and (power_of_two or not any(scaling.dtype in HALVES for scaling in found.scalings))


def _aligned(
    both: tuple[Symmetries, Symmetries], moves: Moves, search: Search, seen: Seen | None, rescale: bool, power_of_two: bool
) -> Alignment:
    """The first network matched to the second, with scales or without."""
    rests = [_at_rest(found, rescale) for found in both]
    ours, theirs = (_weights(found, own) for found, (own, _) in zip(both, rests, strict=True))
    flips, order, taken = moves.assigned(ours, theirs, search, seen)
    twin = duplicate(both[0].model, "to permute the copy")
    moves.apply_(twin, flips, order)
    log_scales = torch.zeros(both[0].num_free, dtype=torch.float64)
    if rescale and both[0].num_free:
        own = replace(both[0], model=twin)
        log_scales = _joining(own, both[1], _at_rest(own, rescale), rests[1])
        if power_of_two:
            log_scales = round_to_powers_of_two(log_scales, [*own.scalings, *own.casts])
        own.rescale_(log_scales)
    before, after = (_distance(model, both[1].model) for model in (both[0].model, twin))
    return Alignment(twin, order, flips, log_scales, before, after, taken)


def _at_rest(found: Symmetries, rescale: bool) -> tuple[Tensor, Tensor]:
    """Log-scales at which a network is compared with another, and a mask of the classes that no path tells."""
    still = torch.zeros(found.num_free, dtype=torch.float64)
    return settled(found, found.balance(tol=TOLERANCE, biases=True)) if rescale else (still, still.bool())


def _joining(ours: Symmetries, theirs: Symmetries, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Log-scales from one network to the other: between their balances, or by weights where no path tells in one of them."""
    untold = one[1] | other[1]
    known = torch.where(untold, 0.0, one[0] - other[0])
    return joining(ours.scalings, ours.tensors, theirs.tensors, known, untold) if bool(untold.any()) else known


def _weights(found: Symmetries, log_scales: Tensor) -> Forms:
    """Every parameter after a rescaling; statistics of normalizations say nothing of distances and count as zero."""
    tensors = found.tensors
    for scaling in found.scalings:
        tensor = tensors[scaling.name]
        if tensor.is_meta or tensor.layout != torch.strided:
            raise EquivalenceError(f"{scaling.name} holds no dense numbers (on the meta device, or sparse). Load it.")
        if not bool(tensor.isfinite().all()):
            raise EquivalenceError(f"{scaling.name} holds NaN or inf, which is near to nothing.")
    whole = real(forms(found, log_scales, dtype_of(found)))
    return {**whole, **{s.name: torch.zeros_like(whole[s.name]) for s in found.scalings if s.kind == "buffer"}}


def _distance(one: nn.Module, other: nn.Module) -> float:
    """‖a − b‖₂ / ‖b‖₂ by names, in whatever order the two list them; inf where all of b is zero and a is not."""
    theirs = tensors_of(other)
    apart, whole = 0.0, 0.0
    for name, parameter in one.named_parameters():
        wide = torch.complex128 if parameter.is_complex() else torch.float64
        a, b = (tensor.detach().cpu().to(wide) for tensor in (parameter, theirs[name]))
        apart, whole = apart + float((a - b).abs().square().sum()), whole + float(b.abs().square().sum())
    return math.sqrt(apart / whole) if whole else math.inf if apart else 0.0
