"""How an optimizer's state scales with its parameter.

Where w ↦ s·w, gradients scale by 1/s. A state tensor that is homogeneous of degree d in gradients scales by s^−d; one that
is an average of weights scales by s. The exponent of s is tabulated here for every state of every optimizer that is known.

Coupled weight decay feeds g + λw to the averages instead of g, and λw scales by s. Such an average is a sum of parts that
scale differently, which have to be told apart (`training.weight_decay`). States that are no such sum are refused.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from equinorm._errors import EquinormError, RescaleError, describe

Group = Mapping[str, Any]
"""An optimizer's parameter group."""


@dataclass(frozen=True, slots=True)
class Average:
    """state ← keep · state + add · (g + λw)^degree, from zero.

    Attributes:
        degree: 1 or 2.
        keep: of the old state, by parameter group.
        add: of the new entry.
        starts_whole: does the first entry count 1 instead of `add`?
    """

    degree: int
    keep: Callable[[Group], float]
    add: Callable[[Group], float]
    starts_whole: bool = False


@dataclass(frozen=True, slots=True)
class Law:
    """A state tensor scales by s^exponent.

    Attributes:
        exponent: of s.
        average: how coupled weight decay enters; None: in no way that can be undone.
        is_copy: is it a copy of the weight, or an average of such copies, so that it also has the weight's offset?
    """

    exponent: int
    average: Average | None = None
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class OptimizerLaw:
    """How an optimizer scales with its parameters.

    Attributes:
        states: the law of every state tensor of the shape of its parameter. Scalars such as step counts do not scale.
        update: exponent of s in its updates.
        is_decoupled: does weight decay never enter its state, whatever its groups say?
        is_registered: was it told by `register_optimizer`, so that it may be told anew?
    """

    states: Mapping[str, Law]
    update: int = 0
    is_decoupled: bool = False
    is_registered: bool = False


def _moving_average(degree: int, keep: Callable[[Group], float]) -> Law:
    return Law(-degree, Average(degree, keep, lambda group: 1 - keep(group)))


_MOMENTUM = Average(1, lambda g: float(g["momentum"]), lambda g: 1 - float(g["dampening"]), starts_whole=True)
_FIRST = _moving_average(1, lambda g: float(g["betas"][0]))
_SECOND = _moving_average(2, lambda g: float(g["betas"][1]))
_SUM = Average(2, lambda g: 1.0, lambda g: 1.0)

_ADAM = {"exp_avg": _FIRST, "exp_avg_sq": _SECOND, "max_exp_avg_sq": Law(-2)}

LAWS: dict[type[optim.Optimizer], OptimizerLaw] = {
    optim.SGD: OptimizerLaw({"momentum_buffer": Law(-1, _MOMENTUM)}, update=-1),
    optim.Adam: OptimizerLaw(_ADAM),
    optim.AdamW: OptimizerLaw(_ADAM, is_decoupled=True),
    optim.Adamax: OptimizerLaw({"exp_avg": _FIRST, "exp_inf": Law(-1)}),
    optim.NAdam: OptimizerLaw({"exp_avg": _FIRST, "exp_avg_sq": _SECOND}),
    optim.RAdam: OptimizerLaw({"exp_avg": _FIRST, "exp_avg_sq": _SECOND}),
    optim.Adagrad: OptimizerLaw({"sum": Law(-2, _SUM)}),
    optim.RMSprop: OptimizerLaw(
        {
            "square_avg": _moving_average(2, lambda g: float(g["alpha"])),
            "grad_avg": _moving_average(1, lambda g: float(g["alpha"])),
            "momentum_buffer": Law(0),
        }
    ),
    optim.Adadelta: OptimizerLaw({"square_avg": _moving_average(2, lambda g: float(g["rho"])), "acc_delta": Law(0)}),
}
"""The law of every optimizer that is known."""

_COPIES = dict.fromkeys(["lookahead_slow_buff", "slow_params", "backup_params"], Law(1, is_copy=True))
"""What Lookahead adds to the state of the optimizer that it wraps, or keeps beside it, in timm and in pytorch_optimizer."""

_WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer": ("optimizer", False),
    "lightning.pytorch.core.optimizer.LightningOptimizer": ("optimizer", False),
    "pytorch_lightning.core.optimizer.LightningOptimizer": ("optimizer", False),
    "pytorch_optimizer.optimizer.lookahead.Lookahead": ("optimizer", True),
    "timm.optim.lookahead.Lookahead": ("_base_optimizer", True),
}
"""Where known wrappers hold the optimizer that makes the steps, and whether they keep copies of weights in a state."""

_INSIDE = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "inner_optimizer", "optim")
"""Where others may."""

_COUNTERS = ("step", "mu_product")
"""Scalars of the known optimizers, which have the shape of a parameter that is a scalar."""


def register_optimizer(
    kind: type[optim.Optimizer], exponents: Mapping[str, int], *, update: int = -1, decoupled_weight_decay: bool = False
) -> None:
    """Tell how an optimizer's state scales where a weight scales by s: state ↦ s^exponent · state.

    Gradients scale by s^−1, so averages of gradients have exponent −1, averages of their squares −2, averages of weights 1.

    Args:
        kind: the optimizer's class.
        exponents: of every state tensor that has its parameter's shape, by its key in `optimizer.state[parameter]`.
        update: exponent of its updates: −1 if they are proportional to gradients, 0 if gradients are divided by their size.
        decoupled_weight_decay: True if weight decay never enters these tensors. If False, a nonzero weight decay is refused.

    Raises:
        EquinormError: if `kind` is not a class of optimizers, or one that Equinorm knows itself, or an exponent is no integer.

    >>> import torch, equinorm
    >>> class Averaging(torch.optim.SGD):
    ...     pass
    >>> equinorm.register_optimizer(Averaging, {"momentum_buffer": -1}, decoupled_weight_decay=False)
    """
    if not (isinstance(kind, type) and issubclass(kind, optim.Optimizer)):
        raise EquinormError(f"kind must be a subclass of torch.optim.Optimizer, not {kind!r}.")
    if kind in LAWS and not LAWS[kind].is_registered:
        raise EquinormError(f"the state of {kind.__name__} is known already; register a subclass of it for another law.")
    if not isinstance(exponents, Mapping):
        raise EquinormError(f"exponents must be a dict from state keys to integers, not {type(exponents).__name__}.")
    for key, exponent in [*exponents.items(), ("update", update)]:
        if isinstance(exponent, bool) or not isinstance(exponent, int):
            raise EquinormError(f"the exponent of {key!r} must be an integer, not {exponent!r}.")
    states = {key: Law(exponent) for key, exponent in exponents.items()}
    LAWS[kind] = OptimizerLaw(states, update, decoupled_weight_decay, is_registered=True)


def laws(optimizer: optim.Optimizer) -> Mapping[str, Law]:
    """The laws of an optimizer's state.

    Raises:
        RescaleError: if its class is not known.
    """
    kind = type(optimizer)
    if kind not in LAWS:
        known = ", ".join(sorted(known.__name__ for known in LAWS))
        raise RescaleError(
            f"cannot rescale the state of {kind.__name__}: how it scales is not known. Known: {known}. "
            "Register it: equinorm.register_optimizer(kind, {state key: exponent})."
        )
    return LAWS[kind].states


def unwrapped_optimizer(optimizer: Any) -> tuple[optim.Optimizer, list[Any]]:
    """The optimizer that makes the steps, and the wrappers around it that have a state of their own.

    Raises:
        RescaleError: for what is no optimizer, and for wrappers that are not known.
    """
    wrappers: list[Any] = []
    while type(optimizer) not in LAWS:
        kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__[:2]]
        place, keeps = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), (None, False))
        found = [inner for name in _INSIDE if isinstance(inner := getattr(optimizer, name, None), optim.Optimizer)]
        kind = type(optimizer).__name__
        if kind == "ZeroRedundancyOptimizer":
            raise RescaleError(
                "ZeroRedundancyOptimizer keeps the state of each parameter in one process only, where it cannot be followed. "
                "Shard the model with torch.distributed.fsdp.fully_shard instead, whose optimizers are known."
            )
        if place is None and found and found[0] is not optimizer:
            raise RescaleError(
                f"{kind} wraps {type(found[0]).__name__}, and what it does to weights and gradients is not known. If it keeps "
                "no copies of weights and no averages of gradients itself, give the optimizer inside of it instead."
            )
        if place is None:
            break
        if getattr(optimizer, "pullback_momentum", "none") != "none":
            raise RescaleError(
                f"{kind} with pullback_momentum={optimizer.pullback_momentum!r} writes into the momentum of the optimizer that "
                "it wraps, which would have to be followed. Use pullback_momentum='none'."
            )
        inner = getattr(optimizer, place)
        if keeps:
            wrappers.append(optimizer)
        optimizer = inner
    if not isinstance(optimizer, optim.Optimizer):
        raise RescaleError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    laws(optimizer)
    if not isinstance(getattr(optimizer, "_optimizer_step_post_hooks", None), Mapping):
        raise RescaleError(f"{type(optimizer).__name__} was made without Optimizer.__init__, and takes no hooks on its steps.")
    return optimizer, wrappers


def check_trains(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer that holds no parameter of a model: nothing of it could move along.

    Raises:
        RescaleError: if it holds none, or is not known.
    """
    inner, _ = unwrapped_optimizer(optimizer)
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in inner.param_groups for parameter in group["params"]):
        raise RescaleError(
            f"{type(inner).__name__} holds no parameter of {describe(model)}, so that its state cannot move along. Give the "
            "optimizer that trains this very model (not a copy of it), or none."
        )


def update_exponent(optimizer: optim.Optimizer) -> int:
    """Exponent of s in the updates of a known optimizer."""
    return LAWS[type(optimizer)].update


def coupled_decay(optimizer: optim.Optimizer, group: Group) -> float:
    """The weight decay that enters the state of a parameter group; 0 if none does."""
    law = LAWS.get(type(optimizer))
    decoupled = (law is not None and law.is_decoupled) or group.get("decoupled_weight_decay", False)
    return 0.0 if decoupled else float(group.get("weight_decay", 0.0))


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
    known = laws(optimizer) if type(optimizer) in LAWS else {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or (value.dim() == 0 and (parameter.dim() or key in _COUNTERS)):
            continue
        if value.shape != parameter.shape:
            what = f"state {key!r} of {type(optimizer).__name__} for {name}"
            raise RescaleError(
                f"cannot rescale {what}: its shape {tuple(value.shape)} is not the parameter's {tuple(parameter.shape)}. "
                "Factored and flattened states are not supported."
            )
        if key not in known and key not in _COPIES:
            raise RescaleError(
                f"cannot rescale state {key!r} of {type(optimizer).__name__} for {name}: how it scales is not known. "
                "Register it: equinorm.register_optimizer(kind, {state key: exponent})."
            )
        yield key, value, known[key] if key in known else _COPIES[key]


def refusal(optimizer: optim.Optimizer, key: str, name: str, decay: float, remedy: str) -> RescaleError:
    """Why a state that contains coupled weight decay cannot move."""
    return RescaleError(
        f"cannot rescale state {key!r} of {type(optimizer).__name__} for {name} exactly: its weight decay of {decay:g} is "
        f"mixed into it and scales by s where gradients scale by 1/s. {remedy}"
    )


def scaled_state(
    optimizer: Any, parameters: Mapping[int, tuple[str, float]]
) -> Iterator[tuple[str, Tensor, Tensor, int, float]]:
    """Every state tensor that scales: description, parameter, tensor, exponent of s, offset.

    Args:
        optimizer: one of the known classes.
        parameters: name and offset by `id` of every parameter that moves.

    Raises:
        RescaleError: if the optimizer or one of its states is unknown, or one contains coupled weight decay.
    """
    optimizer, wrappers = unwrapped_optimizer(optimizer)
    for group in optimizer.param_groups:
        for parameter in (found for found in group["params"] if id(found) in parameters):
            name, offset = parameters[id(parameter)]
            check_group(optimizer, group, name)
            for holder in (optimizer, *wrappers):
                for key, value, law in state_of(holder, parameter, name):
                    if not law.is_copy and (decay := coupled_decay(optimizer, group)):
                        remedy = (
                            "Use decoupled weight decay, rescale before the first step, or train with equinorm.ENorm, which "
                            "tells the two parts apart, and call its cycle_()."
                        )
                        raise refusal(optimizer, key, name, decay, remedy)
                    if law.exponent:
                        yield f"{key} of {name}", parameter, value, law.exponent, shift(optimizer, law, key, name, offset)


def shift(optimizer: optim.Optimizer, law: Law, key: str, name: str, offset: float) -> float:
    """The offset of a state tensor: that of the weight for its copies, none for what comes from gradients.

    Raises:
        RescaleError: for what scales like a weight that has one, and may or may not have it too.
    """
    if not offset or law.is_copy or law.exponent <= 0:
        return offset if law.is_copy else 0.0
    raise RescaleError(
        f"cannot rescale state {key!r} of {type(optimizer).__name__} for {name}: the network uses {offset:g} + {name}, and it "
        "is not known whether this state is an average of weights or of their changes."
    )
