"""A model and the rescalings that leave its function unchanged, and what any log-scales do to its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from equinorm._arguments import real_numbers
from equinorm._errors import RescaleError
from equinorm._memory import local
from equinorm._scaling import Cast, Family, Pin, Scaling
from equinorm.modules.choosing import tensors_of
from equinorm.modules.hooks import backward_hooks
from equinorm.modules.running import on_cpu
from equinorm.rescaling.casts import check as check_casts
from equinorm.rescaling.factors import FactorTable
from equinorm.rescaling.in_place import rescale_ as rescale_tensors_
from equinorm.rescaling.last_answers import LastAnswers
from equinorm.rescaling.model_guard import ModelGuard
from equinorm.rescaling.optimizer_wrappers import Optimizers, check_trains
from equinorm.rescaling.powers_of_two import round_to_powers_of_two
from equinorm.sharding.modules import reshard
from equinorm.sharding.processes import Processes, agreeing, processes_of


@dataclass(frozen=True, slots=True, eq=False)
class Orbit:
    """All rescaling-equivalent weights of one model.

    Attributes:
        model: the network.
        num_free: number of free log-scales.
        scalings: how each parameter and floating-point buffer moves with these.
        families: free classes by the tensor axis that introduced them.
        pins: channels that cannot scale, each with the operation and source line that says so.
        backward: functions with a backward pass of their own that the model calls; gradients behind them may not scale.
        casts: where the network rounds values that scale to fewer bits than their weights have.
        kept: what others have worked out from the scalings, for the next time; copies begin without.
    """

    model: nn.Module = field(repr=False)
    num_free: int
    scalings: tuple[Scaling, ...] = field(repr=False)
    families: tuple[Family, ...] = field(repr=False)
    pins: tuple[Pin, ...] = field(repr=False)
    backward: tuple[str, ...] = field(repr=False, default=(), kw_only=True)
    casts: tuple[Cast, ...] = field(repr=False, default=(), kw_only=True)
    kept: LastAnswers = field(init=False, repr=False, default_factory=LastAnswers)
    _guard: ModelGuard = field(init=False, repr=False)

    def __post_init__(self) -> None:
        advice = "since the model was analysed, so its symmetries may be others now. Analyse it again."
        object.__setattr__(self, "_guard", ModelGuard(self.model, advice))

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The model's tensors by every name; what fully_shard has left whole after a forward is put back into shards."""
        reshard(self.model)
        return tensors_of(self.model)

    @property
    def coverage(self) -> float:
        """Share of all parameters that at least one free class moves."""
        parameters = [s for s in self.scalings if s.kind == "parameter"]
        total = sum(s.numel for s in parameters)
        return sum(s.numel * s.moving_share for s in parameters) / total if total else 0.0

    @property
    def family_ranges(self) -> list[tuple[int, int]]:
        """First and last + 1 id of each family; ids of a family are consecutive."""
        return [(family.ids[0], family.ids[-1] + 1) for family in self.families]

    def versions(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[int, ...]:
        """Counters of in-place changes of every tensor that moves; `tensors` if they are at hand."""
        tensors = self.tensors if tensors is None else tensors
        moving = (local(tensors[s.name]) for s in self.scalings if s.factors and s.name in tensors)
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in moving)

    @on_cpu()
    def rescale_(self, log_scales: Tensor, optimizer: Optimizers | None = None, power_of_two: bool = False) -> None:
        """Apply one member of the group to the model in place: W ← D_in^−1 W D_out, all tensors or none.

        Args:
            log_scales: natural logarithms of shape (num_free,); computed with in float64.
            optimizer: one or several, whose state to move along; gradients always move (by the inverse), or are refused where
                the backward pass may not be linear: hooks on it, autograd functions of the model's own.
            power_of_two: round every scale to a power of two first; multiples of ln 2 are exact without rounding. Needed for
                float16 and bfloat16 weights, and for classes that pass a cast.

        Raises:
            RescaleError: if log_scales has another shape or is not finite, if the model has changed since it was analysed, or
                if a tensor cannot be rescaled exactly; nothing is written then.
        """
        log_scales = real_numbers(log_scales, self.num_free)
        if tuple(log_scales.shape) != (self.num_free,):
            raise RescaleError(
                f"log_scales must have shape ({self.num_free},), one entry for each free class, not {tuple(log_scales.shape)}."
            )
        if not bool(log_scales.isfinite().all()):
            raise RescaleError("log_scales must be finite: they are natural logarithms of positive scales.")
        tensors = self.tensors
        self._guard.check()
        if optimizer is not None:
            check_trains(optimizer, self.model)
        table = self._factors()
        if power_of_two:
            log_scales = round_to_powers_of_two(log_scales.double(), [*table.scalings, *self.casts])
        processes = processes_of(tensors)
        if processes is not None:
            _check_alike(processes, log_scales)
        with agreeing(processes):
            check_casts(self.casts, table.scalings, tensors, log_scales)
        nonlinear = (*self.backward, *backward_hooks(self.model))
        rescale_tensors_(tensors, table, log_scales, optimizer, nonlinear)

    def _factors(self) -> FactorTable:
        """How the tensors move that do: worked out once."""
        return self.kept.once(FactorTable, None, lambda: FactorTable([s for s in self.scalings if s.factors], self.num_free))


def _check_alike(processes: Processes, log_scales: Tensor) -> None:
    """Refuse log-scales that differ between processes: shards would move apart."""
    own = log_scales.detach().to("cpu", torch.float64)
    if bool((processes.largest((own - processes.of_the_first(own)).abs()) > 0).any()):
        raise RescaleError(
            "log_scales are not the same in every process that holds a part of the model. Draw or compute them once, and "
            "send them to all: torch.distributed.broadcast(log_scales, 0)."
        )
