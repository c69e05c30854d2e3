"""Between two networks: weights on the straight line, and statistics of batch normalization measured again."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._arguments import batches_of
from equinorm._deviation import check_model
from equinorm._display import count
from equinorm._errors import EquivalenceError, describe, describe_inputs, warn
from equinorm.joining.same_architecture import same_dtypes, same_parameters
from equinorm.modules.choosing import unwrapped
from equinorm.modules.copying import duplicate
from equinorm.modules.running import in_mode


def interpolate(model_a: nn.Module, model_b: nn.Module, t: float, *, data: Iterable[tuple | Tensor] | None = None) -> nn.Module:
    """A copy of the first network with weights (1 − t)·a + t·b.

    Floating-point buffers are interpolated too; others are those of the first network. Statistics of batch normalization fit
    neither the one nor the other network's activations in between: give `data`, and they are measured again, as means over all
    of its batches.

    Args:
        model_a: the network at t = 0; untouched.
        model_b: that at t = 1, with the same parameters and buffers; see `align`.
        t: any finite number; beyond 0 and 1 the line goes on.
        data: batches of positional inputs, each a tuple or one tensor, to measure the statistics on; None leaves them as they
            come: interpolated, which is warned of where they differ.

    Returns:
        The copy, in the mode of the first network.

    Raises:
        EquivalenceError: if the two have different parameters or buffers, or these in different dtypes, t is no finite number,
            or data hold no batch.

    Source: statistics as in REPAIR, Jordan, Sedghi, Saukh, Entezari, Neyshabur, ICLR 2023.

    >>> import torch, equinorm
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)) for _ in range(2))
    >>> middle = equinorm.interpolate(a, b, 0.5, data=[torch.randn(64, 4)])
    >>> torch.allclose(middle[0].weight, (a[0].weight + b[0].weight) / 2)
    True
    >>> bool((middle[1].running_mean != 0).any())
    True
    """
    for model in (model_a, model_b):
        check_model(model)
    if isinstance(t, bool) or not isinstance(t, (int, float)) or not math.isfinite(t):
        raise EquivalenceError(f"t must be a finite number, 0 for the first network and 1 for the second, not {t!r}.")
    one, other = unwrapped(model_a), unwrapped(model_b)
    same_parameters(one, other)
    same_dtypes(one, other)
    middle = duplicate(one, "to interpolate")
    theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*middle.named_parameters(), *middle.named_buffers()]:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.copy_((1 - t) * tensor + t * theirs[name].to(tensor.device, tensor.dtype))
    if data is not None:
        _measure_(middle, data)
    elif t not in (0, 1) and (apart := _moved_statistics(middle, theirs)):
        warn(
            f"{count(len(apart), 'running statistic')} of batch normalization, such as {apart[0]}, are interpolated: they do "
            "not fit the activations in between, and outputs may be far off. Give data=, batches to measure them on again."
        )
    return middle


def _moved_statistics(middle: nn.Module, theirs: Mapping[str, Tensor]) -> list[str]:
    """Names of running statistics that are no longer those of the second network; nor, then, of the first."""
    norms = [name for name, module in middle.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    own = dict(middle.named_buffers())
    names = [f"{name}.{key}".lstrip(".") for name in norms for key in ("running_mean", "running_var")]
    return [n for n in names if n in own and not own[n].is_meta and not torch.equal(own[n], theirs[n].to(own[n]))]


def _measure_(model: nn.Module, data: Iterable[tuple | Tensor]) -> None:
    """Make running statistics those of these batches, all else in evaluation mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None]
    with in_mode(model, False), _momenta_kept(norms), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for number, batch in enumerate(batches_of(data)):
            try:
                model(*batch)
            except Exception as error:
                raise EquivalenceError(
                    f"{describe(model)} does not run on batch {number} of data, {describe_inputs(batch, {})}: "
                    f"{type(error).__name__}: {error}. Give positional inputs alone, without labels."
                ) from error


@contextlib.contextmanager
def _momenta_kept(norms: list[Any]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
