"""How the state of an optimizer scales with its parameter.

Where w ↦ s·w, gradients scale by 1/s. A state tensor that is homogeneous of degree d in gradients scales by s^−d; one that
is an average of weights scales by s. The exponent of s is tabulated here for every state of every optimizer that is known.

Coupled weight decay feeds g + λw to the averages instead of g, and λw scales by s. Such an average is a sum of parts that
scale differently, which have to be told apart (`training.weight_decay`). States that are no such sum are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import optim

from equinorm._arguments import is_whole
from equinorm._errors import EquinormError, RescaleError

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
        is_difference: is it a difference of weights, so that it has no offset?
        averaged: axis along which the entries of a parameter of several axes are averaged to one; None: it has its shape.
    """

    exponent: int
    average: Average | None = None
    is_copy: bool = False
    is_difference: bool = False
    averaged: int | None = None


@dataclass(frozen=True, slots=True)
class OptimizerLaw:
    """How an optimizer scales with its parameters.

    Attributes:
        states: the law of every state tensor of the shape of its parameter. Scalars such as step counts do not scale.
        update: exponent of s in its updates.
        is_decoupled: does weight decay never enter its state, whatever its groups say?
        remembers: does its state hold points or steps of its path, so that nobody else may change a step?
        is_registered: was it told by `register_optimizer`, so that it may be told anew?
    """

    states: Mapping[str, Law]
    update: int = 0
    is_decoupled: bool = False
    remembers: bool = False
    is_registered: bool = False


def _moving_average(degree: int, keep: Callable[[Group], float]) -> Law:
    return Law(-degree, Average(degree, keep, lambda group: 1 - keep(group)))


_MOMENTUM = Average(1, lambda g: float(g["momentum"]), lambda g: 1 - float(g["dampening"]), starts_whole=True)
_FIRST = _moving_average(1, lambda g: float(g["betas"][0]))
_SECOND = _moving_average(2, lambda g: float(g["betas"][1]))
_SUM = Average(2, lambda g: 1.0, lambda g: 1.0)

_POINT = Law(1, is_copy=True)

_ADAM = {"exp_avg": _FIRST, "exp_avg_sq": _SECOND, "max_exp_avg_sq": Law(-2)}
_FACTORED = {"row_var": Law(-2, averaged=-1), "col_var": Law(-2, averaged=-2), "variance": Law(-2)}
_PAIRS = {
    **dict.fromkeys(["d", "old_stps"], Law(1, is_difference=True)),
    **dict.fromkeys(["prev_flat_grad", "old_dirs"], Law(-1)),
}

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
    optim.Rprop: OptimizerLaw({"prev": Law(-1), "step_size": Law(0)}),
    optim.Muon: OptimizerLaw({"momentum_buffer": Law(-1)}, is_decoupled=True),
    optim.Adafactor: OptimizerLaw(_FACTORED, is_decoupled=True),
    optim.ASGD: OptimizerLaw({"ax": _POINT}, update=-1, is_decoupled=True, remembers=True),
    optim.SparseAdam: OptimizerLaw({"exp_avg": Law(-1), "exp_avg_sq": Law(-2)}),
    optim.LBFGS: OptimizerLaw(_PAIRS, update=1, is_decoupled=True, remembers=True),
}
"""The law of every optimizer of PyTorch that is known."""

_LION = OptimizerLaw({"exp_avg": Law(-1)}, is_decoupled=True)

ELSEWHERE = {
    "lion_pytorch.lion_pytorch.Lion": _LION,
    "timm.optim.lion.Lion": _LION,
    **{
        f"schedulefree.sgd_schedulefree{form.lower()}.SGDScheduleFree{form.strip('_')}": OptimizerLaw(
            {"z": _POINT}, update=-1, is_decoupled=True, remembers=True
        )
        for form in ("", "_Closure")
    },
    **{
        f"schedulefree.{kind.lower()}_schedulefree{form.lower()}.{kind}ScheduleFree{form.strip('_')}": OptimizerLaw(
            {"z": _POINT, "exp_avg_sq": Law(-2)}, is_decoupled=True, remembers=True
        )
        for kind in ("AdamW", "RAdam")
        for form in ("", "_Closure")
    },
}
"""Those of other packages, by module and name, so that nothing need be imported."""

COPIES = dict.fromkeys(["lookahead_slow_buff", "slow_params", "backup_params"], _POINT)
"""What Lookahead adds to the state of the optimizer that it wraps, or keeps beside it, in timm and in pytorch_optimizer."""

_BLOCKS = (
    "it keeps its averages in blocks of few bits that share one scale each. Entries of a block move by different scales, so "
    "that it would have to be rounded anew at every step. Use the optimizer that keeps them in float32"
)
_FACTORS = (
    "it keeps averages of squared gradients over rows and over columns, along which scales differ, and those after a rescaling "
    "are not known from those before. Use an optimizer that keeps one number for each weight (AdamW, SGD, Muon)"
)
_REFUSED = {
    "transformers.optimization.": _FACTORS,
    "timm.optim.adafactor.": _FACTORS,
    "timm.optim.adafactor_bv.": _FACTORS,
    "torchao.optim.": _BLOCKS,
    "torchao.prototype.low_bit_optim.": _BLOCKS,
    "bitsandbytes.optim.": f"{_BLOCKS}; those with 32 bits can be registered: equinorm.register_optimizer",
}
"""Modules whose optimizers cannot be followed, and why."""


def law_of(kind: type) -> OptimizerLaw | None:
    """How the optimizers of one class scale; None if that is not known."""
    return LAWS.get(kind) or ELSEWHERE.get(f"{kind.__module__}.{kind.__qualname__}")


def laws(optimizer: optim.Optimizer) -> Mapping[str, Law]:
    """The laws of an optimizer's state.

    Raises:
        RescaleError: if its class is not known, or known to be one that cannot move.
    """
    kind = type(optimizer)
    if (law := law_of(kind)) is not None:
        return law.states
    modules = [f"{base.__module__}." for base in kind.__mro__]
    reason = next((why for start, why in _REFUSED.items() if any(module.startswith(start) for module in modules)), None)
    if reason is not None:
        raise RescaleError(f"cannot rescale the state of {kind.__name__} exactly: {reason}.")
    names = {known.__name__ for known in LAWS} | {name.rpartition(".")[2] for name in ELSEWHERE}
    base = next((base.__name__ for base in kind.__mro__[1:] if law_of(base) is not None), None)
    way = "kind, {state key: exponent}" if base is None else f"{kind.__name__}, like={base}"
    whose = f" of {kind.__module__}" if kind.__name__ in names else ""  # another than the known one
    raise RescaleError(
        f"cannot rescale the state of {kind.__name__}{whose}: how it scales is not known. Known: {', '.join(sorted(names))}. "
        f"Register it: equinorm.register_optimizer({way})."
    )


def update_exponent(optimizer: optim.Optimizer) -> int:
    """Exponent of s in the updates of a known optimizer."""
    law = law_of(type(optimizer))
    return 0 if law is None else law.update


def remembers(optimizer: optim.Optimizer) -> bool:
    """Does its state hold points or steps of its path?"""
    law = law_of(type(optimizer))
    return law is not None and law.remembers


def coupled_decay(optimizer: optim.Optimizer, group: Group) -> float:
    """The weight decay that enters the state of a parameter group; 0 if none does."""
    law = law_of(type(optimizer))
    decoupled = (law is not None and law.is_decoupled) or group.get("decoupled_weight_decay", False)
    return 0.0 if decoupled else float(group.get("weight_decay", 0.0))


def register_optimizer(
    kind: type[optim.Optimizer],
    exponents: Mapping[str, int] | None = None,
    *,
    like: type[optim.Optimizer] | None = None,
    update: int | None = None,
    decoupled_weight_decay: bool | None = None,
) -> None:
    """Tell how an optimizer's state scales where a weight scales by s: state ↦ s^exponent · state.

    Gradients scale by s^−1, so averages of gradients have exponent −1, averages of their squares −2, averages of weights 1.

    Args:
        kind: the optimizer's class.
        exponents: of every state tensor that has its parameter's shape, by its key in `optimizer.state[parameter]`; with
            `like`, of those that the other has not.
        like: an optimizer that is known, and whose states `kind` keeps by the same formulas, as most subclasses do. Coupled
            weight decay in them is then followed as in the other's.
        update: exponent of its updates: −1 if they are proportional to gradients, 0 if gradients are divided by their size;
            None: that of `like`, or else −1.
        decoupled_weight_decay: True if weight decay never enters these tensors. If False, a nonzero weight decay is refused
            where it is not known how it enters. None: as `like` has it, or else False.

    Raises:
        EquinormError: if `kind` is not a class of optimizers, or one that Equinorm knows itself, if an exponent is no integer,
            or `like` is not known.

    >>> import torch, equinorm
    >>> class Averaging(torch.optim.SGD):
    ...     pass
    >>> equinorm.register_optimizer(Averaging, like=torch.optim.SGD)
    >>> class Signs(torch.optim.Optimizer):
    ...     pass
    >>> equinorm.register_optimizer(Signs, {"momentum": -1}, update=0, decoupled_weight_decay=True)
    """
    _check_kind(kind)
    other = law_of(like) if isinstance(like, type) else None
    if like is not None and other is None:
        raise EquinormError(f"like must be a class of optimizers that is known, such as torch.optim.SGD, not {like!r}.")
    if like is None and exponents is None:
        raise EquinormError("give exponents of the states, or an optimizer that this one is like: like=torch.optim.SGD.")
    base = other or OptimizerLaw({}, update=-1)
    update = base.update if update is None else update
    own = _own_laws(exponents, update)
    LAWS[kind] = replace(
        base,
        states={**base.states, **own},
        update=update,
        is_decoupled=base.is_decoupled if decoupled_weight_decay is None else decoupled_weight_decay,
        is_registered=True,
    )


def _check_kind(kind: Any) -> None:
    """Refuse what is no class of optimizers, or one that is known."""
    if not (isinstance(kind, type) and issubclass(kind, optim.Optimizer)):
        raise EquinormError(f"kind must be a subclass of torch.optim.Optimizer, not {kind!r}.")
    if (known := law_of(kind)) is not None and not known.is_registered:
        raise EquinormError(f"the state of {kind.__name__} is known already; register a subclass of it for another law.")


def _own_laws(exponents: Any, update: Any) -> dict[str, Law]:
    """Laws of the states that are told; refuses exponents that are none, that of updates too."""
    if exponents is not None and not isinstance(exponents, Mapping):
        raise EquinormError(f"exponents must be a dict from state keys to integers, not {type(exponents).__name__}.")
    told = dict(exponents or {})
    for key, exponent in [*told.items(), ("update", update)]:
        if not is_whole(exponent):
            raise EquinormError(f"the exponent of {key!r} must be an integer, not {exponent!r}.")
    return {key: Law(exponent) for key, exponent in told.items()}
