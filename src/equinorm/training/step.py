"""One rescaling step: cycles on the current weights, and everything that belongs to them moves along."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import optim

from equinorm._errors import EquinormError
from equinorm._symmetries import Symmetries
from equinorm.modules.running import on_cpu
from equinorm.rescaling.writing import uninterrupted
from equinorm.training.bindings import Bindings
from equinorm.training.moves import StepMoves
from equinorm.training.optimizers import SteppedTogether
from equinorm.training.recording import StepRecorder, full_precision
from equinorm.training.selection import Selection
from equinorm.training.settings import StepOptions
from equinorm.training.weight_decay import DecayParts


class Step:
    """Runs cycles on the current weights and moves everything that belongs to them.

    Args:
        symmetries: of the model.
        selection: which tensors move, and of which the norm counts.
        stepped: the optimizers whose states move along, each with the wrappers around it that hold copies of weights.
        averages: of the weights.
        c: asymmetry.
        options: how a step balances and writes.

    Attributes:
        optimizers: themselves, and the parts of their averages that contain weight decay.

    Raises:
        RescaleError: for tensors, optimizers and averages that cannot be moved exactly.
    """

    def __init__(
        self,
        symmetries: Symmetries,
        selection: Selection,
        stepped: Sequence[tuple[optim.Optimizer, Sequence[Any]]],
        averages: Sequence[Any],
        c: float,
        options: StepOptions,
    ) -> None:
        self._selection, self._c, self._is_idle = selection, c, False
        self._bindings = Bindings(symmetries, selection, averages)
        offsets = {bound.name: bound.scaling.offset for bound in self._bindings.all if bound.scaling.offset}
        names = {id(bound.tensor): bound.name for bound in self._bindings.all}
        self.optimizers = SteppedTogether(stepped, lambda one: DecayParts(one, names, offsets, options.compile))
        self._recorder = StepRecorder(symmetries, selection, self._bindings, self.optimizers, options)
        self._moves = StepMoves(self._bindings, self.optimizers)
        self._select()
        self._bindings.check_trained(self.optimizers.owners())
        self._moves.check_averages()
        self._groups = self.optimizers.groups()
        for one in self.optimizers.all:
            one.parts.check_settings()
        self._record()

    def forget(self) -> None:
        """Keep nothing alive that the optimizer lets go."""
        self._moves.forget()
        self._recording.mover.forget()

    def shares(self, other: "Step") -> bool:
        """Do both move some tensor?"""
        return self._bindings.overlaps(other._bindings)

    @on_cpu()
    def weigh(self, c: float) -> None:
        """Set the asymmetry."""
        try:
            self._recording.weigh(c)
        except EquinormError:
            self._recording.weigh(self._c)
            raise
        self._c = c

    @on_cpu()
    def before_step(self, optimizer: optim.Optimizer) -> None:
        """Look at what an optimizer is about to change, and at parameters that were added to it.

        Raises:
            RescaleError: if its averages contain weight decay that was not followed.
        """
        if self._groups != (groups := self.optimizers.groups()) and self._bindings.own:
            self._record()  # biases that are stepped from now on
        self._groups = groups
        stepped = self.optimizers[optimizer]
        self._is_idle = stepped.is_idle(self._recording.processes)
        stepped.parts.before_step(self._is_idle)
        self._recording.biases.before_step(optimizer)

    def after_step(self, optimizer: optim.Optimizer) -> bool:
        """Correct its steps of biases; says whether this was a step of training."""
        self.optimizers[optimizer].parts.after_step()
        self._recording.biases.after_step(optimizer)
        return not self._is_idle

    @on_cpu()
    def residual(self) -> float:
        """ρ of the current weights; energies that have left float32's range meanwhile are in float64 from now on."""
        self._renew()
        if not self._bindings.own:
            return 0.0
        if not self._recording.is_wide and not self._recorder.fits_float32():
            self._record()
        with torch.no_grad(), full_precision(self._bindings):
            return float(self._recording.cycle.residual())

    @on_cpu()
    def run_cycles(self, cycles: int, gradients: bool, but_of: optim.Optimizer | None = None) -> None:
        """Run so many cycles and move everything.

        Args:
            cycles: how many.
            gradients: move gradients too.
            but_of: an optimizer whose gradients need not move.

        Raises:
            RescaleError: if the model has changed or something cannot move; nothing has moved then.
        """
        self._renew()
        if not self._bindings.own:
            return
        lasting = self._moves.of_weights()
        passing = [*self._moves.of_gradients(but_of)] if gradients else []
        powers = self._moves.powers | {power for move in passing for power in move.exponents}
        recording = self._recording
        with torch.no_grad():
            with full_precision(self._bindings):
                z = recording.run_cycles(cycles)
            if recording.held is not None:  # a family may be held in part
                z = z.masked_fill(recording.held, 0.0)
            skipped = self.optimizers.skipped()
            z = z if skipped is None else torch.where(skipped > 0, torch.zeros_like(z), z)
            z = recording.mover.cut(z, powers, [*lasting, *passing])
            if recording.processes is not None:  # the shortest step of any process, to the bit
                z = recording.processes.nearest_to_zero(z)
            with uninterrupted():
                recording.mover.set_log_scales(z, powers)
                recording.move_(lasting, passing)
                self.optimizers.renew_()

    def _renew(self) -> None:
        """See that the model is what it was; record again if it has moved to another device or dtype."""
        self._bindings.check_models()
        if self._selection.renew():
            self._select()
            self._selection.tell()
        self._bindings.check_trained(self.optimizers.owners())
        if self._bindings.own and (self._is_stale or self._recording.place != self._bindings.place):
            self._record()

    def _select(self) -> None:
        """Bind what moves now."""
        self._is_stale = True  # what is recorded belongs to the selection before
        self._bindings.bind()
        self.optimizers.moves({bound.name for bound in self._bindings.own})

    def _record(self) -> None:
        self._recording = self._recorder.record(self._c)
        self._is_stale = False
        self._moves.forget()
