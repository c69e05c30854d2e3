"""What moves in one step, and by which power of its scales: weights, averages, the optimizer's state, gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor, optim

from equinorm._errors import RescaleError
from equinorm._memory import has_memory, local, storage_of
from equinorm.rescaling.flat_state import vectors
from equinorm.rescaling.in_place import check_writable
from equinorm.rescaling.mover import Move
from equinorm.rescaling.optimizer_laws import Law, laws
from equinorm.rescaling.optimizer_state import shift, state_of, unaveraged
from equinorm.sharding.boxes import box_of
from equinorm.training.bindings import Bindings, Bound
from equinorm.training.optimizers import SteppedTogether


class StepMoves:
    """What moves with the weights.

    Args:
        bindings: the weights, and averages of them.
        optimizers: whose states move along.

    Attributes:
        powers: of the scales that the last moves need.
    """

    def __init__(self, bindings: Bindings, optimizers: SteppedTogether) -> None:
        self._bindings, self._optimizers = bindings, optimizers
        self.powers: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """Look at everything again the next time, and keep nothing alive until then."""
        self._seen: list[object] = []
        self._last: list[Move] = []

    def of_weights(self) -> list[Move]:
        """Weights and states that move; the same list as before while they are the same tensors."""
        bindings, owners = self._bindings, self._optimizers.owners()
        tensors = [bound.tensor for bound in bindings.moving]
        for bound in bindings.own:
            for holder in owners[id(bound.tensor)][0].holders if id(bound.tensor) in owners else ():
                tensors += [value for value in holder.state.get(bound.tensor, {}).values() if isinstance(value, Tensor)]
        for stepped in self._optimizers.all:
            tensors += stepped.parts.tensors()
            tensors += [vector for _, vector in vectors(stepped.optimizer)]
        seen: list[object] = [*self._optimizers.settings()]
        seen += [(id(tensor), *_address(local(tensor))) for tensor in tensors]
        if seen != self._seen:
            self._last, self._seen = [*self._weights(), *self._states()], seen
            self.powers = {power for move in self._last for power in move.exponents}
        return self._last

    def of_gradients(self, but_of: optim.Optimizer | None) -> Iterator[Move]:
        """Gradients that are there. Not to be kept: one that is set to None is to be freed.

        Args:
            but_of: an optimizer whose gradients are used up.

        Raises:
            RescaleError: for those that cannot be rescaled.
        """
        used = {id(parameter) for group in but_of.param_groups for parameter in group["params"]} if but_of else ()
        for bound in self._bindings.own:
            if bound.tensor.grad is not None and id(bound.tensor) not in used:
                gradient = _part(f"the gradient of {bound.name}", bound.tensor.grad, bound.tensor)
                if gradient.layout != torch.strided:
                    raise RescaleError(
                        f"cannot rescale the gradient of {bound.name}, which is {gradient.layout}. If gradients are "
                        "zeroed before the next backward pass, leave them out: ENorm(..., gradients=False)."
                    )
                check_writable(f"the gradient of {bound.name}", gradient)
                yield Move(self._bindings.index(bound), gradient, -1)

    def _weights(self) -> Iterator[Move]:
        """Weights and averages of weights; those that share memory, as tied ones do, once."""
        seen: set[tuple[object, ...]] = set()
        for bound in self._bindings.moving:
            tensor = local(bound.tensor.detach())
            memory = (storage_of(tensor), tensor.storage_offset())
            if memory not in seen or not tensor.numel():
                seen.add(memory)
                yield Move(self._bindings.index(bound), tensor, 1, offset=bound.scaling.offset)

    def _states(self) -> Iterator[Move]:
        """Every state tensor that moves: the sum of its parts with weight decay, and the rest, each with its own power."""
        owners = self._optimizers.owners()
        for bound in self._bindings.own:
            if id(bound.tensor) not in owners:
                continue
            (stepped, group), name = owners[id(bound.tensor)], bound.name
            for key, state, law in [entry for holder in stepped.holders for entry in state_of(holder, bound.tensor, name)]:
                offset = shift(stepped.optimizer, law, key, name, bound.scaling.offset)
                stepped.parts.check(group, law, key, name, True)
                parts = tuple((local(part), power) for power, part in stepped.parts.of(name, key).items())
                if law.exponent or parts:
                    state = _part(f"state {key!r} of {name}", state, bound.tensor)
                    check_writable(f"state {key!r} of {name}", state)
                    averaged = self._averaged(bound, key, law)
                    yield Move(self._bindings.index(bound), state, law.exponent, parts, offset, averaged)

    def check_averages(self) -> None:
        """Refuse, before there is one, states that average over an axis along which scales differ.

        Raises:
            RescaleError: which names one.
        """
        owners = self._optimizers.owners()
        for bound in self._bindings.own:
            if id(bound.tensor) in owners:
                for key, law in laws(owners[id(bound.tensor)][0].optimizer).items():
                    self._averaged(bound, key, law)

    def _averaged(self, bound: Bound, key: str, law: Law) -> int | None:
        """The axis along which a state is an average, and scales are alike."""
        if law.averaged is None or bound.tensor.dim() < 2:
            return None
        unaveraged([ids for _, ids in bound.scaling.factors], law.averaged, f"state {key!r} of {bound.name}")
        return law.averaged


def _part(what: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a tensor, which must be the part that it holds of the parameter."""
    if box_of(what, tensor) != box_of(what, parameter):
        raise RescaleError(
            f"cannot rescale {what}: it is sharded otherwise than the parameter itself. Shard both alike, as fully_shard does."
        )
    return local(tensor)


def _address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Where and how it lies in memory; nothing for sparse tensors and others without memory of their own."""
    return (tensor.data_ptr(), tensor.stride()) if has_memory(tensor) else (0, ())
