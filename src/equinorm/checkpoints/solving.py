"""Balance a checkpoint: one component after the other is read, solved and dropped."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from equinorm._errors import RescaleError
from equinorm._memory import forget
from equinorm._scaling import HALVES, Cast, Scaling
from equinorm.balancing.components import Component, ComponentBalance, balanced, components
from equinorm.balancing.options import BalanceOptions
from equinorm.checkpoints.conversion import Conversion
from equinorm.checkpoints.folder import Checkpoint
from equinorm.checkpoints.rewriting import Tick
from equinorm.checkpoints.stored import CheckpointError, save_tensors
from equinorm.reporting.files import write_atomically
from equinorm.rescaling.bounds import row_bounds
from equinorm.rescaling.casts import check as check_casts, refusal_in_half
from equinorm.rescaling.factors import factors_of
from equinorm.rescaling.in_place import WRITABLE, check
from equinorm.rescaling.orbit import Orbit
from equinorm.rescaling.plan import Plan
from equinorm.rescaling.powers_of_two import unit_of_powers_of_two
from equinorm.rescaling.tensor_write import Write

_SOLVED = "solved.safetensors"

_AT_ONCE = 1 << 20
"""Entries that are looked at together."""

_OFTEN = 10.0
"""Seconds after which what is solved is written down."""


@dataclass(slots=True)
class Record:
    """What was found so far, over all components.

    Attributes:
        done: how many components are solved.
        before: Σ_k c_k ‖W_k‖_p^p (the largest c_k ‖W_k‖_∞ if p = ∞).
        after: the same at the balanced point.
        residual_before: the largest of any component.
        residual: the same after the last cycle; those of real scales, where these are rounded.
        cycles: most of any component.
        dead: channels without a path of nonzero weights.
    """

    done: int = 0
    before: float = 0.0
    after: float = 0.0
    residual_before: float = 0.0
    residual: float = 0.0
    cycles: int = 0
    dead: int = 0

    def add(self, found: ComponentBalance, is_max: bool) -> None:
        """Count one component more."""
        self.done += 1
        self.before = max(self.before, found.before) if is_max else self.before + found.before
        self.after = max(self.after, found.after) if is_max else self.after + found.after
        self.residual_before = max(self.residual_before, found.residuals[0])
        self.residual = max(self.residual, found.residuals[1])
        self.cycles = max(self.cycles, found.cycles)
        self.dead += found.dead


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is to be solved.

    Attributes:
        checkpoint: whose weights.
        orbit: of its model on the meta device.
        conversion: how the tensors of the files move.
        options: of the balance.
        power_of_two: round all scales to powers of two.
    """

    checkpoint: Checkpoint
    orbit: Orbit
    conversion: Conversion
    options: BalanceOptions
    power_of_two: bool

    @property
    def unit(self) -> float:
        """Of log-scales, where they are rounded; else 0."""
        return unit_of_powers_of_two([*self.conversion.scalings, *self.orbit.casts]) if self.power_of_two else 0.0

    def held(self) -> tuple[Tensor, list[str]]:
        """Mask over 0..num_free of classes that cannot move exactly in these files, and why, in words."""
        held = torch.zeros(self.orbit.num_free + 1, dtype=torch.bool)
        notes: list[str] = []
        scalings = self.conversion.scalings
        shifted = [scaling for scaling in scalings if scaling.offset and scaling.dtype.itemsize < 4]
        unwritable = [scaling for scaling in scalings if scaling.factors and scaling.dtype not in WRITABLE]
        keys = {key for scaling in scalings for key in scaling.names}
        casts = [cast for cast in self.orbit.casts if cast.tensor and cast.tensor not in keys]
        reasons: list[tuple[str, Sequence[Scaling | Cast]]] = [
            ("they also move tensors that the model makes for itself", self.conversion.unstored),
            ("they move gains that are stored as w in half precision and used as 1 + w, which rounds", shifted),
            ("they move weights in a dtype that is not rescaled, as quantized ones are", unwritable),
            ("they move tensors that the model casts and that the files hold otherwise", casts),
        ]
        for why, movers in reasons:
            ids = torch.unique(torch.cat([torch.zeros(0, dtype=torch.long), *(mover.free() for mover in movers)]))
            fresh = int((~held[ids]).sum())
            held[ids] = True
            if fresh:
                notes.append(f"{fresh:,} of {self.orbit.num_free:,} scales stay at 1: {why}")
        return held, notes


def components_of(task: Task, held: Tensor) -> Iterator[Component]:
    """The components of a checkpoint, one at a time."""
    return components(task.conversion.scalings, task.orbit.family_ranges, held)


def size_of(component: Component, checkpoint: Checkpoint) -> int:
    """Bytes that a component has on disk."""
    return sum(checkpoint.entries[key].size for scaling in component.scalings for key in scaling.names)


def check_dtypes(task: Task, held: Tensor) -> None:
    """Refuse real scales for half precision before anything is read.

    Raises:
        RescaleError: which names the first such weight.
    """
    for scaling in task.conversion.scalings:
        is_half = scaling.dtype in HALVES
        if is_half and not task.power_of_two and bool((~held[scaling.free()]).any()):
            raise RescaleError(refusal_in_half(scaling.name, scaling.dtype))


def solve(task: Task, held: Tensor, staging: Path | None = None, tick: Tick = lambda size: None) -> tuple[Plan, Record]:
    """Find the plan of least norm.

    Args:
        task: what to solve.
        held: mask over 0..num_free of classes that stay.
        staging: folder where what is solved is written down, and read again by a later run.
        tick: told how many bytes more were read.

    Raises:
        EquinormError: if a weight is not finite, or cannot be rescaled exactly.
    """
    check_dtypes(task, held)
    z, record = _begun(staging, task.orbit.num_free)
    saved, unit = time.monotonic(), task.unit
    for number, component in enumerate(components_of(task, held)):
        size = size_of(component, task.checkpoint)
        if number >= record.done:
            found = _solved(task, component, unit)
            z[component.classes - 1] = found.log_scales
            record.add(found, task.options.norm.is_max)
            if staging is not None and time.monotonic() - saved > _OFTEN:
                _write_down(staging, z, record)
                saved = time.monotonic()
        tick(size)
    _check_casts(task, z)
    if staging is not None:
        _write_down(staging, z, record)
    stored = () if _are_names(task) else (*task.conversion.scalings, *_ignored(task))
    return Plan(z, task.orbit.scalings, stored, task.orbit.casts, task.orbit.backward), record


def _check_casts(task: Task, z: Tensor) -> None:
    """Refuse scales that casts inside of the network do not keep."""
    checkpoint, casts = task.checkpoint, task.orbit.casts
    cast = {name: checkpoint.mapped(name) for name in {cast.tensor for cast in casts} if name in checkpoint.entries}
    check_casts(casts, [scaling for scaling in task.conversion.scalings if scaling.factors], cast, z)


def _are_names(task: Task) -> bool:
    """Are the keys of the files the names of the model's tensors, as they are?"""
    own = {name for scaling in task.orbit.scalings for name in scaling.names}
    return not task.conversion.converted and all(key in own for key in task.checkpoint.entries)


def _ignored(task: Task) -> list[Scaling]:
    """Tensors of the files that the model does not read, which stay as they are."""
    entries = [task.checkpoint.entries[key] for key in task.conversion.ignored]
    return [Scaling((e.key,), e.shape, e.dtype or torch.uint8, "buffer", "weight", 0, ()) for e in entries]


def _solved(task: Task, component: Component, unit: float) -> ComponentBalance:
    """Solve one component and refuse what could not be written."""
    weights = ComponentWeights(task.checkpoint, component.scalings)
    found = balanced(component, weights, task.options, unit)
    for scaling in component.scalings:
        logs = [log for log in scaling.log_factors(found.log_scales) if bool((log != 0).any())]
        if logs:
            tensor = task.checkpoint.mapped(scaling.name)
            check(
                Write(scaling.name, tensor, factors_of(logs), True, scaling.offset, scaling.is_squared),
                weights.bounds(scaling.name),
            )
    return found


class ComponentWeights(Mapping[str, Tensor]):
    """Tensors of a component, which lie in their files; nothing is held on to but bounds of their rows."""

    def __init__(self, checkpoint: Checkpoint, scalings: Sequence[Scaling]) -> None:
        self._checkpoint, self._scalings = checkpoint, {scaling.name: scaling for scaling in scalings}
        self._bounds: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._checkpoint.mapped(name)
        self._bounds[name] = _bounds(tensor)
        for other in self._scalings[name].names[1:]:
            second = self._checkpoint.mapped(other)
            is_same = torch.equal(tensor, second)
            forget(tensor)
            forget(second)
            if not is_same:
                raise CheckpointError(f"{name} and {other} are one tensor in the model and differ in the files.")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._scalings)

    def __len__(self) -> int:
        return len(self._scalings)

    def bounds(self, name: str) -> Tensor:
        """Bounds on the largest entry of every row."""
        if name not in self._bounds:
            self[name]
        return self._bounds[name]


def _bounds(tensor: Tensor) -> Tensor:
    """Bounds on the largest entry of every row, some rows at a time, since norms in another precision copy what they read."""
    if not tensor.numel() or not tensor.dim():
        return row_bounds(tensor)
    rows = max(1, _AT_ONCE * tensor.size(0) // tensor.numel())
    # One memory for all: small pieces of it between large copies would keep the system's memory from being used again.
    found = torch.empty(tensor.size(0), *[1] * (tensor.dim() - 1), dtype=torch.float64)
    for part, own in zip(tensor.split(rows), found.split(rows), strict=True):
        own.copy_(row_bounds(part))
        forget(part)
    return found


def _begun(staging: Path | None, num_free: int) -> tuple[Tensor, Record]:
    """What an earlier run has solved."""
    path = None if staging is None else staging / _SOLVED
    if path is not None and path.exists():
        with (
            contextlib.suppress(safetensors.SafetensorError, ValueError, LookupError, TypeError),  # damaged: solved anew
            safetensors.safe_open(path, framework="pt") as file,
        ):
            return file.get_tensor("log_scales"), Record(**json.loads(file.metadata()["record"]))
    return torch.zeros(num_free, dtype=torch.float64), Record()


def _write_down(staging: Path, z: Tensor, record: Record) -> None:
    metadata = {"record": json.dumps(asdict(record))}
    write_atomically([(staging / _SOLVED, lambda path: save_tensors({"log_scales": z}, path, metadata))], force=True)


def norm_of(energy: float, options: BalanceOptions) -> float:
    """The norm, from the sum of its powers."""
    return energy if options.norm.is_max else math.pow(energy, 1 / options.p)
