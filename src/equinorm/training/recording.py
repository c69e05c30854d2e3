"""What a step needs to know beforehand of the weights as they lie on their device: recorded once, until they move elsewhere."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equinorm import native
from equinorm._errors import RescaleError
from equinorm._symmetries import Symmetries
from equinorm.balancing.float32_range import fits_float32
from equinorm.native import Compute
from equinorm.rescaling.mover import Move, Mover
from equinorm.sharding.processes import Processes
from equinorm.training.bias_steps import Bias, BiasSteps
from equinorm.training.bindings import Bindings, Placement
from equinorm.training.local_parts import LocalParts
from equinorm.training.optimizers import SteppedTogether
from equinorm.training.recorded_cycle import RecordedCycle
from equinorm.training.selection import Selection
from equinorm.training.settings import StepOptions
from equinorm.training.torch_compile import compiled


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A step on weights of one place.

    Attributes:
        place: of all that moves.
        compute: where and how passes run.
        held: mask over 0..num_free of classes that do not move, on the device; None if there are none.
        cycle: the cycles.
        mover: that writes.
        biases: their steps where c is not 1.
        run_cycles: of `cycle`, compiled if asked for.
        move_: of `mover`, compiled if asked for.
        processes: that hold parts of the model; None where this one holds all.
    """

    place: Placement
    compute: Compute
    held: Tensor | None
    cycle: RecordedCycle
    mover: Mover
    biases: BiasSteps
    run_cycles: Callable[[int], Tensor]
    move_: Callable[[Sequence[Move], Sequence[Move]], None]
    processes: Processes | None

    @property
    def is_wide(self) -> bool:
        """Are sums in float64?"""
        return self.compute.dtype == torch.float64

    def weigh(self, c: float) -> None:
        """Set the asymmetry."""
        self.cycle.weigh(c)
        self.biases.weigh(c)


class StepRecorder:
    """Records steps.

    Args:
        symmetries: of the model.
        selection: which tensors move, and of which the norm counts.
        bindings: the tensors themselves.
        optimizers: that make the steps.
        options: of the steps.
    """

    def __init__(
        self,
        symmetries: Symmetries,
        selection: Selection,
        bindings: Bindings,
        optimizers: SteppedTogether,
        options: StepOptions,
    ) -> None:
        self._symmetries, self._selection, self._bindings = symmetries, selection, bindings
        self._optimizers, self._options = optimizers, options

    def record(self, c: float) -> Recording:
        """The step on the weights as they lie now.

        Raises:
            RescaleError: for tensors that cannot be moved exactly, or that lie on several devices.
            BalanceError: if c weighs layers beyond floating point.
        """
        options, found, network = self._options, self._symmetries, self._selection.network
        self._bindings.check_tensors(options.power_of_two)
        place = self._bindings.place
        compute, held = self._compute(place), self._selection.held
        parts = LocalParts(found.tensors)
        cycle = RecordedCycle(network, parts, options.norm, options.method, compute)
        cycle.weigh(c)
        biases = BiasSteps(self._biases(parts), network, options.norm, held)
        biases.weigh(c)
        mover = Mover(parts.scalings(self._selection.moving), parts.tensors, compute, options.power_of_two)
        for kind in compute.native:  # those of weight decay too, so that no step can fail for want of a compiler
            native.kernels_for(kind, torch.promote_types(kind, torch.float32))
        run_cycles, move_ = cycle.run_cycles, mover.move_
        if options.compile and not compute.native:
            run_cycles, move_ = compiled(run_cycles), compiled(move_)
        held = held.to(compute.device) if bool(held.any()) else None
        return Recording(place, compute, held, cycle, mover, biases, run_cycles, move_, parts.processes)

    def fits_float32(self) -> bool:
        """Can sums of energies be taken in float32?"""
        parts, norm = LocalParts(self._symmetries.tensors), self._options.norm
        layouts = [layout for layout in parts.network(self._selection.network).layouts if parts.counts(layout.scaling.name)]
        with torch.no_grad(), full_precision(self._bindings):
            fits = all(fits_float32(layout, parts.tensors[layout.scaling.name], norm) for layout in layouts)
        return not parts.any(not fits)

    def _compute(self, place: Placement) -> Compute:
        """Where and how passes over these weights run."""
        devices, dtypes = {device for device, _, _ in place}, {dtype for _, dtype, _ in place}
        if len(devices) > 1:
            raise RescaleError(f"what moves lies on several devices ({', '.join(map(str, devices))}); ENorm needs it on one.")
        device = devices.pop()
        is_wide = 2 < self._options.norm.p < float("inf") or torch.float64 in dtypes or not self.fits_float32()
        is_native = device.type in native.DEVICES and native.are_wanted(self._options.compile)
        return Compute(device, torch.float64 if is_wide else torch.float32, frozenset(dtypes if is_native else ()))

    def _biases(self, parts: LocalParts) -> list[Bias]:
        """Biases whose steps are corrected."""
        if not self._options.symmetric_biases:
            return []
        owners, tensors = self._optimizers.owners(), self._symmetries.tensors
        scalings = [scaling for scaling in self._symmetries.scalings if scaling.factors and scaling.role == "bias"]
        stepped = [scaling for scaling in scalings if id(tensors[scaling.name]) in owners]
        optimizers = [owners[id(tensors[scaling.name])][0].optimizer for scaling in stepped]
        held = parts.scalings(stepped)
        return [Bias(s, parts.tensors[s.name], optimizer) for s, optimizer in zip(held, optimizers, strict=True)]


def full_precision(bindings: Bindings) -> contextlib.AbstractContextManager:
    """Sums of energies stay in their dtype where a step is made under autocast."""
    kind = bindings.own[0].tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
