"""Operands: what sums of two activations read, where a quantizer rounds that too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.quantization.batches import run_undisturbed
from equinorm.quantization.calls import ActivationSum, CallWatch, Key
from equinorm.quantization.outputs import Output
from equinorm.quantization.points import Point
from equinorm.quantization.scheme import Scheme

LARGEST = 1e30
"""Numbers beyond it are those of masks."""

ShapePair = tuple[tuple[int, ...], tuple[int, ...]]
"""Of both operands of a sum."""


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """One of the two activations that a sum adds.

    Attributes:
        module: name of the module that adds.
        number: of sums before it, in the example.
        key: what identifies it.
        axis: of its channels, from the end; None if nothing says which it is, so that all of it is one channel.
        scheme: how it is rounded.
        scaling: of its channels: a `Scaling` of shape (channels,).
    """

    module: str
    number: int
    key: Key
    axis: int | None
    scheme: Scheme
    scaling: Scaling

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which it is told apart."""
        return () if self.axis is None else (self.axis,)

    @property
    def name(self) -> str:
        """The sum's number and module, and which operand."""
        return f"{_name(self.number, self.module)} (operand {self.key[1] + 1})"


Place = Point | Operand | Output
"""Where a quantizer rounds."""


def find_operands(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, scheme: Scheme, symmetries: Symmetries
) -> tuple[tuple[Operand, ...], dict[str, str]]:
    """Operands of sums of two activations that the scheme rounds: none if it does not ask for them.

    Sums are matched with those of the exported graph in their order, by their shapes. One that could be another, or that adds
    what does not depend on the inputs, stays in float.

    Returns:
        The operands, and why other sums or operands stay in float.
    """
    if not any(one.sums for one in scheme.all()):
        return (), {}
    seen = _run_once(model, args, kwargs)
    values = symmetries.values
    sums = [(value, pair) for value in values if (pair := _pair(value, values)) is not None]
    places = matched([added.shapes for added in seen], [(pair[0].shape, pair[1].shape) for _, pair in sums])
    constants = _constants(values)
    found: list[Operand] = []
    left: dict[str, str] = {}
    for number, added in enumerate(seen):
        value, pair = sums[places[number]] if number in places else (None, ())
        rounded = scheme.within(value.module) if value else scheme
        if rounded is None or not rounded.sums or rounded.activation_bits is None:
            continue
        if value is None:
            left[_name(number)] = "which sum of the exported graph it is, so how it scales, cannot be told"
        elif any(one.name in constants for one in pair):
            left[_name(number, value.module)] = "one of its operands does not depend on the inputs"
        else:
            for key, one, is_mask in zip(added.keys, pair, added.are_masks, strict=True):
                channels = None if is_mask else _channels(one)
                if channels is not None:
                    found.append(Operand(value.module, number, key, channels[0], rounded, channels[1]))
                else:
                    why = "its numbers are those of a mask" if is_mask else "it scales along several axes"
                    left[f"{_name(number, value.module)} (operand {key[1] + 1})"] = why
    if len(seen) < len(sums):
        missed = [value for place, (value, _) in enumerate(sums) if place not in places.values()]
        left |= {f"{value.name} of the exported graph": "nothing adds it as the model runs" for value in missed}
    return tuple(found), left


def matched(seen: Sequence[Any], wanted: Sequence[Any]) -> dict[int, int]:
    """Places of one sequence and those of another that belong together: in every longest common subsequence.

    >>> from equinorm.quantization.operands import matched
    >>> matched("abca", "bca"), matched("aab", "ab")
    ({1: 0, 2: 1, 3: 2}, {2: 1})
    """
    rows, columns = len(seen), len(wanted)
    ahead = [[0] * (columns + 1) for _ in range(rows + 1)]  # longest of what comes before
    behind = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        for j in range(columns):
            same = seen[i] == wanted[j]
            ahead[i + 1][j + 1] = ahead[i][j] + 1 if same else max(ahead[i][j + 1], ahead[i + 1][j])
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            same = seen[i] == wanted[j]
            behind[i][j] = behind[i + 1][j + 1] + 1 if same else max(behind[i + 1][j], behind[i][j + 1])
    by_rank: dict[int, list[tuple[int, int]]] = {}
    for i in range(rows):
        for j in range(columns):
            if seen[i] == wanted[j] and ahead[i][j] + 1 + behind[i + 1][j + 1] == behind[0][0]:
                by_rank.setdefault(ahead[i][j], []).append((i, j))
    return dict(pairs[0] for pairs in by_rank.values() if len(pairs) == 1)


def _name(number: int, module: str = "") -> str:
    return f"sum {number + 1}{f' in {module}' if module else ''}"


@dataclass(frozen=True, slots=True)
class _Seen:
    """A sum of the example: what identifies its operands, their shapes, and whether their numbers are those of masks."""

    keys: tuple[Key, Key]
    shapes: ShapePair
    are_masks: tuple[bool, bool]


def _run_once(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> list[_Seen]:
    """Every sum of two activations, in order."""
    seen: list[_Seen] = []

    def note(added: ActivationSum) -> Any:
        first, second = added.operands
        seen.append(_Seen(added.keys, (tuple(first.shape), tuple(second.shape)), (_is_mask(first), _is_mask(second))))
        return added.run(first, second)

    run_undisturbed(model, args, kwargs, CallWatch(model, lambda call: call.run(), note))
    return seen


def _is_mask(value: Tensor) -> bool:
    return value.numel() > 0 and not bool(value.detach().abs().amax() <= LARGEST)


def _pair(value: InnerValue, values: InnerValues) -> tuple[InnerValue, InnerValue] | None:
    """Both floats with channels that a value is the sum of, if it is, neither of them a tensor of the model."""
    if value.operator not in ("aten.add", "aten.add_") or len(value.reads) != 2:
        return None
    first, second = (values[name] for name in value.reads.values())
    if any(one.tensor or len(one.shape) < 2 or not one.dtype.is_floating_point for one in (first, second)):
        return None
    return first, second


def _constants(values: InnerValues) -> set[str]:
    """Names of values that do not depend on the inputs."""
    found: set[str] = set()
    for value in values:
        if value.operator != "input" and all(name in found for name in value.reads.values()):
            found.add(value.name)
    return found


def _channels(value: InnerValue) -> tuple[int | None, Scaling] | None:
    """Axis along which a value scales, from the end, and how it does; None if it scales along several.

    One that is pinned has its channels along the second axis; of three axes, as tokens have, nothing says which.
    """
    scaling, rank = value.scaling, len(value.shape)
    if scaling is None:
        return None
    axes = {axis for _, ids in scaling.factors for axis in range(ids.dim()) if ids.shape[axis] > 1}
    if len(axes) > 1:
        return None
    if not axes and rank == 3:
        ids = tuple((exponent, ids.reshape(1)) for exponent, ids in scaling.factors)
        return None, replace(scaling, shape=(1,), factors=ids)
    axis = axes.pop() if axes else 1
    along = tuple((exponent, ids.movedim(axis, 0).reshape(ids.shape[axis], -1).amax(1)) for exponent, ids in scaling.factors)
    return axis - rank, Scaling((value.name,), (value.shape[axis],), value.dtype, "value", "value", value.depth, along)
