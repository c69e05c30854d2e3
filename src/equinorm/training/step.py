"""One rescaling step, recorded: which tensors are read, which move along, and by which power of their scales."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from equinorm import native
from equinorm._errors import RescaleError
from equinorm._modules import on_cpu, unwrapped
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.balancing.energy_reader import fits_float32
from equinorm.rescaling.in_place import check_writable
from equinorm.rescaling.model_guard import ModelGuard
from equinorm.rescaling.optimizer_state import shift, state_of, update_exponent
from equinorm.rescaling.recorded import Move, Mover
from equinorm.rescaling.writing import uninterrupted
from equinorm.training.bias_steps import BiasSteps
from equinorm.training.frozen import Selection
from equinorm.training.recorded_cycle import Cycle
from equinorm.training.torch_compile import compiled
from equinorm.training.weight_decay import DecayParts

Place = tuple[tuple[torch.device, torch.dtype, tuple[int, ...]], ...]
"""Device, dtype and strides of every tensor that moves."""


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """A tensor that moves, or may once it is unfrozen: its scaling, name, and the tensor itself."""

    scaling: Scaling
    name: str
    tensor: Tensor


class Plan:
    """Runs cycles on the current weights and moves everything that belongs to them.

    Args:
        symmetries: of the model.
        selection: which tensors move, and of which the norm counts.
        optimizer: whose state moves along.
        wrappers: around it, with copies of weights in states of their own.
        averages: modules with averaged weights.
        p: the norm.
        c: asymmetry.
        method: "cyclic" or "two-level".
        symmetric_biases: let biases take the steps that they would take at c = 1.
        power_of_two: round scales to powers of two.
        compile: passes over the weights as compiled kernels: in C++ on a CPU, by torch.compile elsewhere.

    Raises:
        RescaleError: for tensors, optimizers and averages that cannot be moved exactly.
    """

    def __init__(
        self,
        symmetries: Symmetries,
        selection: Selection,
        optimizer: optim.Optimizer,
        wrappers: Sequence[Any],
        averages: Sequence[nn.Module],
        p: float,
        c: float,
        method: str,
        symmetric_biases: bool,
        power_of_two: bool,
        compile: bool,
    ) -> None:
        self._symmetries, self._selection, self._optimizer = symmetries, selection, optimizer
        self._holders = [optimizer, *wrappers]
        self._p, self._c, self._method, self._power_of_two = p, c, method, power_of_two
        self._symmetric_biases, self._compile = symmetric_biases, compile
        tensors = symmetries.tensors
        self._all = [found for scaling in selection.candidates for found in _distinct(scaling, tensors)]
        self._copies: list[_Bound] = []
        self._watches = [ModelGuard(symmetries.model, {bound.name: bound.tensor for bound in self._all})]
        for module in averages:
            copies = self._averaged(module)
            self._copies += copies
            self._watches.append(
                ModelGuard(unwrapped(module), {copy.name: copy.tensor for copy in copies}, "the averaged model")
            )
        offsets = {bound.name: bound.scaling.offset for bound in self._all if bound.scaling.offset}
        self.parts = DecayParts(optimizer, {id(bound.tensor): bound.name for bound in self._all}, offsets, compile)
        self._select()
        self._check_trained()
        self._seen: list[object] = []
        self._last: list[Move] = []
        self._powers: set[int] = set()
        self._record()

    def forget(self) -> None:
        """Keep nothing alive that the optimizer lets go."""
        self._seen, self._last = [], []
        self._mover.forget()

    def shares(self, other: "Plan") -> bool:
        """Do both move some tensor?"""
        return not {id(bound.tensor) for bound in self._all}.isdisjoint(id(bound.tensor) for bound in other._all)

    @on_cpu()
    def weigh(self, c: float) -> None:
        """Set the asymmetry."""
        self._cycle.weigh(c)
        self._biases.weigh(c)
        self._c = c

    def before_step(self) -> None:
        """Look at what the optimizer is about to change.

        Raises:
            RescaleError: if its averages contain weight decay that was not followed.
        """
        self.parts.before_step()
        self._biases.before_step()

    def after_step(self) -> None:
        """Correct the steps of biases."""
        self.parts.after_step()
        self._biases.after_step()

    @on_cpu()
    def residual(self) -> float:
        """ρ of the current weights; energies that have left float32's range meanwhile are in float64 from now on."""
        self._renew()
        if not self._bound:
            return 0.0
        if not self._is_wide and not self._fits_float32():
            self._record()
        with torch.no_grad(), self._full_precision():
            return float(self._cycle.residual())

    @on_cpu()
    def run(self, cycles: int, gradients: bool) -> None:
        """Run so many cycles and move everything.

        Raises:
            RescaleError: if the model has changed or something cannot move; nothing has moved then.
        """
        self._renew()
        if not self._bound:
            return
        moves = self._moves()
        passing = [*self._gradients()] if gradients else []  # not kept: a gradient set to None is to be freed
        powers = self._powers | {power for move in passing for power in move.exponents}
        with torch.no_grad():
            with self._full_precision():
                z = self._cycles(cycles)
            if self._held is not None:  # a family may be held in part
                z = z.masked_fill(self._held, 0.0)
            skipped = getattr(self._optimizer, "found_inf", None)  # fused optimizers skip a step on the device
            z = z if skipped is None else torch.where(skipped > 0, torch.zeros_like(z), z)
            z = self._mover.within(z, powers, [*moves, *passing])
            with uninterrupted():
                self._mover.aim(z, powers)
                self._move(moves, passing)

    def _full_precision(self) -> contextlib.AbstractContextManager:
        """Sums of energies stay in their dtype where a step is made under autocast."""
        kind = self._bound[0].tensor.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()

    # ------------------------------------------------------------------------------------------------------ what moves

    def _moves(self) -> list[Move]:
        """Weights and states that move; the same list as before while they are the same tensors."""
        tensors = [bound.tensor for bound in [*self._bound, *self._averages]]
        states = [holder.state.get(bound.tensor, {}).values() for holder in self._holders for bound in self._bound]
        tensors += [value for state in states for value in state if isinstance(value, Tensor)]
        tensors += self.parts.tensors()
        seen = [self.parts.is_following, *(group.get("weight_decay") for group in self._optimizer.param_groups)]
        seen += [(id(tensor), *_address(tensor)) for tensor in tensors]
        if seen != self._seen:
            self._last, self._seen = [*self._weights(), *self._states()], seen
            self._powers = {power for move in self._last for power in move.exponents}
        return self._last

    def _weights(self) -> Iterator[Move]:
        """Weights and averages of weights; those that share memory, as tied ones do, once."""
        seen: set[tuple[object, ...]] = set()
        for bound in [*self._bound, *self._averages]:
            memory = (bound.tensor.untyped_storage()._cdata, bound.tensor.storage_offset())
            if memory not in seen:
                seen.add(memory)
                yield Move(self._index(bound), bound.tensor.detach(), 1, offset=bound.scaling.offset)

    def _states(self) -> Iterator[Move]:
        """Every state tensor that moves: the sum of its parts with weight decay, and the rest, each with its own power."""
        groups = {id(parameter): group for group in self._optimizer.param_groups for parameter in group["params"]}
        for bound in self._bound:
            held = [entry for holder in self._holders for entry in state_of(holder, bound.tensor, bound.name)]
            for key, state, law in held:
                offset = shift(self._optimizer, law, key, bound.name, bound.scaling.offset)
                self.parts.check(groups[id(bound.tensor)], law, key, bound.name, True)
                parts = self.parts.of(bound.name, key)
                if law.exponent or parts:
                    check_writable(f"state {key!r} of {bound.name}", state)
                    yield Move(
                        self._index(bound), state, law.exponent, tuple((part, power) for power, part in parts.items()), offset
                    )

    def _gradients(self) -> Iterator[Move]:
        for bound in self._bound:
            if bound.tensor.grad is not None:
                if bound.tensor.grad.layout != torch.strided:
                    raise RescaleError(
                        f"cannot rescale the gradient of {bound.name}, which is {bound.tensor.grad.layout}. If gradients are "
                        "zeroed before the next backward pass, leave them out: ENorm(..., gradients=False)."
                    )
                check_writable(f"the gradient of {bound.name}", bound.tensor.grad)
                yield Move(self._index(bound), bound.tensor.grad, -1)

    # ------------------------------------------------------------------------------------------------------ recording

    def _renew(self) -> None:
        """See that the model is what it was; record again if it has moved to another device or dtype."""
        for watch in self._watches:
            watch.check()
        if self._selection.renew():
            self._select()
            self._selection.tell()
        self._check_trained()
        if self._bound and self._place != self._current_place():
            self._record()

    def _select(self) -> None:
        """Bind what moves now."""
        self._places = {id(scaling): index for index, scaling in enumerate(self._selection.moving)}
        self._bound = [bound for bound in self._all if id(bound.scaling) in self._places]
        self._averages = [bound for bound in self._copies if id(bound.scaling) in self._places]
        self.parts.moving = {bound.name for bound in self._bound}
        self._place: Place = ()

    def _index(self, bound: _Bound) -> int:
        """Of its scaling among those that move."""
        return self._places[id(bound.scaling)]

    def _current_place(self) -> Place:
        tensors = [bound.tensor for bound in [*self._bound, *self._averages]]
        return tuple((tensor.device, tensor.dtype, tensor.stride()) for tensor in tensors)

    def _record(self) -> None:
        for bound in [*self._bound, *self._averages]:
            self._check_tensor(bound)
        place = self._current_place()
        devices = {device for device, _, _ in place}
        if len(devices) > 1:
            raise RescaleError(f"what moves lies on several devices ({', '.join(map(str, devices))}); ENorm needs it on one.")
        device = devices.pop()
        is_wide = 2 < self._p < float("inf") or any(dtype == torch.float64 for _, dtype, _ in place)
        self._is_wide = is_wide or not self._fits_float32()
        dtype = torch.float64 if self._is_wide else torch.float32
        found = self._symmetries
        is_native = self._compile and device.type in native.DEVICES
        layouts, held = self._selection.layouts, self._selection.held
        self._held = held.to(device) if bool(held.any()) else None
        self._cycle = Cycle(layouts, found.tensors, found.family_ranges, self._p, self._method, device, dtype, is_native)
        self._cycle.weigh(self._c)
        biases = [(s, found.tensors[s.name]) for s in found.scalings if s.factors and s.role == "bias"]
        power = update_exponent(self._optimizer)
        q = self._p if self._p < float("inf") else 1.0
        self._biases = BiasSteps(biases if self._symmetric_biases else [], layouts, found.family_ranges, q, power)
        self._biases.weigh(self._c)
        dtypes = {dtype for _, dtype, _ in place} if is_native else ()
        self._mover = Mover(self._selection.moving, found.tensors, device, dtype, self._power_of_two, dtypes)
        if is_native:  # those of weight decay too, so that no step can fail for want of a compiler
            for _, kind, _ in place:
                native.kernels_for(kind, torch.promote_types(kind, torch.float32))
        self._cycles, self._move = self._cycle.run, self._mover.move_
        if self._compile and not is_native:
            self._cycles, self._move = compiled(self._cycles), compiled(self._move)
        self._place, self._seen = place, []

    def _fits_float32(self) -> bool:
        """Can sums of energies be taken in float32?"""
        tensors = self._symmetries.tensors
        with torch.no_grad(), self._full_precision():
            return all(fits_float32(layout, tensors[layout.scaling.name], self._p) for layout in self._selection.layouts)

    def _check_tensor(self, bound: _Bound) -> None:
        name, tensor = bound.name, bound.tensor
        if is_traceable_wrapper_subclass(tensor):
            raise RescaleError(f"cannot rescale {name}: it is a {type(tensor).__name__}; ENorm needs plain dense tensors.")
        check_writable(name, tensor)
        if tensor.dtype in (torch.float16, torch.bfloat16):
            if not self._power_of_two:
                raise RescaleError(
                    f"cannot rescale {name} exactly: it is {tensor.dtype}, where real scales are rounded away. "
                    "Use power_of_two=True, or keep the weights in float32 (autocast does)."
                )
            if bound.scaling.offset:
                raise RescaleError(f"cannot rescale {name} exactly: the network uses 1 + {name}, and it is {tensor.dtype}.")

    def _check_trained(self) -> None:
        """Refuse trainable tensors that this optimizer does not step: another one may, whose state would not move."""
        trained = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        for bound in self._bound:
            if bound.tensor.requires_grad and id(bound.tensor) not in trained:
                raise RescaleError(
                    f"{bound.name} moves and requires gradients, but is not among the parameters of this optimizer. "
                    "Add it, freeze it (requires_grad_(False)), or keep it still with `modules`."
                )

    def _averaged(self, module: nn.Module) -> list[_Bound]:
        """The tensors of a module with averaged weights, under the model's names."""
        tensors = dict([*unwrapped(module).named_parameters(), *unwrapped(module).named_buffers()])
        for bound in self._all:
            if bound.name not in tensors or tensors[bound.name].shape != bound.tensor.shape:
                raise RescaleError(f"the averaged model has no {bound.name} of shape {tuple(bound.tensor.shape)}.")
        return [_Bound(bound.scaling, bound.name, tensors[bound.name]) for bound in self._all]


def _address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Where and how it lies in memory; nothing for sparse tensors and others without memory of their own."""
    has_memory = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (tensor.data_ptr(), tensor.stride()) if has_memory else (0, ())


def _distinct(scaling: Scaling, tensors: Mapping[str, Tensor]) -> list[_Bound]:
    """Tied tensors, each once under its first name."""
    names = {id(tensors[name]): name for name in reversed(scaling.names) if name in tensors}
    return [_Bound(scaling, name, tensors[name]) for name in reversed(names.values())]
