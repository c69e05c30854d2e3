"""The state of an optimizer that moves with a parameter, tensor by tensor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from equinorm._errors import RescaleError
from equinorm._memory import local
from equinorm.rescaling.flat_state import flat_states
from equinorm.rescaling.optimizer_laws import COPIES, Group, Law, coupled_decay, law_of
from equinorm.rescaling.optimizer_wrappers import unwrapped_optimizers

_COUNTERS = ("step", "mu_product", "eta", "mu")
"""Scalars of the known optimizers, which have the shape of a parameter that is a scalar."""


def check_group(optimizer: optim.Optimizer, group: Group, name: str) -> None:
    """Refuse settings of a parameter group whose state is no sum of homogeneous parts."""
    if group.get("initial_accumulator_value", 0) != 0:
        raise RescaleError(
            f"cannot rescale the state of {type(optimizer).__name__} for {name}: it started from "
            f"initial_accumulator_value={group['initial_accumulator_value']}, which does not scale. Start from 0."
        )


def state_of(optimizer: optim.Optimizer, parameter: Tensor, name: str) -> Iterator[tuple[str, Tensor, Law]]:
    """Key, tensor and law of every state of one parameter that may scale.

    Raises:
        RescaleError: if a tensor's law is not known.
    """
    law = law_of(type(optimizer))
    known = COPIES if law is None else {**COPIES, **law.states}
    held = optimizer.state.get(parameter, {}).items()
    for key, value in flat_states(optimizer, parameter) if isinstance(optimizer, optim.LBFGS) else held:
        if not isinstance(value, Tensor) or (value.dim() == 0 and (parameter.dim() or key in _COUNTERS)):
            continue
        what = f"state {key!r} of {type(optimizer).__name__} for {name}"
        if is_traceable_wrapper_subclass(local(value)):
            raise RescaleError(f"cannot rescale {what}: it is a {type(value).__name__}; plain dense tensors are needed.")
        if value.shape != _shape(parameter, known.get(key)):
            raise RescaleError(
                f"cannot rescale {what}: its shape {tuple(value.shape)} is not the parameter's {tuple(parameter.shape)}. "
                "Factored and flattened states are supported of PyTorch's own optimizers only."
            )
        if key not in known:
            raise RescaleError(
                f"cannot rescale {what}: how it scales is not known. "
                "Register it: equinorm.register_optimizer(kind, {state key: exponent})."
            )
        yield key, value, known[key]


def _shape(parameter: Tensor, law: Law | None) -> torch.Size:
    """That a state of this law has."""
    sizes = [*parameter.shape]
    if law is not None and law.averaged is not None and parameter.dim() > 1:
        sizes[law.averaged] = 1
    return torch.Size(sizes)


def unaveraged(factors: Sequence[Tensor], axis: int, what: str) -> list[Tensor]:
    """Scales of a tensor, or their classes, as they apply to an average over one axis.

    Raises:
        RescaleError: if they differ along the axis.
    """
    found = []
    for factor in factors:
        first = factor.narrow(axis, 0, 1)
        if bool((factor != first).any()):
            raise RescaleError(
                f"cannot rescale {what} exactly: it holds averages of squared gradients over axis {factor.dim() + axis}, along "
                "which the scales differ, and the average after a rescaling is not known from the one before. Use an optimizer "
                "that keeps one number for each weight (Adam, SGD, Muon), or keep this tensor still (modules=)."
            )
        found.append(first)
    return found


def refusal(optimizer: optim.Optimizer, key: str, name: str, decay: float, remedy: str) -> RescaleError:
    """Why a state that contains coupled weight decay cannot move."""
    return RescaleError(
        f"cannot rescale state {key!r} of {type(optimizer).__name__} for {name} exactly: its weight decay of {decay:g} is "
        f"mixed into it and scales by s where gradients scale by 1/s. {remedy}"
    )


class Moving(NamedTuple):
    """A parameter that moves.

    Attributes:
        name: of its tensor.
        offset: number that the network adds before it uses the tensor.
        logs: natural logarithms of its scales.
    """

    name: str
    offset: float
    logs: Sequence[Tensor]


class Scaled(NamedTuple):
    """A state tensor that scales.

    Attributes:
        what: its name.
        parameter: whose it is.
        tensor: itself.
        exponent: of s.
        offset: number that the network adds before it uses the tensor.
        averaged: axis along which it is an average.
    """

    what: str
    parameter: Tensor
    tensor: Tensor
    exponent: int
    offset: float
    averaged: int | None


def scaled_state(optimizer: Any, moving: Mapping[int, Moving]) -> Iterator[Scaled]:
    """Every state tensor that scales.

    Args:
        optimizer: one of the known classes, or several.
        moving: every parameter that does, by `id`.

    Raises:
        RescaleError: if the optimizer or one of its states is unknown, or one contains coupled weight decay.
    """
    for inner, wrappers in unwrapped_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if id(parameter) in moving:
                    own = moving[id(parameter)]
                    check_group(inner, group, own.name)
                    for holder in (inner, *wrappers):
                        yield from _scaled(holder, coupled_decay(inner, group), parameter, own)


def _scaled(holder: Any, decay: float, parameter: Tensor, moving: Moving) -> Iterator[Scaled]:
    """Of one parameter."""
    name = moving.name
    for key, value, law in state_of(holder, parameter, name):
        if decay and not law.is_copy:
            remedy = (
                "Use decoupled weight decay, rescale before the first step, or train with equinorm.ENorm, which "
                "tells the two parts apart, and call its cycle_()."
            )
            raise refusal(holder, key, name, decay, remedy)
        if law.exponent:
            averaged = law.averaged if parameter.dim() > 1 else None
            offset = shift(holder, law, key, name, moving.offset)
            yield Scaled(f"{key} of {name}", parameter, value, law.exponent, offset, averaged)


def shift(optimizer: optim.Optimizer, law: Law, key: str, name: str, offset: float) -> float:
    """The offset of a state tensor: that of the weight for its copies, none for what comes from gradients.

    Raises:
        RescaleError: for what scales like a weight that has one, and may or may not have it too.
    """
    if not offset or law.is_copy or law.is_difference or law.exponent <= 0:
        return offset if law.is_copy else 0.0
    raise RescaleError(
        f"cannot rescale state {key!r} of {type(optimizer).__name__} for {name}: the network uses {offset:g} + {name}, and it "
        "is not known whether this state is an average of weights or of their changes."
    )
