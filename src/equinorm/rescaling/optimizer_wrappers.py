"""Optimizers inside of others, and several at once: which make the steps, and what keeps copies of weights around them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn, optim

from equinorm._errors import RescaleError, describe
from equinorm.rescaling.optimizer_laws import law_of, laws

Optimizers = optim.Optimizer | Sequence[optim.Optimizer]
"""One, or all that train a model together."""

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


def unwrapped_optimizers(given: Any) -> list[tuple[optim.Optimizer, list[Any]]]:
    """The optimizers that make the steps, one or several, each with the wrappers around it that have a state of their own.

    Raises:
        RescaleError: for what is no optimizer, wrappers that are not known, and parameters that two optimizers step.
    """
    several = given if isinstance(given, (tuple, list)) else [given]
    if not several:
        raise RescaleError("no optimizer was given; ENorm needs all that train the model.")
    found = [unwrapped_optimizer(optimizer) for optimizer in several]
    owners: dict[int, optim.Optimizer] = {}
    for optimizer, _ in found:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in own:
            if id(parameter) in owners and owners[id(parameter)] is not optimizer:
                kinds, shape = (type(owners[id(parameter)]).__name__, type(optimizer).__name__), tuple(parameter.shape)
                raise RescaleError(f"{' and '.join(kinds)} both step one parameter, of shape {shape}: give it to one of them.")
            owners[id(parameter)] = optimizer
    if len({id(optimizer) for optimizer, _ in found}) < len(found):
        raise RescaleError("one optimizer was given twice.")
    return found


def unwrapped_optimizer(optimizer: Any) -> tuple[optim.Optimizer, list[Any]]:
    """The optimizer that makes the steps, and the wrappers around it that have a state of their own.

    Raises:
        RescaleError: for what is no optimizer, and for wrappers that are not known.
    """
    wrappers: list[Any] = []
    while law_of(type(optimizer)) is None:
        kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__[:2]]
        place, keeps = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), (None, False))
        if place is None:
            _check_wraps_nothing(optimizer)
            break
        _check_pullback(optimizer)
        if keeps:
            wrappers.append(optimizer)
        optimizer = getattr(optimizer, place)
    if not isinstance(optimizer, optim.Optimizer):
        way = " The optimizer comes before the model." if isinstance(optimizer, nn.Module) else ""
        raise RescaleError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.{way}")
    laws(optimizer)
    if not isinstance(getattr(optimizer, "_optimizer_step_post_hooks", None), Mapping):
        raise RescaleError(f"{type(optimizer).__name__} was made without Optimizer.__init__, and takes no hooks on its steps.")
    return optimizer, wrappers


def _check_wraps_nothing(optimizer: Any) -> None:
    """Refuse what is no known wrapper, and has an optimizer inside."""
    kind = type(optimizer).__name__
    if kind == "ZeroRedundancyOptimizer":
        raise RescaleError(
            "ZeroRedundancyOptimizer keeps the state of each parameter in one process only, where it cannot be followed. "
            "Shard the model with torch.distributed.fsdp.fully_shard instead, whose optimizers are known."
        )
    found = [inner for name in _INSIDE if isinstance(inner := getattr(optimizer, name, None), optim.Optimizer)]
    if found and found[0] is not optimizer:
        raise RescaleError(
            f"{kind} wraps {type(found[0]).__name__}, and what it does to weights and gradients is not known. If it keeps "
            "no copies of weights and no averages of gradients itself, give the optimizer inside of it instead."
        )


def _check_pullback(wrapper: Any) -> None:
    """Refuse a Lookahead that writes into the momentum of the optimizer inside."""
    if getattr(wrapper, "pullback_momentum", "none") != "none":
        raise RescaleError(
            f"{type(wrapper).__name__} with pullback_momentum={wrapper.pullback_momentum!r} writes into the momentum of the "
            "optimizer that it wraps, which would have to be followed. Use pullback_momentum='none'."
        )


def check_trains(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer that holds no parameter of a model: nothing of it could move along.

    Raises:
        RescaleError: if it holds none, or is not known.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for inner, _ in unwrapped_optimizers(optimizer):
        if any(id(parameter) in own for group in inner.param_groups for parameter in group["params"]):
            continue
        raise RescaleError(
            f"{type(inner).__name__} holds no parameter of {describe(model)}, so that its state cannot move along. Give the "
            "optimizer that trains this very model (not a copy of it), or none."
        )
