"""Equalize: choose the scales of a network at which rounding its numbers costs least."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from equinorm._errors import EqualizeError, ExportError, check_module
from equinorm.modules.choosing import Choice, chosen, unwrapped
from equinorm.modules.running import on_cpu
from equinorm.quantization.equalization import Equalization
from equinorm.quantization.freeing import settle_
from equinorm.quantization.prepare import check_state, prepare
from equinorm.quantization.scheme import Scheme, scheme_of
from equinorm.quantization.solve import EqualizeOptions, Progress, solve_


@on_cpu()
def equalize(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    scheme: Scheme | str = Scheme(),  # noqa: B008 -- it is frozen
    largest: float = 1e8,
    power_of_two: bool = False,
    bias_correction: bool = False,
    tol: float = 5e-3,
    opaque: Choice = (),
    progress: Progress | None = None,
) -> Equalization:
    """An equalized copy of a network: of all rescalings that keep its function, the one that loses least when rounded.

    Minimises the energy of rounding errors at the outputs, to first order,

        N(z) = Σ_g r_g(z)² / (12 levels²) · Σ_{i in g} F_i e^(−2 λ_i(z)),

    over log-scales z of the prepared copy (normalizations folded, bounded activations set free, see `prepare`), where g are the
    groups of numbers that share a step, r_g the range of a group, λ_i the log-scale of a number, and F_i how much an error in
    it matters: E Σ_k (∂y_k/∂w_i)² over the calibration data. Ranges of activations are those that many more samples should
    keep, by how the largest entries of samples are spread. N is convex, so the minimum is global; `Equalization.gap` estimates
    how far the minimum that was found is above it. Then measurement has the last word. Parts of the log-scales are rounded
    for real, and the smallest that is as good as the best, for all that samples tell, is taken: it leaves most room. So are the
    log-scales of least norm, and neighbours; one that surely loses less is taken. If the rounded network still lost more than
    as it was, less of the log-scales is taken, or none. `reason` says what was done.

    Args:
        model: any module in evaluation mode that `torch.export` can handle and `copy.deepcopy` can copy. It is untouched.
        args: its positional inputs, an example.
        kwargs: its keyword inputs.
        calibration: batches of inputs, each a tuple (or a tensor, or a dict of keyword inputs), of any batch size. Tens of
            samples tell what matters; bounds of activations are better from hundreds. None: random inputs with the mean and
            spread of `args`, integers as they are; the scales are nearly as good, but the bounds are wrong, so measure on data.
        scheme: what will be rounded to how many bits, or its short form, as "w8a8".
        largest: no free scale is larger than this, or smaller than its inverse.
        power_of_two: round scales to powers of two. Then the float network is bitwise the same, and the noise larger.
        bias_correction: also add to biases what rounding shifts on average. The copy then differs from the model in float, by
            what makes up for rounding with this scheme.
        tol: on the gap.
        opaque: names or submodules that are not looked into, as in `symmetries`.
        progress: called with what is done ("calibration", then "measuring"), how far, and of how much.

    Returns:
        The copy and the record.

    Raises:
        EqualizeError: for inputs, data or schemes that do not fit, and networks with nothing to quantize.
        EquinormError: if the model cannot be copied or exported.

    Source: convexity of ℓp balancing (Stock et al., ICLR 2019) with the noise of uniform rounding in place of the norm.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    >>> x = torch.randn(32, 8)
    >>> result = equinorm.equalize(net, (x,), calibration=[(x,)], scheme="w8a8-tensor")
    >>> result.converged, result.measured_after >= result.measured_before
    (True, True)
    >>> equinorm.deviation(net, result.model, (x,)) < 1e-5
    True
    """
    options = EqualizeOptions(scheme_of(scheme), largest, power_of_two, bias_correction, tol, opaque, progress)
    check_module(model, EqualizeError)
    hidden = list(chosen(unwrapped(model), opaque, ExportError, "opaque"))
    prepared, preparation = prepare(model, args, kwargs, opaque=hidden)
    found = solve_(prepared, args, kwargs, calibration, replace(options, opaque=hidden))
    settle_(prepared)
    return replace(found, preparation=preparation)


@on_cpu()
def equalize_(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    scheme: Scheme | str = Scheme(),  # noqa: B008 -- it is frozen
    largest: float = 1e8,
    power_of_two: bool = False,
    bias_correction: bool = False,
    tol: float = 5e-3,
    opaque: Choice = (),
    progress: Progress | None = None,
) -> Equalization:
    """Equalize a network in place: as `equalize`, but its parameters stay the same objects, and no module is replaced.

    So batch normalization stays as it is, though quantizers will fold it, and what is bounded (ReLU6) stays pinned: give what
    `equinorm.quantization.prepare` makes of such a network. Nothing is written before all is known to be valid: what `equalize`
    refuses is refused, and tensors that cannot be rescaled in place.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    >>> equinorm.equalize_(net, torch.randn(32, 8), scheme="w8a8-tensor").model is net
    True
    """
    options = EqualizeOptions(scheme_of(scheme), largest, power_of_two, bias_correction, tol, opaque, progress)
    check_module(model, EqualizeError)
    check_state(unwrapped(model))
    return solve_(unwrapped(model), args, kwargs, calibration, options)
