"""Functional equivalence: how far two models' outputs are apart, and whether a rescaling joins their weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equinorm._errors import EquivalenceError, describe, describe_inputs
from equinorm._modules import by_default, on_cpu, undisturbed, without_cache
from equinorm._rescale import scaled
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries, symmetries


@on_cpu()
def deviation(model_a: nn.Module, model_b: nn.Module, args: tuple | Tensor, kwargs: Mapping[str, Any] | None = None) -> float:
    """Largest relative output difference: max over output tensors of ‖a − b‖_∞ / ‖b‖_∞ (0 where both vanish).

    Both models run as they are (training or evaluation mode) on the same random numbers; their buffers are restored.

    Args:
        model_a: one model.
        model_b: the model to compare it with.
        args: positional inputs of both.
        kwargs: keyword inputs of both.

    Returns:
        The deviation; 0.0 means bitwise equal values, inf that only one of them is finite.

    Raises:
        EquivalenceError: if the outputs differ in structure or shape, or the inputs are no tuple.

    >>> import torch, equinorm
    >>> net = torch.nn.Linear(3, 2)
    >>> equinorm.deviation(net, net, (torch.randn(5, 3),))
    0.0
    """
    if not isinstance(args, (Tensor, tuple, list)):
        raise EquivalenceError(f"args must be a tuple of inputs, not {type(args).__name__}.")
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    outputs = [_run(model, args, dict(kwargs or {})) for model in (model_a, model_b)]
    (flat_a, spec_a), (flat_b, spec_b) = (pytree.tree_flatten(output) for output in outputs)
    if spec_a != spec_b:
        names = f"{describe(model_a)} and {describe(model_b)}"
        raise EquivalenceError(f"{names} return different structures: {spec_a} and {spec_b}.")
    worst = 0.0
    for number, (a, b) in enumerate(zip(flat_a, flat_b, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            worst = max(worst, 0.0 if a == b else float("inf"))
            continue
        if a.shape != b.shape:
            raise EquivalenceError(f"output {number} has shape {tuple(a.shape)} in one model, {tuple(b.shape)} in the other.")
        worst = max(worst, _difference(a, b))
    return worst


def _difference(a: Tensor, b: Tensor) -> float:
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to("cpu", wide), b.to("cpu", wide)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    apart = (a - b)[~same].abs()
    if not bool(apart.isfinite().all()):
        return float("inf")
    scale = b[b.isfinite()].abs().max()
    return float(apart.max() / scale) if scale > 0 else float("inf")


def _run(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    kwargs = without_cache(model, args, kwargs)
    with undisturbed(model):
        try:
            copies = pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
            with by_default():
                return model(*copies[0], **copies[1])
        except Exception as error:
            raise EquivalenceError(
                f"{describe(model)} does not run on inputs {describe_inputs(args, kwargs)}: {type(error).__name__}: {error}"
            ) from error


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
TOLERANCES |= {torch.complex64: 1e-4, torch.complex128: 1e-9}
"""Default tolerance of `equivalence` by the narrowest dtype of the weights: some hundred roundings."""


@dataclass(frozen=True, slots=True, eq=False)
class Equivalence:
    """Are two networks rescaling-equivalent, and by which scales?

    Attributes:
        equivalent: is `difference` at most `tolerance`?
        log_scales: float64 natural logarithms of shape (num_free,) that take the weights of the first model to those of the
            second; the best there are where the two are not equivalent.
        difference: largest relative difference between the canonical forms: over all channels (slices along axis 0) of all
            tensors, ‖a − b‖_∞ / max(‖a‖_∞, ‖b‖_∞).
        tolerance: what `difference` was compared with.
        different: name and difference of every tensor above the tolerance, worst first.
        deviation: largest relative difference of outputs on the given inputs.
    """

    equivalent: bool
    log_scales: Tensor = field(repr=False)
    difference: float
    tolerance: float
    different: tuple[tuple[str, float], ...]
    deviation: float

    def __str__(self) -> str:
        verdict = "rescaling-equivalent" if self.equivalent else "not rescaling-equivalent"
        lines = [
            f"{verdict}: canonical forms differ by {self.difference:.1e} (tolerance {self.tolerance:g}), "
            f"outputs by {self.deviation:.1e}"
        ]
        return "\n".join(lines + [f"  {name}: {difference:.1e}" for name, difference in self.different])


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
    """Decide whether some rescaling of channels takes one network's weights to another's.

    Both are brought to their canonical form, the member of least ℓ2 norm (biases included), and compared there. Channels that
    no path of nonzero weights joins to an input and an output have no canonical scale; theirs are fitted to the logarithms of
    the ratios of weights. Neither model is changed. Permutations of channels and flips of sign are not looked for.

    Args:
        model_a: one network.
        model_b: another with the same parameters (names, shapes, ties) and the same graph.
        args: positional inputs of both.
        kwargs: keyword inputs of both.
        tolerance: on the relative difference of canonical forms; None for 1e-9 in float64, 1e-4 in float32, 3e-2 in float16,
            2e-1 in bfloat16.
        opaque: names of submodules that are not looked into, as in `symmetries`.

    Raises:
        EquivalenceError: if the two have different parameters or graphs, or if a canonical form was not reached.

    >>> import copy, torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> twin = copy.deepcopy(net)
    >>> equinorm.balance_(twin, (torch.randn(1, 8),)).converged
    True
    >>> equinorm.equivalence(net, twin, (torch.randn(1, 8),)).equivalent
    True
    """
    _same_parameters(model_a, model_b)
    both = symmetries(model_a, args, kwargs, opaque=opaque), symmetries(model_b, args, kwargs, opaque=opaque)
    _same_group(*both)
    tensors = both[0].tensors, both[1].tensors
    z, dead = [], torch.zeros(both[0].num_free + 1, dtype=torch.bool)
    for found in both:
        balance = found.balance(tol=1e-12, biases=True)
        if not balance.converged:
            raise EquivalenceError(f"the canonical form of {describe(found.model)} was not reached: {balance.reason}.")
        z.append(torch.cat([torch.zeros(1, dtype=torch.float64), balance.log_scales]))
        dead[list(balance.dead)] = True
    if bool(dead.any()):
        connecting = torch.where(dead, 0.0, z[0] - z[1])
        connecting = _fit(both[0].scalings, *tensors, connecting, dead)
        z[0], z[1] = torch.where(dead, connecting, z[0]), torch.where(dead, 0.0, z[1])
    differences: list[tuple[str, float]] = []
    for scaling in both[0].scalings:
        a, b = (
            scaled(_dense(scaling.effective(tensors[i][scaling.name])), [e * z[i][ids] for e, ids in scaling.factors])
            for i in (0, 1)
        )
        differences.append((scaling.name, _relative(a, b)))
    if tolerance is None:
        narrowest = max((torch.finfo(s.dtype).eps, s.dtype) for s in both[0].scalings)[1] if both[0].scalings else torch.float64
        tolerance = TOLERANCES[narrowest]
    worst = max((difference for _, difference in differences), default=0.0)
    different = sorted((pair for pair in differences if pair[1] > tolerance), key=lambda pair: -pair[1])
    apart = deviation(model_a, model_b, args, kwargs)
    return Equivalence(worst <= tolerance, (z[0] - z[1])[1:], worst, tolerance, tuple(different), apart)


def _same_parameters(model_a: nn.Module, model_b: nn.Module) -> None:
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


def _same_group(a: Symmetries, b: Symmetries) -> None:
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
    a, b = (x.reshape(x.shape[0], -1) if x.dim() else x.reshape(1, 1) for x in (a, b))
    if not a.numel():
        return 0.0
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).amax(1)
    scale = torch.maximum(a.abs(), b.abs()).amax(1)
    return float(torch.nan_to_num(torch.where(apart == 0, 0.0, apart / scale), nan=math.inf).max())


def _fit(scalings: Sequence[Scaling], a: Mapping[str, Tensor], b: Mapping[str, Tensor], known: Tensor, dead: Tensor) -> Tensor:
    """Fill in the log-scales of dead classes by least squares on log |b / a|, where both are nonzero."""
    place = torch.full((len(dead),), -1)
    place[dead] = torch.arange(int(dead.sum()))
    size = int(dead.sum())
    normal, right = torch.zeros(size * size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for scaling in scalings:
        if not any(bool(dead[ids].any()) for _, ids in scaling.factors):
            continue
        one, other = (scaling.effective(tensors[scaling.name]).cpu().double().abs() for tensors in (a, b))
        ratio = (other / one).log()
        for exponent, ids in scaling.factors:
            ratio = ratio - exponent * known[ids]
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
