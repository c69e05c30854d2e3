"""Rules from users, each checked against its operator before it counts."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equinorm._classes import Reason
from equinorm._errors import EquinormError, describe_inputs
from equinorm._labels import Label
from equinorm._mutation import bind
from equinorm._scaling import resolve
from equinorm._trace import Trace
from equinorm._values import VALUES, Source
from equinorm.rules import TABLE, Call, key
from equinorm.rules._registry import Rule

MAGNITUDES = 0.1, 1.0, 3.0
"""Standard deviations of the log-scales that a rule is checked with."""

TOLERANCE = 1e-9
"""Relative to the largest entry, in float64: operators may lose digits, wrong rules lose all."""


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
        samples: positional arguments of a few calls that show every mode of the operator, with tensors of some entries.

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
    overload = _overload(operator)
    name = key(overload)
    if name in TABLE:
        raise EquinormError(f"{name} has a rule already: {TABLE[name].__qualname__}.")
    if overload._schema.is_mutable:
        raise EquinormError(f"{name} writes into its inputs ({overload._schema}). Only functional operators can have a rule.")
    arguments = [tuple(sample) for sample in samples]
    if not arguments:
        raise EquinormError(f"the rule for {name} needs samples: positional arguments of at least one call.")

    def register(rule: Rule) -> Rule:
        for sample in arguments:
            _check(rule, overload, name, sample)
        TABLE[name] = rule
        return rule

    return register


def _overload(operator: Any) -> torch._ops.OpOverload:
    found = getattr(operator, "_opoverload", operator)  # of torch.library.custom_op
    if isinstance(found, torch._ops.OpOverloadPacket) and len(found.overloads()) == 1:
        found = getattr(found, found.overloads()[0])
    if not isinstance(found, torch._ops.OpOverload):
        raise EquinormError(
            f"operator must be an operator of torch.ops with one overload, or one of torch.library.custom_op, not {operator!r}."
        )
    return found


def _check(rule: Rule, operator: Any, name: str, sample: tuple) -> None:
    inputs = bind(operator, tuple(_double(value) for value in sample), {})
    floats = [key for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    shown = f"{name}{describe_inputs(sample, {})}"
    if not floats:
        raise EquinormError(f"the sample {shown} has no floating-point tensor, so that it says nothing.")
    generator = torch.Generator().manual_seed(0)
    for parameter, magnitude in itertools.product([None, *floats], MAGNITUDES):
        trial = {key: _redrawn(value, generator) if key in floats else value for key, value in inputs.items()}
        results = _list(operator(**trial))
        trace, sources, labels = _labelled(rule, operator, trial, floats, parameter)
        found = [tuple(label.shape) if isinstance(label, VALUES) else type(label).__name__ for label in labels]
        if found != [tuple(result.shape) for result in results]:
            wanted = [tuple(result.shape) for result in results]
            raise EquinormError(f"the rule {rule.__qualname__} returns labels of {found} for results of {wanted} in {shown}.")
        outs = [Source((), tuple(r.shape), "buffer", r.dtype, trace.label(x)) for r, x in zip(results, labels, strict=True)]
        scalings, roots = resolve([*sources.values(), *outs], trace.classes)
        logs = magnitude * torch.randn(len(roots), generator=generator, dtype=torch.float64)
        logs = torch.cat([torch.zeros(1, dtype=torch.float64), logs])
        scales = [sum((e * logs[ids] for e, ids in s.factors), torch.zeros((), dtype=torch.float64)).exp() for s in scalings]
        moved = {key: trial[key] * scale for key, scale in zip(sources, scales, strict=False)}
        for place, result in enumerate(_list(operator(**{**trial, **moved}))):
            target = results[place] * scales[len(sources) + place]
            error = float((result - target).abs().max() / target.abs().max().clamp(min=1e-300)) if target.numel() else 0.0
            if not error <= TOLERANCE:
                how = f"{parameter!r} as a parameter" if parameter else "all tensors as activations"
                raise EquinormError(
                    f"the rule {rule.__qualname__} for {name} is wrong: in {shown}, with {how}, result {place} is off by "
                    f"{error:.1e} of its largest entry after a rescaling that the rule allows. It was not registered. Ask for "
                    "less: trace.pin what must not scale, trace.merge what must scale alike."
                )


def _labelled(
    rule: Rule, operator: Any, inputs: Mapping[str, Any], floats: Sequence[str], parameter: str | None
) -> tuple[Trace, dict[str, Source], list[Any]]:
    """What a rule makes of inputs of which every entry may scale by itself."""
    trace = Trace(reason=Reason(key(operator)))
    sources = {name: Source((name,), tuple(inputs[name].shape), "parameter", torch.float64) for name in floats}
    for name, source in sources.items():
        if name != parameter:
            source.label = trace.fresh(source.shape, range(len(source.shape)))
    given: dict[str, Any] = {name: source if name == parameter else source.label for name, source in sources.items()}
    others = {name: Label(tuple(v.shape)) if isinstance(v, Tensor) else v for name, v in inputs.items() if name not in given}
    arguments = {name: (given | others)[name] for name in inputs}
    labels = _list(rule(trace, Call(operator, arguments, operator(**inputs))))
    for source in sources.values():
        trace.label(source)
    return trace, sources, labels


def _redrawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Other numbers of the same signs."""
    return tensor * torch.rand(tensor.shape, generator=generator, dtype=torch.float64).mul(1.5).add(0.5)


def _double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
