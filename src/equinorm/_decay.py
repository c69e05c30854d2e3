"""Coupled weight decay inside an optimizer's averages, told apart exactly.

With coupled weight decay λ an average of degree 1 is

    M = Σ_i a_i (g_i + λ w_i) = Σ_i a_i g_i + λ Σ_i a_i w_i,

whose first part scales by 1/s and whose second by s; one of degree 2 is Σ a_i g_i² + 2λ Σ a_i g_i w_i + λ² Σ a_i w_i², with the
factors s^−2, 1 and s². The parts that contain w are kept beside the optimizer by its own recursion, so that after a rescaling
the average is the one of an optimizer that had worked in the new coordinates from the start.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, optim

from equinorm._errors import RescaleError
from equinorm._optimizers import Group, Law, check_group, coupled_decay, laws, refusal, state_of

Parts = dict[int, Tensor]
"""Exponent of s → part of a state tensor."""


class DecayParts:
    """The parts of an optimizer's averages that contain weights.

    Args:
        optimizer: whose averages.
        names: name by `id` of every parameter that moves.
        offsets: number that the network adds before it uses the tensor, by name, where it is not 0.
    """

    def __init__(self, optimizer: optim.Optimizer, names: Mapping[int, str], offsets: Mapping[str, float]) -> None:
        self._optimizer, self._names, self._offsets = optimizer, names, offsets
        self._parts: dict[str, dict[str, Parts]] = {}
        laws(optimizer)

    def of(self, name: str, key: str) -> Parts:
        """The parts of one state tensor; empty if it holds no weight decay."""
        return self._parts.get(name, {}).get(key, {})

    def before_step(self) -> None:
        """Follow what the optimizer is about to do. Call it before every step, with the gradients in place.

        Raises:
            RescaleError: if an average contains weight decay that was not followed from its start, or cannot be.
        """
        for group in self._optimizer.param_groups:
            decay = coupled_decay(self._optimizer, group)
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                check_group(self._optimizer, group, name)
                if decay or name in self._parts:
                    self._follow(group, decay, parameter, name)

    def _follow(self, group: Group, decay: float, parameter: Tensor, name: str) -> None:
        present = {key for key, _, _ in state_of(self._optimizer, parameter, name)}
        if name not in self._parts and float(self._optimizer.state.get(parameter, {}).get("step", 1)) == 0:
            present = set()  # Adagrad makes its state, still zero, before the first step
        for key, law in laws(self._optimizer).items():
            if not self._is_used(key, group):
                continue
            if law.average is None:
                if decay:
                    raise refusal(self._optimizer, key, name, decay, "Use decoupled weight decay, or none.")
                continue
            if name in self._offsets and decay:
                raise refusal(self._optimizer, key, name, decay, f"It is used as {self._offsets[name]:g} + w: exclude it.")
            parts = self.of(name, key)
            if key in present and not parts:
                if not decay:
                    continue
                raise refusal(
                    self._optimizer,
                    key,
                    name,
                    decay,
                    "How much of it is weight decay is not known: create ENorm before the first step, or load its state_dict.",
                )
            if key not in present or not parts:
                parts = {}
            self._parts.setdefault(name, {})[key] = self._entered(group, decay, parameter, law, parts)

    def _is_used(self, key: str, group: Group) -> bool:
        """Does an optimizer with these settings keep this state?"""
        switch = {"momentum_buffer": "momentum", "grad_avg": "centered", "max_exp_avg_sq": "amsgrad"}.get(key)
        return switch is None or bool(group.get(switch, True))

    def _entered(self, group: Group, decay: float, parameter: Tensor, law: Law, parts: Parts) -> Parts:
        """The parts after the step: keep · old + add · new."""
        average = law.average
        assert average is not None
        add = 1.0 if average.starts_whole and not parts else average.add(group)
        weight, gradient = parameter.detach(), parameter.grad
        assert gradient is not None
        new: Parts
        if average.degree == 1:
            new = {1: weight * (add * decay)}
        else:
            sign = -1.0 if group.get("maximize", False) else 1.0
            scale = getattr(self._optimizer, "grad_scale", None)  # fused optimizers divide by it inside of the step
            cross = weight * gradient.to(weight.dtype) * (2 * sign * add * decay)
            new = {0: cross if scale is None else cross / scale, 2: weight.square() * (add * decay**2)}
        if not parts:
            parts = {exponent: torch.zeros_like(part) for exponent, part in new.items()}
        keep = average.keep(group)
        skipped = getattr(self._optimizer, "found_inf", None)  # and skip it where gradients are not finite
        for exponent, part in new.items():
            after = part.add_(parts[exponent], alpha=keep)
            parts[exponent] = after if skipped is None else torch.where(skipped > 0, parts[exponent], after)
        return parts

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, dict[str, Parts]]:
        """The parts by parameter name, state key and exponent of s."""
        return {name: {key: dict(parts) for key, parts in states.items()} for name, states in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[int, Tensor]]]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            RescaleError: if it names parameters that this optimizer does not train, or other shapes.
        """
        tensors = dict(self._parameters())
        loaded: dict[str, dict[str, Parts]] = {}
        for name, states in state.items():
            if name not in tensors:
                raise RescaleError(f"the state holds weight decay of {name}, which this optimizer does not train.")
            like = tensors[name]
            for key, parts in states.items():
                for part in parts.values():
                    if part.shape != like.shape:
                        shapes = f"{tuple(part.shape)} where the model has {tuple(like.shape)}"
                        raise RescaleError(f"the state holds weight decay of {name} in shape {shapes}.")
                copies = {int(e): part.detach().to(like.device, like.dtype, copy=True) for e, part in parts.items()}
                loaded.setdefault(name, {})[key] = copies
        self._parts = loaded

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._names:
                    yield self._names[id(parameter)], parameter
