"""The optimizers that train a model, one or several, and what each keeps beside its weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from equinorm._errors import RescaleError
from equinorm._memory import local
from equinorm.rescaling.flat_state import renew_
from equinorm.rescaling.optimizer_laws import Group
from equinorm.sharding.processes import Processes
from equinorm.training.decay_recursion import Parts
from equinorm.training.weight_decay import DecayParts, items


@dataclass(frozen=True, slots=True, eq=False)
class Stepped:
    """One optimizer.

    Attributes:
        optimizer: itself.
        wrappers: around it, with copies of weights in states of their own.
        parts: of its averages that contain weight decay.
    """

    optimizer: optim.Optimizer
    wrappers: Sequence[Any]
    parts: DecayParts

    @property
    def holders(self) -> tuple[Any, ...]:
        """All that hold states."""
        return (self.optimizer, *self.wrappers)

    def is_idle(self, processes: Processes | None) -> bool:
        """Is the next step none of training, with learning rates and gradients that are all zero?

        `torch.distributed.checkpoint` makes such a step where an optimizer has no state yet. Rates on accelerators count as not
        zero, since looking would cost a synchronisation.

        Args:
            processes: that hold parts of the gradients; None where this one holds all.
        """
        groups = self.optimizer.param_groups
        if not all(_is_zero(group.get("lr", 1.0)) for group in groups):
            return False
        gradients = [parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None]
        moves = any(one.layout != torch.strided or bool(local(one).any()) for one in gradients)
        return not moves if processes is None else not processes.largest(torch.tensor([moves], dtype=torch.int32))


class SteppedTogether:
    """All optimizers of a model.

    Args:
        found: each with the wrappers around it.
        follow: makes what follows the weight decay in the averages of one.

    Attributes:
        all: of them.
    """

    def __init__(
        self, found: Sequence[tuple[optim.Optimizer, Sequence[Any]]], follow: Callable[[optim.Optimizer], DecayParts]
    ) -> None:
        self.all = [Stepped(optimizer, wrappers, follow(optimizer)) for optimizer, wrappers in found]
        self._by_id = {id(stepped.optimizer): stepped for stepped in self.all}

    def __getitem__(self, optimizer: optim.Optimizer) -> Stepped:
        return self._by_id[id(optimizer)]

    def owners(self) -> dict[int, tuple[Stepped, Group]]:
        """Who steps each parameter, by its `id`, and in which group."""
        return {
            id(parameter): (stepped, group)
            for stepped in self.all
            for group in stepped.optimizer.param_groups
            for parameter in group["params"]
        }

    def groups(self) -> list[int]:
        """How many parameters each group of each optimizer has."""
        return [len(group["params"]) for stepped in self.all for group in stepped.optimizer.param_groups]

    def settings(self) -> Iterator[object]:
        """All beside tensors that decides how states move."""
        for stepped in self.all:
            yield stepped.parts.is_following
            for group in stepped.optimizer.param_groups:
                yield group.get("weight_decay")

    def skipped(self) -> Tensor | None:
        """Above 0 where a fused optimizer has skipped its step on the device; None if none may have."""
        every = [getattr(stepped.optimizer, "found_inf", None) for stepped in self.all]
        found = [torch.as_tensor(one).max() for one in every if one is not None]
        return torch.stack(found).max() if found else None

    def moves(self, names: set[str]) -> None:
        """Tell which parameters move now."""
        for stepped in self.all:
            stepped.parts.moving = names

    def renew_(self) -> None:
        """Compute anew what depends on states that have moved."""
        for stepped in self.all:
            renew_(stepped.optimizer)

    def stop(self) -> None:
        """Follow no more."""
        for stepped in self.all:
            stepped.parts.stop()

    def state_dict(self) -> dict[str, dict[str, Parts]]:
        """Weight decay in averages, by parameter, of all of them."""
        return {name: states for stepped in self.all for name, states in stepped.parts.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[int, Tensor]]]) -> None:
        """Restore what `state_dict` returned: all, or nothing.

        Raises:
            RescaleError: for parameters that none of them trains, and states that they do not have.
        """
        own: list[dict[str, Any]] = [{} for _ in self.all]
        for name, states in items(state):
            places = [place for place, stepped in enumerate(self.all) if stepped.parts.trains(name)]
            if not places:
                which = "this optimizer does" if len(self.all) == 1 else "these optimizers do"
                raise RescaleError(f"the state holds weight decay of {name}, which {which} not train.")
            own[places[0]][name] = states
        loaded = [stepped.parts.read(states) for stepped, states in zip(self.all, own, strict=True)]
        for stepped, states in zip(self.all, loaded, strict=True):
            stepped.parts.take(states)


def _is_zero(rate: Any) -> bool:
    """Is this learning rate the number 0? Looks at no tensors on accelerators."""
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and not bool(rate.any())
    return isinstance(rate, (int, float)) and rate == 0
