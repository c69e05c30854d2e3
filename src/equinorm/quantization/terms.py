"""Terms: the tensors that a scheme rounds, brought into the form in which their noise is summed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from equinorm._scaling import Scaling
from equinorm.quantization.noise import Map, Term, small
from equinorm.quantization.operands import Place
from equinorm.quantization.outputs import Output
from equinorm.quantization.points import Point
from equinorm.quantization.scheme import Scheme, levels
from equinorm.quantization.statistics import ActivationStatistics, Statistics

FLOOR = 1e-6
"""Least sensitivity and range of a channel, in parts of its tensor's mean or largest: none is free to vanish."""


def weight_term(weight: Tensor, sensitivity: Tensor, scaling: Scaling, point: Point) -> Term:
    """The noise of one weight.

    Axes along which entries share their scale and step, such as those of a kernel, are reduced at once: the largest of them and
    the sum of their sensitivities tell all.
    """
    scheme, kernel = point.scheme, weight[0, 0].numel() if weight.dim() > 1 else 1
    values, squares = (_canonical(part, point).double().numpy() for part in (weight.detach(), sensitivity))
    squares = squares + FLOOR * squares.mean()
    factors = [(exponent, _canonical_ids(ids, weight.shape, point)) for exponent, ids in scaling.factors]
    if any(ids.shape[3] > 1 for _, ids in factors):  # scales that vary over the kernel: its places are columns
        batch, many, each, _ = values.shape
        values, squares = (part.reshape(batch, many, each * kernel, 1) for part in (values, squares))
        factors = [
            (e, np.broadcast_to(ids, (*ids.shape[:2], each, kernel)).reshape(*ids.shape[:2], each * kernel, 1))
            for e, ids in factors
        ]
    sides = [np.abs(values)] if scheme.weight_symmetric else [np.maximum(values, 0), np.maximum(-values, 0)]
    sides, squares = [side.max(axis=3) for side in sides], squares.sum(axis=3)
    factors = [(exponent, ids[..., 0]) for exponent, ids in factors]
    if any(ids.shape[1] > 1 and ids.shape[2] > 1 for _, ids in factors):  # every row has columns of its own
        sides, squares, factors = _rows_apart(sides, squares, factors)
    if isinstance(scheme.weight_granularity, int):
        sides, squares, factors = _blocks(sides, squares, factors, scheme.weight_granularity)
    return _term(sides, squares, factors, scheme.weight_granularity == "tensor", scheme.weight_levels)


def activation_term(seen: ActivationStatistics, scaling: Scaling, scheme: Scheme, is_expected: bool) -> Term:
    """The noise of one activation: a step for the whole tensor, entries that are its channels.

    Args:
        seen: what was seen there.
        scaling: of its channels, or of whatever is told apart there.
        scheme: how it is rounded.
        is_expected: are the bounds those that more samples should keep, or those that were seen?
    """
    least, most = seen.expected() if is_expected else (seen.low, seen.high)
    low, high, squares = (part.numpy().reshape(1, 1, -1) for part in (-least, most, seen.sensitivity))
    squares = squares + FLOOR * squares.mean()
    extent = np.maximum(low, high)
    floor = FLOOR * extent.max()
    sides = (
        [np.maximum(extent, floor)] if scheme.activation_symmetric else [low, np.maximum(high, np.where(low > 0, high, floor))]
    )
    factors = [(exponent, ids.expand(scaling.shape).numpy().reshape(1, 1, -1)) for exponent, ids in scaling.factors]
    assert scheme.activation_bits is not None
    return _term(sides, squares, factors, True, levels(scheme.activation_bits, scheme.activation_symmetric))


def _term(
    sides: list[np.ndarray], squares: np.ndarray, factors: Sequence[tuple[float, np.ndarray]], whole: bool, steps: int
) -> Term:
    batch, many, each = squares.shape
    rows = _map([(e, np.broadcast_to(ids[:, :, 0], (batch, many))) for e, ids in factors if ids.shape[2] == 1])
    columns = _map([(e, np.broadcast_to(ids[:, 0], (batch, each))) for e, ids in factors if ids.shape[2] > 1])
    with np.errstate(divide="ignore"):
        logarithms = [np.log(side) for side in sides]
    return Term([small(part) for part in logarithms], small(squares), rows, columns, whole, 1 / (12 * steps**2))


def _map(factors: Sequence[tuple[float, np.ndarray]]) -> Map:
    return tuple((exponent, ids, len(np.unique(ids[ids > 0])) == int((ids > 0).sum())) for exponent, ids in factors)


def _canonical(tensor: Tensor, point: Point) -> Tensor:
    """A weight as (groups, outputs, inputs, kernel)."""
    groups = point.groups
    if point.is_transposed:
        return tensor.reshape(groups, tensor.shape[0] // groups, tensor.shape[1], -1).transpose(1, 2).cpu()
    return tensor.reshape(groups, tensor.shape[0] // groups, tensor.shape[1], -1).cpu()


def _canonical_ids(ids: Tensor, shape: Sequence[int], point: Point) -> np.ndarray:
    """Ids in the same form, of size 1 where they do not vary."""
    first = (point.groups, shape[0] // point.groups) if ids.shape[0] > 1 else (1, 1)
    kernel = ids.expand(*ids.shape[:2], *shape[2:]).reshape(*first, ids.shape[1], -1) if ids[0, 0].numel() > 1 else None
    found = (ids.reshape(*first, ids.shape[1], 1) if kernel is None else kernel).numpy()
    found = found.transpose(0, 2, 1, 3) if point.is_transposed else found
    if found.shape[1] > 1 and found.shape[2] > 1 and (found == found[:, :1]).all():  # what a group reads
        found = found[:, :1]
    if found.shape[1] > 1 and found.shape[2] == 1 and (found == found[:, :1]).all():
        found = found[:, :1]
    return found


def _rows_apart(
    sides: list[np.ndarray], squares: np.ndarray, factors: Sequence[tuple[float, np.ndarray]]
) -> tuple[list[np.ndarray], np.ndarray, list[tuple[float, np.ndarray]]]:
    batch, many, each = squares.shape

    def apart(part: np.ndarray) -> np.ndarray:
        return part.reshape(batch * many, 1, each)

    ids = [(e, np.broadcast_to(part, (batch, many, part.shape[2])).reshape(batch * many, 1, -1)) for e, part in factors]
    return [apart(side) for side in sides], apart(squares), ids


def _blocks(
    sides: list[np.ndarray], squares: np.ndarray, factors: Sequence[tuple[float, np.ndarray]], size: int
) -> tuple[list[np.ndarray], np.ndarray, list[tuple[float, np.ndarray]]]:
    """Blocks of inputs as batches of their own; the last is filled up with zeros."""
    batch, _, each = squares.shape
    size = min(size, each)
    count = -(-each // size)

    def blocks(part: np.ndarray) -> np.ndarray:
        filled = np.pad(part, ((0, 0), (0, 0), (0, count * size - each)))
        many = part.shape[1]
        return filled.reshape(part.shape[0], many, count, size).transpose(0, 2, 1, 3).reshape(-1, many, size)

    ids = []
    for exponent, part in factors:
        part = np.broadcast_to(part, (batch, *part.shape[1:]))
        ids.append((exponent, blocks(part) if part.shape[2] > 1 else np.repeat(part, count, axis=0)))
    return [blocks(side) for side in sides], blocks(squares), ids


@dataclass(frozen=True, slots=True, eq=False)
class RoundedTensor:
    """A tensor that is rounded.

    Attributes:
        name: of the weight, or of the module whose input it is.
        kind: "weight" or "activation".
        expected: its noise, with the bounds that more samples should keep.
        observed: its noise, with the bounds that were seen.
    """

    name: str
    kind: str
    expected: Term
    observed: Term


def rounded_tensors(
    points: Sequence[Place], tensors: Mapping[str, Tensor], scalings: Mapping[str, Scaling], seen: Statistics
) -> list[RoundedTensor]:
    """Every tensor that is rounded. A weight that is used again counts once.

    What is rounded in front of freed bounds is not here: its range is the least of two maxima, of which no sum is made. Trials
    measure it.

    Args:
        points: where a network is rounded.
        tensors: its weights, by name.
        scalings: of these, by name.
        seen: what calibration says of it.
    """
    found: list[RoundedTensor] = []
    known: set[str] = set()
    for point in points:
        if isinstance(point, Point) and point.weight not in known:
            known.add(point.weight)
            term = weight_term(tensors[point.weight], seen.weights[point.weight], scalings[point.weight], point)
            found.append(RoundedTensor(point.weight, "weight", term, term))
        if point.scheme.activation_bits is not None and not (isinstance(point, Output) and point.bounds):
            name = f"input of {point.name}" if isinstance(point, Point) else point.name
            both = (activation_term(seen.activations[point.key], point.scaling, point.scheme, kind) for kind in (True, False))
            found.append(RoundedTensor(name, "activation", *both))
    return found


def by_name(scalings: Sequence[Scaling]) -> dict[str, Scaling]:
    """Scalings by every name of their tensor."""
    return {name: scaling for scaling in scalings for name in scaling.names}
