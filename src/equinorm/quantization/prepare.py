"""Bring a network into the form in which quantizers round it: normalizations folded, bounded activations free to scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from equinorm._arguments import is_number
from equinorm._deviation import LIMITS, coarsest, deviation
from equinorm._display import and_more, as_html, by_reason, count, shortened
from equinorm._errors import EqualizeError, EquinormError, ExportError, check_module, describe
from equinorm.modules.choosing import Choice, chosen, unwrapped
from equinorm.modules.copying import duplicate
from equinorm.modules.exported import is_exported, parts_in_training
from equinorm.modules.running import on_cpu
from equinorm.quantization.clamp import Clamp
from equinorm.quantization.folding import fold_
from equinorm.quantization.freeing import free_
from equinorm.quantization.quantized import check_floats


@dataclass(frozen=True, slots=True)
class Preparation:
    """What was done to a network before it is quantized.

    Attributes:
        model: name of its class.
        folded: batch normalizations, and the layers into which each was folded.
        freed: bounded activations that became a `Clamp`, and how many bounds each has.
        left: what stayed as it was, and why.
        deviation: largest relative difference of outputs that all this made.
    """

    model: str
    folded: Mapping[str, str]
    freed: Mapping[str, int]
    left: Mapping[str, str]
    deviation: float

    def __str__(self) -> str:
        folded, freed = count(len(self.folded), "batch normalization"), count(len(self.freed), "bounded activation")
        groups = (
            ([f"{name} folded into {into}" for name, into in self.folded.items()], "in folded"),
            ([f"{name} set free: {count(number, 'bound')}" for name, number in self.freed.items()], "in freed"),
            (
                [f"{and_more(names, 4, 'modules')} left: {why}" for why, names in by_reason(self.left)],
                "reasons in left",
            ),
        )
        first = f"{self.model}: {folded} folded, {freed} set free, {len(self.left)} left; deviation {self.deviation:.1e}"
        return "\n  ".join([first, *(line for lines, where in groups for line in shortened(lines, 8, where))])

    def _repr_html_(self) -> str:
        return as_html(
            f"Preparation of {self.model}",
            [("deviation", f"{self.deviation:.1e}")],
            (("folded", "into"), [*self.folded.items()], "normalizations"),
            (("set free", "bounds"), [*self.freed.items()], "activations"),
            (("left", "why"), [*self.left.items()], "modules"),
        )


def patterns(free: bool | Sequence[str]) -> Sequence[str]:
    """What is to be set free, as patterns of names.

    Raises:
        EqualizeError: if it is neither a truth value nor names.
    """
    found = (["*"] if free else []) if isinstance(free, bool) else [free] if isinstance(free, str) else free
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) for one in found):
        raise EqualizeError(f"free must be True, False or names of bounded activations, not {free!r}.")
    return found


@on_cpu()
def prepare(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    fold: bool = True,
    free: bool | Sequence[str] = True,
    opaque: Choice = (),
    limit: float | None = None,
) -> tuple[nn.Module, Preparation]:
    """A copy of a network that computes the same in the form in which quantizers round it.

    Batch normalization is folded, y = γ(Wx + b − μ)/√(σ² + ε) + β = W'x + b', into the layer in front wherever it alone reads
    that layer's output, several layers side by side included; otherwise into the layers behind, where these do not pad with
    zeros. It leaves an nn.Identity. ReLU6 and Hardtanh become a `Clamp` with one bound for each channel, which scales with the
    channel; `settle_` turns those that stayed equal back. What cannot be folded or set free is left, and the record says why.

    Args:
        model: any module in evaluation mode that `torch.export` can handle and `copy.deepcopy` can copy. It is untouched.
        args: its positional inputs.
        kwargs: its keyword inputs.
        fold: fold batch normalization.
        free: set bounded activations free; or names of those, as patterns ("features.1.*"): runtimes that fold ReLU6 into the
            layer in front run each of the others as an operation of its own.
        opaque: names or submodules that are not looked into, as in `symmetries`.
        limit: on the deviation of the copy; None: 1e-12 in float64, 1e-5 in float32, 1e-2 in float16 and 8e-2 in bfloat16.

    Returns:
        The copy, an ordinary nn.Module, and what was done to it.

    Raises:
        EqualizeError: if the model is in training mode or quantized already, the limit is no number, or the copy would compute
            something else.
        EquinormError: if the model cannot be copied or exported.

    Source: folding as in `torch.nn.utils.fusion`; Nagel et al., ICCV 2019, where bounds are dropped instead.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU6(), torch.nn.Conv2d(8, 4, 3))
    >>> prepared, preparation = equinorm.quantization.prepare(net.eval(), (torch.randn(1, 3, 9, 9),))
    >>> dict(preparation.folded), dict(preparation.freed)
    ({'1': '0'}, {'2': 8})
    >>> equinorm.symmetries(net, (torch.randn(1, 3, 9, 9),)).num_free
    0
    >>> equinorm.symmetries(prepared, (torch.randn(1, 3, 9, 9),)).num_free
    8
    """
    check_module(model, EqualizeError)
    if limit is not None and not (is_number(limit) and limit >= 0):
        raise EqualizeError(f"limit must be None or a number from 0, not {limit!r}.")
    model = unwrapped(model)
    check_state(model)
    hidden = list(chosen(model, opaque, ExportError, "opaque"))
    prepared = duplicate(model, "to prepare the copy")
    try:
        folded, left = fold_(prepared, args, kwargs, hidden) if fold else ({}, {})
        freed, bound = free_(prepared, args, kwargs, hidden, patterns(free)) if free else ({}, {})
        if not is_exported(prepared):
            prepared.eval()  # also what was put in
        apart = deviation(model, prepared, args, kwargs)
    except EquinormError:
        _check_reads(model, prepared, args, kwargs)
        raise
    found = Preparation(describe(model), folded, freed, left | bound, apart)
    _check_deviation(found, LIMITS[coarsest(model)] if limit is None else limit)
    return prepared, found


def check_state(model: nn.Module) -> None:
    """Refuse a model that is quantized already, or in training mode."""
    check_floats(model)
    if trained := parts_in_training(model):
        where = f", as {trained[0]}" if trained[0] else ""
        raise EqualizeError(
            f"{describe(model)} is in training mode{where}, and what is quantized runs in evaluation mode: model.eval()."
        )


def _check_reads(model: nn.Module, prepared: nn.Module, args: tuple | Tensor, kwargs: Mapping[str, Any] | None) -> None:
    """Refuse a model that asks modules for what those in their places do not have, as it does if only the copy lacks it."""
    try:
        deviation(prepared, prepared, args, kwargs)
    except EquinormError as error:
        why = error.__cause__
        if isinstance(why, AttributeError) and isinstance(why.obj, (nn.Identity, nn.ReLU, Clamp)):
            raise EqualizeError(
                f"{describe(model)} reads the attribute {why.name!r} of a batch normalization or bounded activation, which is "
                "another module in the copy. Give fold=False or free=False to equinorm.quantization.prepare, and its copy to "
                "equalize_."
            ) from error


def _check_deviation(found: Preparation, limit: float) -> None:
    """Refuse a copy that computes something else."""
    if not found.deviation <= limit:
        raise EqualizeError(
            f"the prepared copy of {found.model} deviates by {found.deviation:.1e}, more than {limit:.0e}: {len(found.folded)} "
            f"batch normalizations were folded and {len(found.freed)} activations set free. Take double precision, or give "
            "fold=False, free=False or a larger limit to equinorm.quantization.prepare, and its copy to equalize_; "
            "inplace=False for activations whose input is read again."
        )
