"""Rules from users, each checked against its operator before it counts."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import EquinormError, describe_inputs
from equinorm._scaling import Reason
from equinorm.discovery.graph.nodes import bind, results_of
from equinorm.discovery.labels import Label
from equinorm.discovery.operation import pinned
from equinorm.discovery.resolve import resolve
from equinorm.discovery.rule_trials import MOST, TOLERANCE, RuleTrials, WrongRuleError, checked_samples, overload_of
from equinorm.discovery.rules import TABLE, Call, find, qualified
from equinorm.discovery.rules.registry import Rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, Constant, Source
from equinorm.modules.running import on_cpu

MAGNITUDES = 0.1, 1.0, 15.0
"""Standard deviations of the log-scales that a rule is checked with."""


def register_rule(operator: Any, samples: Iterable[Sequence[Any]]) -> Callable[[Rule], Rule]:
    """Decorator: what an operator asks of the scales of its inputs, and how its results scale.

    The rule is called as `rule(trace, call)` for every use of the operator in a graph. `call` holds the operator's arguments by
    name, tensors as values that have labels: `trace.label(call.x)`. The rule states laws with `trace.pin`, `trace.equal`,
    `trace.add` and `trace.merge`, and returns the label of the result, or a list for several results. A label of degree k in
    x is `trace.label(call.x).power(k)`; of a product, `left.times(right)`.

    At registration each sample is run twice, before and after every entry of its tensors is rescaled as far as the rule allows
    (each tensor as an activation and as a parameter at its first use), at several magnitudes in float64. A rule whose
    results do not scale as it says is refused.

    Args:
        operator: from `torch.ops` or `torch.library.custom_op`; it must not write into its inputs.
        samples: tuples of positional arguments, of a few calls that show every mode of the operator. Tensors should have two
            or more entries along every axis: what is not shown is not checked. A call with a tensor that no sample has is
            pinned. At every new combination of shapes and other arguments in use the rule is checked again, on random
            positive tensors; the call is pinned where that fails, or cannot be done (with integer tensors, and for more than
            262,144 entries) and no sample has those arguments.

    Raises:
        EquinormError: if the operator has a rule already or writes into its inputs, if there are no samples, or if the rule is
            wrong: which sample, which result, by how much. Nothing is registered then.

    >>> import torch, equinorm
    >>> @torch.library.custom_op("docs::twice", mutates_args=())
    ... def twice(x: torch.Tensor) -> torch.Tensor:
    ...     return 2 * x
    >>> @equinorm.register_rule(twice, samples=[(torch.randn(3, 4),)])
    ... def twice_rule(trace, call):
    ...     return trace.label(call.x)
    """
    overload = overload_of(operator)
    name = qualified(overload)
    known = find(overload)
    if known is not None:
        raise EquinormError(f"{name} has a rule already: {known.__qualname__}.")
    if any("Tensor" in str(a.type) and "List" in str(a.type) for a in overload._schema.arguments):
        raise EquinormError(
            f"{name} takes a list of tensors ({overload._schema}). Only operators that take each by itself can have one."
        )
    arguments = checked_samples(samples, name)

    def register(rule: Rule) -> Rule:
        TABLE[name] = _guarded(rule, overload, name, [_check(rule, overload, name, sample) for sample in arguments])
        return rule

    return register


def _guarded(rule: Rule, operator: Any, name: str, shown: Sequence[Mapping[str, Any]]) -> Rule:
    """A rule that pins instead where it holds neither by a trial nor, if none can be made, for arguments that samples show."""
    dtypes = {key: value.dtype for inputs in shown for key, value in inputs.items() if isinstance(value, Tensor)}
    trials = RuleTrials(VALUES, shown)

    @functools.wraps(rule)
    def checked(trace: Trace, call: Call) -> Any:
        tensors = {argument: value for argument, value in call.arguments.items() if isinstance(value, VALUES)}
        if tensors.keys() <= dtypes.keys() and trials.hold(call.arguments, lambda: _try(rule, operator, name, call, dtypes)):
            return _apply_rule(rule, trace, call)
        for value in tensors.values():
            trace.pin(value, "its rule could not be confirmed for these arguments")
        return pinned(call.result)

    return checked


_Labelled = tuple[Trace, dict[str, Source], list[Any]]
"""The trace of a rule, the tensors given to it, and the labels that it returns."""


@on_cpu()
def _check(rule: Rule, operator: Any, name: str, sample: tuple) -> dict[str, Any]:
    """Check a rule on one sample; returns its arguments by name, in float64."""
    inputs = bind(operator, tuple(_double(value) for value in sample), {})
    floats = [key for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    shown = f"{name}{describe_inputs(sample, {})}"
    if not floats:
        raise EquinormError(f"the sample {shown} has no floating-point tensor, so that it says nothing.")
    for key in floats:
        if not bool(inputs[key].any()):
            raise EquinormError(f"{key!r} of the sample {shown} is empty or zero throughout, so that it says nothing.")
    generator = torch.Generator().manual_seed(0)
    for parameter, magnitude, signs in itertools.product([None, *floats], MAGNITUDES, (False, True)):
        trial = {key: _redrawn(value, generator, signs) if key in floats else value for key, value in inputs.items()}
        call = Call(operator, trial, operator(**trial))
        results = results_of(call.result)
        if not all(isinstance(result, Tensor) for result in results):
            raise EquinormError(f"{name} returns what is no tensor. Only operators that return tensors can have a rule.")
        if not all(bool(result.isfinite().all()) for result in results):
            if signs:  # outside of where the operator is defined
                continue
            raise EquinormError(f"the results of {shown} are not finite at numbers like those of the sample.")
        labelled = _labelled(rule, call, floats, parameter)
        found = [tuple(label.shape) if isinstance(label, VALUES) else type(label).__name__ for label in labelled[2]]
        wanted = [tuple(result.shape) for result in results]
        if found != wanted:
            raise WrongRuleError(f"the rule {rule.__qualname__} returns labels of {found} for results of {wanted} in {shown}.")
        for place, error in enumerate(_errors(call, labelled, magnitude, generator)):
            if not error <= TOLERANCE:
                how = f"{parameter!r} as a parameter" if parameter else "all tensors as activations"
                raise WrongRuleError(
                    f"the rule {rule.__qualname__} for {name} is wrong: in {shown}, with {how}, result {place} is off by "
                    f"{error:.1e} of its largest entry after a rescaling that the rule allows. It was not registered. Ask for "
                    "less: trace.pin what must not scale, trace.merge what must scale alike."
                )
    return inputs


def _errors(call: Call, labelled: _Labelled, magnitude: float, generator: torch.Generator) -> Iterator[float]:
    """How far each result is off, of its largest entry, once tensors are rescaled as the labels allow."""
    trace, sources, labels = labelled
    results = results_of(call.result)
    outs = [Source((), tuple(r.shape), "buffer", r.dtype, trace.label(x)) for r, x in zip(results, labels, strict=True)]
    scalings, roots = resolve([*sources.values(), *outs], trace.classes)
    logs = magnitude * torch.randn(len(roots), generator=generator, dtype=torch.float64)
    scales = [scaling.log_scales(logs).exp() for scaling in scalings]
    scaled = {key: call.arguments[key] * scale for key, scale in zip(sources, scales, strict=False)}
    for place, result in enumerate(results_of(call.operator(**{**call.arguments, **scaled}))):
        target = results[place] * scales[len(sources) + place]
        yield float((result - target).abs().max() / target.abs().max().clamp(min=1e-300)) if target.numel() else 0.0


def _try(rule: Rule, operator: Any, name: str, call: Call, dtypes: Mapping[str, torch.dtype]) -> None:
    """Check a rule for the shapes and other arguments of a call.

    Raises:
        WrongRuleError: if it does not hold.
        Exception: if that cannot be tried.
    """
    if sum(math.prod(value.shape) for value in call.arguments.values() if isinstance(value, VALUES)) > MOST:
        raise ValueError("too large")
    if any(call.arguments[a.name] != a.default_value for a in operator._schema.arguments if a.kwarg_only):
        raise ValueError("samples show no keywords")
    generator = torch.Generator().manual_seed(0)

    def drawn(key: str, value: Any) -> Any:
        if isinstance(value, Constant):
            return value.value
        if isinstance(value, VALUES) and dtypes[key].is_floating_point:
            return torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
        return value  # integers of unknown range remain labels, with which no operator runs

    arguments = {key: drawn(key, value) for key, value in call.arguments.items()}
    _check(rule, operator, name, tuple(arguments[a.name] for a in operator._schema.arguments if not a.kwarg_only))


def _labelled(rule: Rule, call: Call, floats: Sequence[str], parameter: str | None) -> _Labelled:
    """What a rule makes of a call with tensors of which every entry may scale by itself."""
    trace = Trace(reason=Reason(qualified(call.operator)))
    sources = {name: Source((name,), tuple(call.arguments[name].shape), "parameter", torch.float64) for name in floats}
    for name, source in sources.items():
        if name != parameter:
            source.label = trace.fresh(source.shape, range(len(source.shape)))
    given: dict[str, Any] = {name: source.label or source for name, source in sources.items()}
    whole = {name: Label(tuple(v.shape)) if isinstance(v, Tensor) else v for name, v in call.arguments.items()}
    labels = results_of(_apply_rule(rule, trace, replace(call, arguments=whole | given)))
    for source in sources.values():
        trace.label(source)
    return trace, sources, labels


def _apply_rule(rule: Rule, trace: Trace, call: Call) -> Any:
    try:
        return rule(trace, call)
    except Exception as error:
        shapes = {name: tuple(value.shape) for name, value in call.arguments.items() if isinstance(value, VALUES)}
        raise EquinormError(
            f"the rule {rule.__qualname__} for {qualified(call.operator)} raises on tensors of shapes {shapes}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _redrawn(tensor: Tensor, generator: torch.Generator, signs: bool) -> Tensor:
    """Other numbers, of the same signs or of any."""
    drawn = tensor * torch.rand(tensor.shape, generator=generator, dtype=torch.float64).mul(1.5).add(0.5)
    return drawn * (torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1) if signs else drawn


def _double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
