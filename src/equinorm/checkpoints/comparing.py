"""Does a rescaling join two checkpoints? One component after the other, as both are balanced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equinorm._display import count
from equinorm._scaling import HALVES, Scaling
from equinorm.balancing.components import balanced
from equinorm.balancing.options import BalanceOptions
from equinorm.checkpoints.folder import Checkpoint
from equinorm.checkpoints.rewriting import Tick, does_move
from equinorm.checkpoints.solving import ComponentWeights, Task, components_of, size_of
from equinorm.checkpoints.stored import CheckpointError, at_places, is_counter, pieces
from equinorm.joining.differences import beyond_rounding, relative
from equinorm.joining.equivalence import TOLERANCES
from equinorm.rescaling.powers_of_two import LN2
from equinorm.rescaling.tensor_write import scaled

CANONICAL = BalanceOptions(tol=1e-12, biases=True)
"""How both are balanced."""

_AT_ONCE = 1 << 20

_NEAR = 1e-6
"""Log-scales, in units of ln 2, that are so near to whole numbers are powers of two."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How one tensor differs, once scales are taken out.

    Attributes:
        tensor: its name.
        difference: of any of its channels, relative: ‖a − b‖_∞ / max(‖a‖_∞, ‖b‖_∞); inf where whole numbers differ.
        entries: how many differ by more than rounding explains: in half precision more than 2^-5 (float16: 2^-8) of the entry
            itself, else more than the tolerance, in parts of the largest of their channel. One large change moves the scales
            of its channels, and all of their entries with them.
        size: how many there are.
    """

    tensor: str
    difference: float
    entries: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """How the weights of two checkpoints differ once scales are taken out.

    Attributes:
        log_scales: float64 natural logarithms that take the weights of the first to those of the second, as well as any do.
        largest: relative difference of any channel (slice along axis 0) of any tensor, ‖a − b‖_∞ / max(‖a‖_∞, ‖b‖_∞).
        tolerance: for it, by the narrowest dtype.
        different: tensors above the tolerance, or of which entries differ by more than rounding; worst first. A little training
            moves no channel far in half precision, but many small weights.
        dead: channels that no path of nonzero weights joins to an input and an output; their scales are taken for 1.
    """

    log_scales: Tensor = field(repr=False)
    largest: float
    tolerance: float
    different: tuple[Apart, ...]
    dead: int


def difference(task: Task, other: Checkpoint, held: Tensor, tick: Tick = lambda size: None) -> Difference:
    """Compare the weights of two folders of one architecture.

    Args:
        task: the first folder and how its tensors move.
        other: the second one, which `check_same` has let pass.
        held: mask over 0..num_free of classes that do not move.
        tick: told how many bytes more of either were read.

    Raises:
        EquinormError: if a weight is not finite.
    """
    z = torch.zeros(task.orbit.num_free, dtype=torch.float64)
    dtypes = {entry.dtype for entry in task.checkpoint.entries.values() if entry.dtype in TOLERANCES}
    tolerance = max((TOLERANCES[dtype] for dtype in dtypes), default=1e-9)
    found: dict[str, Apart] = {}
    dead = 0
    for component in components_of(task, held):
        sides = [balanced(component, ComponentWeights(c, component.scalings), CANONICAL, 0.0) for c in (task.checkpoint, other)]
        own = _snapped(sides[0].log_scales - sides[1].log_scales)
        z[component.classes - 1] = own
        dead += max(side.dead for side in sides)
        for scaling in component.scalings:
            for key in scaling.names:
                found[key] = _apart(key, scaling, own, (task.checkpoint, other), tolerance)
        tick(2 * size_of(component, task.checkpoint))
    for scaling in task.conversion.scalings:
        for key in scaling.names:
            if key not in found:
                found[key] = _apart(key, scaling, z, (task.checkpoint, other), tolerance)
                tick(2 * task.checkpoint.entries[key].size)
    for entry in task.checkpoint.entries.values():  # whole numbers, which nothing scales
        if entry.key not in found and entry.key not in task.conversion.ignored and not is_counter(entry.key):
            a, b = (side.mapped(entry.key) for side in (task.checkpoint, other))
            apart = int((a != b).sum())
            found[entry.key] = Apart(entry.key, math.inf if apart else 0.0, apart, a.numel())
            tick(2 * entry.size)
    different = [part for part in found.values() if part.entries or part.difference > tolerance]
    different.sort(key=lambda part: (-part.difference, part.tensor))
    return Difference(z, max((part.difference for part in found.values()), default=0.0), tolerance, tuple(different), dead)


def check_same(a: Checkpoint, b: Checkpoint) -> None:
    """Refuse folders with other keys, shapes or dtypes.

    Raises:
        CheckpointError: which names the first.
    """
    apart = [key for key in {*a.entries, *b.entries} if _facts(a, key) != _facts(b, key)]
    if apart:
        key = min(apart)
        said = " and ".join(f"{_facts(c, key)} in {c.folder}" for c in (a, b))
        entries = [c.entries.get(key) for c in (a, b)]
        is_kind = all(entries) and len({entry.shape for entry in entries if entry}) == 1
        way = f"name hf:{a.folder} and hf:{b.folder} to compare what their models load"
        raise CheckpointError(
            f"{count(len(apart), 'tensor differs', 'tensors differ')} in name, kind or shape, as {key}: {said}. Save both "
            + ("in one dtype." if is_kind else f"alike with save_pretrained, or {way}.")
        )


def _facts(checkpoint: Checkpoint, key: str) -> str:
    entry = checkpoint.entries.get(key)
    return "absent" if entry is None else f"{entry.kind}{list(entry.shape)}"


def _snapped(z: Tensor) -> Tensor:
    """Powers of two, if all scales are nearly that."""
    twos = (z / LN2).round()
    return twos * LN2 if bool(((z / LN2 - twos).abs() < _NEAR).all()) else z


def _apart(key: str, scaling: Scaling, z: Tensor, sides: Sequence[Checkpoint], tolerance: float) -> Apart:
    """How one tensor differs, once the first is rescaled."""
    tensors = [side.mapped(key) for side in sides]
    worst, entries, shape, size = 0.0, 0, tuple(tensors[0].shape), tensors[0].numel()
    if not size or (torch.equal(*tensors) and not does_move(scaling, z)):
        return Apart(key, 0.0, 0, size)
    logs, dtype = scaling.log_factors(z), tensors[0].dtype
    for places, _ in pieces(shape, max(_AT_ONCE, math.prod(shape[1:]))):
        here = [at_places(log, places) for log in logs]
        a, b = (tensor[places].double() + scaling.offset for tensor in tensors)
        a, b = (x.reshape(x.shape[0] if x.dim() else 1, -1) for x in (scaled(a, here), b))
        apart = relative(a, b)
        worst = max(worst, float(apart.max()))
        if dtype in HALVES:
            least = torch.finfo(dtype).tiny * math.exp(max(0.0, sum(float(log.max()) for log in here))) + abs(scaling.offset)
            entries += int(beyond_rounding(a, b, dtype, least).sum())
        else:
            entries += int((apart > tolerance).sum())
    return Apart(key, worst, entries, size)
