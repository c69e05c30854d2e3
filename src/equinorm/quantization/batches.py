"""Batches: the inputs of calls, as users give them, drawn at random, and cut."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equinorm._arguments import positional
from equinorm._deviation import LIMITS, coarsest, difference
from equinorm._errors import EqualizeError, describe, describe_inputs
from equinorm.modules.exported import takes_one_size
from equinorm.modules.running import by_default, names_by_position, undisturbed, without_cache

Batch = tuple[tuple, dict[str, Any]]
"""Positional and keyword inputs of one call."""

DRAWN = 32
"""Samples that are drawn at random where there are no data."""

ALIKE = 1e-3
"""Relative difference of outputs up to which rows are treated each by itself."""


def floats_in(result: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in what a network returns."""
    return [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor) and value.is_floating_point()]


def rows(batch: Batch) -> int:
    """Size of the first axis that all tensors of a batch share; 1 if there is none."""
    sizes = {value.shape[0] if value.dim() else 0 for value in pytree.tree_leaves(batch) if isinstance(value, Tensor)}
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else 1


def split_rows(batch: Batch, size: int) -> list[Batch]:
    """A batch, so many rows at a time."""
    total = rows(batch)

    def cut(start: int) -> Batch:
        return pytree.tree_map_only(Tensor, lambda value: value[start : start + size], batch)

    return [batch] if total <= size else [cut(start) for start in range(0, total, size)]


def first_rows(batches: Sequence[Batch], most: int, *, cuts: bool = True) -> list[Batch]:
    """The first batches, of so many rows together: at least one, cut if it has more and may be."""
    found: list[Batch] = []
    for batch in batches:
        if most <= 0:
            break
        found.append(split_rows(batch, most)[0] if cuts else batch)
        most -= rows(found[-1])
    return found


def calibration_batches(calibration: Any, model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> list[Batch]:
    """Batches as the user gives them: tensors, tuples of positional inputs, dicts of keyword inputs.

    Raises:
        EqualizeError: if there are none, or one does not have the inputs of the example.
    """
    named = dict(kwargs or {})
    if isinstance(calibration, (Tensor, Mapping, str)) or not hasattr(calibration, "__iter__"):
        what = "a tensor" if isinstance(calibration, Tensor) else f"a {type(calibration).__name__}"
        raise EqualizeError(f"calibration must be several batches, each a tuple of inputs, not {what}. For one: [(x,)].")
    found: list[Batch] = []
    for number, given in enumerate(calibration):
        if isinstance(given, Mapping):
            batch, like = ((), {**named, **given}), ((), named)
        else:
            inputs = positional(given, EqualizeError, f"calibration batch {number}")
            taken = names_by_position(model, inputs)
            batch, like = (inputs, {name: value for name, value in named.items() if name not in taken}), (args, named)
        _check_like(batch, like, number, describe(model))
        tensors = [value for value in pytree.tree_leaves(batch) if isinstance(value, Tensor)]
        if tensors and not any(value.numel() for value in tensors):
            raise EqualizeError(f"calibration batch {number} has no rows: leave it out.")
        found.append(batch)
    if not found:
        raise EqualizeError("calibration holds no batch. Give tens of samples, or None to draw random inputs.")
    return found


def _check_like(batch: Batch, example: Batch, number: int, model: str) -> None:
    """Refuse a batch that differs from the example in more than the size of its first axis."""
    given, wanted = batch[0], example[0]
    shapes = f"{describe_inputs(*batch)}, and {model} was analysed with {describe_inputs(*example)}"
    if wanted and len(given) != len(wanted):
        way = (
            " Leave out what the model does not take, as labels: [(x,) for x, _ in loader]." if len(given) > len(wanted) else ""
        )
        raise EqualizeError(f"calibration batch {number} has inputs {shapes}: the number of inputs differs.{way}")
    for one, other in zip(given, wanted, strict=False):
        if isinstance(other, Tensor) and (not isinstance(one, Tensor) or one.dim() != other.dim()):
            raise EqualizeError(f"calibration batch {number} has inputs {shapes}: they may differ in sizes alone.")


def watched(model: nn.Module, batch: Batch, number: int, watch: AbstractContextManager[Any]) -> Any:
    """What a model returns for a calibration batch while something watches.

    Raises:
        EqualizeError: if it does not run, or as what watches does.
    """
    args, kwargs = batch
    kwargs = without_cache(model, args, kwargs)
    try:
        with watch:
            return model(*args, **kwargs)
    except EqualizeError:
        raise
    except Exception as error:
        raise EqualizeError(
            f"{describe(model)} does not run on calibration batch {number}, {describe_inputs(args, kwargs)}: "
            f"{type(error).__name__}: {error}. Each batch must be a tuple of the model's inputs, as args is."
        ) from error


def run_undisturbed(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, *watches: AbstractContextManager[Any]
) -> Any:
    """What a model returns while something watches; its buffers are as before, and so are random numbers."""
    with ExitStack() as stack:
        for watch in (undisturbed(model), by_default(), *watches):
            stack.enter_context(watch)
        return model(*args, **without_cache(model, args, dict(kwargs or {})))


def may_be_cut(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Does a network treat the rows of a batch each by itself? Both halves of one then give what the whole gives.

    Not so where rows are steps in time or nodes of a graph, where an input such as a mask belongs to all rows, and in graphs
    that were exported for one size.
    """
    batch = next((batch for batch in batches if rows(batch) > 1), None)
    if batch is None or takes_one_size(model):
        return batch is None
    try:
        with torch.no_grad():
            whole, *parts = (
                floats_in(run_undisturbed(model, *part)) for part in (batch, *split_rows(batch, math.ceil(rows(batch) / 2)))
            )
            joined = [torch.cat(both) for both in zip(*parts, strict=True)]
    except Exception:
        return False
    limit = max(ALIKE, LIMITS[coarsest(model)])
    return all(one.shape == other.shape and difference(one, other) <= limit for one, other in zip(joined, whole, strict=True))


def random_batches(args: tuple, kwargs: Mapping[str, Any] | None) -> list[Batch]:
    """Normal numbers of the mean and standard deviation of the example inputs; those that are no floats stay."""
    generator = torch.Generator().manual_seed(0)

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return value
        spread = value.std() if value.numel() > 1 else 1.0
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return (noise.to(value.device, value.dtype) * spread + value.mean()).to(value.dtype)

    batch = (tuple(args), dict(kwargs or {}))
    return [pytree.tree_map(drawn, batch) for _ in range(math.ceil(DRAWN / rows(batch)))]
