"""Between two networks: weights on the straight line, and statistics of batch normalization measured again."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._arguments import batches_of, is_number
from equinorm._display import count
from equinorm._errors import EquivalenceError, describe, describe_inputs, warn
from equinorm._memory import storage_of
from equinorm.joining.same_architecture import same_dtypes, same_parameters
from equinorm.modules.choosing import tensors_of
from equinorm.modules.copying import duplicate
from equinorm.modules.running import in_mode, once


def interpolate(model_a: nn.Module, model_b: nn.Module, t: float, *, data: Iterable[tuple | Tensor] | None = None) -> nn.Module:
    """A copy of the first network with weights (1 − t)·a + t·b.

    Floating-point buffers are interpolated too; others are those of the first network. Numbers are rounded once, to the dtype
    that they are stored in; those that both networks share, infinite ones too, stay as they are. Statistics of batch
    normalization fit neither the one nor the other network's activations in between: give `data`, and they are measured again,
    as means over all of its batches.

    Args:
        model_a: the network at t = 0; untouched.
        model_b: that at t = 1, with the same parameters and buffers; see `align`.
        t: any finite number; beyond 0 and 1 the line goes on.
        data: batches of positional inputs, each a tuple or one tensor, to measure the statistics on; None leaves them as they
            come: interpolated, which is warned of where they differ.

    Returns:
        The copy, in the mode of the first network.

    Raises:
        EquivalenceError: if the two have different parameters or buffers, or these in different dtypes, tensors share memory in
            the first network whose numbers differ in the second, t is no finite number, or data hold no batch.

    Source: statistics as in REPAIR, Jordan, Sedghi, Saukh, Entezari, Neyshabur, ICLR 2023.

    >>> import torch, equinorm
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)) for _ in range(2))
    >>> middle = equinorm.interpolate(a, b, 0.5, data=[torch.randn(64, 4)])
    >>> torch.allclose(middle[0].weight, (a[0].weight + b[0].weight) / 2)
    True
    >>> bool((middle[1].running_mean != 0).any())
    True
    """
    one, other = same_parameters(model_a, model_b)
    if not is_number(t) or not math.isfinite(t):
        raise EquivalenceError(f"t must be a finite number, 0 for the first network and 1 for the second, not {t!r}.")
    same_dtypes(one, other)
    middle = duplicate(one, "to interpolate")
    ours, theirs = tensors_of(one), tensors_of(other)
    with torch.no_grad():
        _write_(middle, lambda name: _between(ours[name], theirs[name].to(ours[name].device), t))
    if data is not None:
        _measure_(middle, data)
    elif t not in (0, 1) and (apart := _moved_statistics(middle, theirs)):
        warn(
            f"{count(len(apart), 'running statistic')} of batch normalization, such as {apart[0]}, are interpolated: they do "
            "not fit the activations in between, and outputs may be far off. Give data=, batches to measure them on again."
        )
    return middle


def _write_(middle: nn.Module, wanted: Callable[[str], Tensor]) -> None:
    """Give all floating-point tensors other numbers; refuse where they lie in memory together and cannot have them."""
    found = {name: tensor for name, tensor in tensors_of(middle).items() if tensor.is_floating_point() or tensor.is_complex()}
    together: dict[int, list[str]] = {}
    for name, tensor in found.items():
        together.setdefault(storage_of(tensor), []).append(name)
        once(tensor).copy_(once(wanted(name), like=tensor))
    for names in (names for names in together.values() if len(names) > 1):
        for name in names:
            if not once(found[name]).allclose(once(wanted(name), like=found[name]), rtol=0, atol=0, equal_nan=True):
                raise EquivalenceError(
                    f"{' and '.join(names[:3])} share memory in the first network and hold different numbers in the second: no "
                    f"copy of the first holds what is in between, as {name}. Untie them in the first, or interpolate from the "
                    "second, interpolate(model_b, model_a, 1 - t)."
                )


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 − t)·a + t·b, rounded once; exactly a or b at the ends, and where both are equal."""
    if t in (0, 1):
        return b if t else a
    wide = torch.complex128 if a.is_complex() else torch.float64
    mixed = ((1 - t) * a.to(wide) + t * b.to(wide)).to(a.dtype)
    return torch.where(a == b, a, mixed) if a.layout == torch.strided else mixed


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
