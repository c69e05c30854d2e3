"""What moves in one step, and by which power of its scales: weights, averages, the optimizer's state, gradients."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from equinorm._errors import RescaleError
from equinorm._memory import local, storage_of
from equinorm.rescaling.in_place import check_writable
from equinorm.rescaling.optimizer_state import shift, state_of
from equinorm.rescaling.recorded import Move
from equinorm.sharding.boxes import box_of
from equinorm.training.bound import Bindings
from equinorm.training.weight_decay import DecayParts


class Moves:
    """What moves with the weights.

    Args:
        bindings: the weights, and averages of them.
        optimizer: whose state moves along.
        wrappers: around it, with copies of weights in states of their own.
        parts: of the state that contain weight decay.

    Attributes:
        powers: of the scales that the last moves need.
    """

    def __init__(self, bindings: Bindings, optimizer: optim.Optimizer, wrappers: Sequence[Any], parts: DecayParts) -> None:
        self._bindings, self._optimizer, self._parts = bindings, optimizer, parts
        self._holders = [optimizer, *wrappers]
        self.powers: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """Look at everything again the next time, and keep nothing alive until then."""
        self._seen: list[object] = []
        self._last: list[Move] = []

    def of_weights(self) -> list[Move]:
        """Weights and states that move; the same list as before while they are the same tensors."""
        bindings = self._bindings
        tensors = [bound.tensor for bound in bindings.moving]
        states = [holder.state.get(bound.tensor, {}).values() for holder in self._holders for bound in bindings.own]
        tensors += [value for state in states for value in state if isinstance(value, Tensor)]
        tensors += self._parts.tensors()
        seen = [self._parts.is_following, *(group.get("weight_decay") for group in self._optimizer.param_groups)]
        seen += [(id(tensor), *_address(local(tensor))) for tensor in tensors]
        if seen != self._seen:
            self._last, self._seen = [*self._weights(), *self._states()], seen
            self.powers = {power for move in self._last for power in move.exponents}
        return self._last

    def of_gradients(self) -> Iterator[Move]:
        """Gradients that are there. Not to be kept: one that is set to None is to be freed.

        Raises:
            RescaleError: for those that cannot be rescaled.
        """
        for bound in self._bindings.own:
            if bound.tensor.grad is not None:
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
        groups = {id(parameter): group for group in self._optimizer.param_groups for parameter in group["params"]}
        for bound in self._bindings.own:
            held = [entry for holder in self._holders for entry in state_of(holder, bound.tensor, bound.name)]
            for key, state, law in held:
                offset = shift(self._optimizer, law, key, bound.name, bound.scaling.offset)
                self._parts.check(groups[id(bound.tensor)], law, key, bound.name, True)
                parts = tuple((local(part), power) for power, part in self._parts.of(bound.name, key).items())
                if law.exponent or parts:
                    state = _part(f"state {key!r} of {bound.name}", state, bound.tensor)
                    check_writable(f"state {key!r} of {bound.name}", state)
                    yield Move(self._bindings.index(bound), state, law.exponent, parts, offset)


def _part(what: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a tensor, which must be the part that it holds of the parameter."""
    if box_of(what, tensor) != box_of(what, parameter):
        raise RescaleError(
            f"cannot rescale {what}: it is sharded otherwise than the parameter itself. Shard both alike, as fully_shard does."
        )
    return local(tensor)


def _address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Where and how it lies in memory; nothing for sparse tensors and others without memory of their own."""
    has_memory = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (tensor.data_ptr(), tensor.stride()) if has_memory else (0, ())
