"""Scales that users wish for on some axes, and the nearest that leave the network's function as it is."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import RescaleError, describe, dtype_name
from equinorm._scaling import Scaling
from equinorm.rescaling.least_squares import Equations, conjugate_gradients
from equinorm.rescaling.orbit import Orbit

REDUCTIONS = ("geometric mean", "maximum", "minimum")
"""Ways to make one scale of those that are wished for on channels of one class."""

Wishes = Mapping[tuple[str, int | tuple[int, ...]], Any]


def nearest(orbit: Orbit, wishes: Wishes, reduce: str) -> Tensor:
    """Free log-scales nearest to wishes; see `GroupedOrbit.scales`."""
    if reduce not in REDUCTIONS:
        raise RescaleError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}, not {reduce!r}.")
    if not isinstance(wishes, Mapping) or not wishes:
        raise RescaleError('wishes must be a dict such as {("norm.weight", 0): scales}, with at least one entry.')
    scalings = {name: scaling for scaling in orbit.scalings for name in scaling.names}
    equations = []
    for key, wished in wishes.items():
        scaling, axes = _place(orbit, scalings, key)
        terms = _terms(scaling, axes)
        logs = _logs(scaling, axes, wished)
        _check_free(orbit, scaling, axes, terms)
        equations.append(Equations(tuple(terms), torch.ones_like(logs), logs))
    if reduce == "geometric mean":
        return conjugate_gradients(equations, orbit.num_free)
    return _extreme(equations, orbit.num_free, reduce)


def _place(orbit: Orbit, scalings: Mapping[str, Scaling], key: Any) -> tuple[Scaling, tuple[int, ...]]:
    """The tensor and the axes that a wish is about."""
    if not isinstance(key, tuple) or len(key) != 2 or not isinstance(key[0], str):
        raise RescaleError(f"a wish is for (name of a tensor, axis), such as ('norm.weight', 0), not for {key!r}.")
    name, axis = key
    if name not in scalings:
        near = [other for other in scalings if other.startswith(f"{name}.")] or list(scalings)[:8]
        raise RescaleError(
            f"{describe(orbit.model)} has no tensor {name!r} that could scale. Some that it has: {', '.join(near)}."
        )
    scaling, rank = scalings[name], len(scalings[name].shape)
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(isinstance(one, int) and -rank <= one < rank for one in axes):
        raise RescaleError(f"{name} of shape {scaling.shape} has no axis {axis!r}.")
    places = sorted({one % rank for one in axes})
    if len(places) < len(axes):
        raise RescaleError(f"{name}: {axis!r} names an axis twice.")
    return scaling, (*places,)


def _terms(scaling: Scaling, axes: tuple[int, ...]) -> list[tuple[float, Tensor]]:
    """Exponents and ids along these axes, flat. What moves all entries alike belongs to no axis, or to one of one channel."""
    found = []
    for exponent, ids in scaling.factors:
        varies = {axis for axis in range(ids.dim()) if ids.size(axis) > 1}
        if not varies:
            varies = {axis for axis in axes if scaling.shape[axis] == 1}
        if varies & {*axes} and not varies <= {*axes}:
            raise RescaleError(
                f"{scaling.name} of shape {scaling.shape} scales along axes {tuple(sorted(varies))} together, not along "
                f"{axes} alone: give the scales of ({scaling.name!r}, {tuple(sorted(varies))})."
            )
        if varies <= {*axes} and (varies or not axes):
            sizes = [scaling.shape[axis] if axis in axes else 1 for axis in range(ids.dim())]
            found.append((exponent, ids.expand(sizes).reshape(-1)))
    return found


def _logs(scaling: Scaling, axes: tuple[int, ...], wished: Any) -> Tensor:
    """Natural logarithms of the scales that are wished for, flat."""
    sizes = tuple(scaling.shape[axis] for axis in axes)
    what = f"the scales of {scaling.name}, {_in_words(axes)},"
    try:
        given = torch.as_tensor(wished).detach()
        scales = given.to("cpu", torch.float64) if not given.is_complex() else None
    except (TypeError, ValueError, RuntimeError) as error:
        raise RescaleError(f"{what} must be numbers: {error}.") from error
    if scales is None:
        raise RescaleError(f"{what} must be real numbers, not {dtype_name(given.dtype)}.")
    if tuple(scales.shape) != sizes:
        raise RescaleError(
            f"{what} must have shape {sizes}, as the tensor has shape {scaling.shape}; not {tuple(scales.shape)}."
        )
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise RescaleError(f"{what} must be finite and positive.")
    return scales.log().reshape(-1)


def _check_free(orbit: Orbit, scaling: Scaling, axes: tuple[int, ...], terms: Sequence[tuple[float, Tensor]]) -> None:
    """Refuse wishes of which nothing can come true."""
    if any(bool((ids > 0).any()) for _, ids in terms):
        return
    pins = [pin for pin in orbit.pins if pin.tensor in scaling.names and pin.axis in axes]
    why = f" It is pinned by {pins[0].reason}." if pins else " Its scale is pinned: see print(symmetries.details())."
    where = f"along {_in_words(axes)}" if axes else "as a whole"
    raise RescaleError(f"{scaling.name} cannot scale {where} (shape {scaling.shape}).{why}")


def _in_words(axes: tuple[int, ...]) -> str:
    return f"axis {', '.join(map(str, axes))}" if axes else "one for the whole tensor"


def _extreme(equations: Sequence[Equations], size: int, reduce: str) -> Tensor:
    """The largest or smallest wish for a class, where a channel has one class only.

    Axes of one class may move inversely, as those of keys do to queries: the one that is named first decides.
    """
    parts, start = [], 0
    for one in equations:
        for exponent, ids in one.factors:
            free = (ids > 0).nonzero()[:, 0]
            parts.append((start + free, ids[free] - 1, torch.full(free.shape, exponent, dtype=torch.float64)))
        start += len(one.wanted)
    row, column, entry = (torch.cat(part) for part in zip(*parts, strict=True))
    targets = torch.cat([one.wanted for one in equations])
    if bool((torch.bincount(row) > 1).any()):
        raise RescaleError(f"a channel that scales with several classes has no {reduce}: ask for reduce='geometric mean'.")
    first = torch.full((size,), len(row)).scatter_reduce_(0, column, torch.arange(len(row)), "amin")
    sign = torch.cat([entry.sign(), torch.zeros(1, dtype=torch.float64)])[first]
    asked = targets[row] / entry * sign[column]
    found = torch.zeros(size, dtype=torch.float64)
    found.scatter_reduce_(0, column, asked, "amax" if reduce == "maximum" else "amin", include_self=False)
    return found * sign
