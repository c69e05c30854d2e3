"""Laws from users, as letters for axes, each checked against its operator before it counts."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import EquinormError, describe_inputs
from equinorm.discovery.graph.nodes import bind, results_of
from equinorm.discovery.rule_trials import MOST, TOLERANCE, RuleTrials, WrongRuleError, checked_samples, overload_of
from equinorm.discovery.rules import qualified
from equinorm.modules.running import on_cpu
from equinorm.permuting.atoms import Axis
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws import LAWS, Call, find
from equinorm.permuting.values import Laid, pinned

ELEMENTWISE = "elementwise"


@dataclass(frozen=True, slots=True)
class _Letters:
    """Letters of the axes of each tensor that goes in and comes out, in the order of the operator's schema."""

    equation: str
    terms: tuple[str, ...]
    results: tuple[str, ...]

    @staticmethod
    def of(equation: Any, name: str) -> "_Letters":
        """Read an equation.

        Raises:
            EquinormError: if it is none.
        """
        form = r"[A-Za-z_]*(,[A-Za-z_]*)*->[A-Za-z_]*(,[A-Za-z_]*)*"
        if not isinstance(equation, str) or not re.fullmatch(form, equation.replace(" ", "")):
            raise EquinormError(
                f"{equation!r} says nothing of the axes of {name}. Write letters for the axes of each tensor that goes in and "
                f'comes out, as "bk,ok->bo", "_" for an axis that may not be permuted; or "{ELEMENTWISE}".'
            )
        left, right = equation.replace(" ", "").split("->")
        return _Letters(equation, tuple(left.split(",")), tuple(right.split(",")))

    def sizes(self, shapes: Sequence[Sequence[int]], terms: Sequence[str]) -> dict[str, int] | None:
        """Size of each letter; None where the shapes do not fit."""
        found: dict[str, int] = {}
        if len(shapes) != len(terms):
            return None
        for shape, letters in zip(shapes, terms, strict=True):
            if len(shape) != len(letters):
                return None
            for size, letter in zip(shape, letters, strict=True):
                if letter != "_" and found.setdefault(letter, size) != size:
                    return None
        return found


def register_axes(operator: Any, equation: str, samples: Iterable[Sequence[Any]]) -> None:
    """State how an operator of your own takes permutations of axes, so that `permutations` does not pin what it reads.

    Args:
        operator: from `torch.ops` or `torch.library.custom_op`; it must not write into its inputs.
        equation: a letter for each axis of every tensor that goes in and comes out, as in einsum: where all axes of one letter
            are permuted alike, the results are permuted alike along theirs, and along no other axis. A letter that is missing
            in the results says that they do not see the order. "_" is an axis that may not be permuted. "elementwise" is any
            function of the entries at one place, with axes of size 1 broadcast. Tensors stand in the order of the operator's
            arguments; those that are None have no letters.
        samples: tuples of positional arguments, of a few calls that show every mode of the operator. The equation is checked on
            each with random orders, in float64. In use it is checked again, on random tensors, for every new combination of
            shapes and other arguments; a call for which that fails is pinned. One that cannot be run (too large, or of
            integers) counts if a sample had the same other arguments, else it is pinned.

    Raises:
        EquinormError: if the operator has a law already or writes into its inputs, or there are no samples; if the equation
            does not fit a sample, or is wrong: which letter, by how much. Nothing is registered then.

    >>> import torch, equinorm
    >>> @torch.library.custom_op("docs::scaled", mutates_args=())
    ... def scaled(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    ...     return x * gain.exp()
    >>> equinorm.register_axes(scaled, "bc,c->bc", samples=[(torch.randn(3, 4), torch.randn(4))])
    """
    overload = overload_of(operator)
    name = qualified(overload)
    if find(overload) is not None:
        raise EquinormError(f"{name} has a law for permutations already.")
    letters = None if equation == ELEMENTWISE else _Letters.of(equation, name)
    generator, shown = torch.Generator().manual_seed(0), []
    for sample in checked_samples(samples, name):
        shown.append(bind(overload, sample, {}))
        _check(overload, letters, {key: _redrawn(value, generator, overload) for key, value in shown[-1].items()})
    trials = RuleTrials((Laid,), shown)

    def law(book: LawBook, call: Call) -> Any:
        tensors = _tensors(call.arguments)
        if not trials.hold(call.arguments, lambda: _try(overload, letters, call)):
            book.pin(list(tensors.values()), "its law could not be confirmed for these arguments")
            return pinned(call.result, book.because("its law could not be confirmed for these arguments"))
        return _laid(book, letters, list(tensors.values()), call.result)

    LAWS[name] = law


def _laid(book: LawBook, letters: _Letters | None, tensors: Sequence[Laid], result: Any) -> Any:
    """Axes of the results."""
    if letters is None:
        joined = Laid(book.join(*tensors))
        return joined if isinstance(result, Tensor) else [joined for _ in result]
    found: dict[str, Axis] = {}
    for value, term in zip(tensors, letters.terms, strict=True):
        for axis, letter in zip(value.axes, term, strict=True):
            if letter == "_":
                book.pin_axis(axis, "its law pins this axis")
            else:
                found[letter] = book.same(found.get(letter, ()), axis)
    for axis in found.values():
        book.see((axis,))  # one order at all places: of more the equation says nothing
    made: list[Laid] = []
    for term, part in zip(letters.results, results_of(result), strict=True):
        sizes = zip(term, part.shape, strict=True)
        made.append(Laid(tuple(found[letter] if letter in found else book.fixed(size) for letter, size in sizes)))
    return made[0] if isinstance(result, Tensor) else made


@on_cpu()
def _check(operator: Any, letters: _Letters | None, arguments: Mapping[str, Any]) -> None:
    """Permute the axes of one letter after another, in two ways of which all orders are made, then all together.

    Raises:
        EquinormError: if the letters do not fit these arguments.
        WrongRuleError: if the results are others.
    """
    given, tensors = dict(arguments), _tensors(arguments)
    shown = f"{qualified(operator)}{describe_inputs(tuple(tensors.values()), {})}"
    before = results_of(operator(**given))
    if not tensors or not all(isinstance(part, Tensor) for part in before):
        raise EquinormError(f"{shown} takes or returns what is no tensor: it can have no law.")
    is_elementwise = letters is None
    if letters is None:
        letters = _broadcast([value.shape for value in tensors.values()], before)
    shapes = [tuple(part.shape) for part in (*tensors.values(), *before)]
    sizes = letters.sizes(shapes, (*letters.terms, *letters.results))
    if sizes is None:
        raise EquinormError(f"{letters.equation!r} does not fit the shapes of {shown}, which gives {shapes[len(tensors) :]}.")
    if not all(bool(part.isfinite().all()) for part in before):
        raise EquinormError(f"the results of {shown} are not finite at numbers like these.")
    if is_elementwise:
        _check_local(operator, shown, given, before)
    rolled = {letter: torch.arange(size).roll(1) for letter, size in sizes.items()}
    swapped = {letter: torch.tensor([1, 0, *range(2, size)][:size]) for letter, size in sizes.items() if size > 1}
    for chosen in [*({letter: order} for orders in (swapped, rolled) for letter, order in orders.items()), rolled]:
        moved = {key: _permuted(v, term, chosen) for (key, v), term in zip(tensors.items(), letters.terms, strict=True)}
        for place, (result, term) in enumerate(zip(results_of(operator(**{**given, **moved})), letters.results, strict=True)):
            error = _apart(result, _permuted(before[place], term, chosen))
            if not error <= TOLERANCE:
                raise WrongRuleError(
                    f"the axes {letters.equation!r} of {shown} are wrong: with {', '.join(chosen)} in another order, result "
                    f"{place} is off by {error:.1e} of its largest entry. Nothing was registered. Write '_' for an axis that "
                    "may not be permuted."
                )


def _check_local(operator: Any, shown: str, given: Mapping[str, Any], before: Sequence[Tensor]) -> None:
    """Change the first entry of one tensor after another: no entry at another place may see it.

    Raises:
        WrongRuleError: if one does.
    """
    for key, value in _tensors(given).items():
        if not value.is_floating_point() or not value.numel():
            continue
        first = torch.zeros(value.shape, dtype=torch.bool)
        first[(0,) * value.dim()] = True
        for place, result in enumerate(results_of(operator(**{**given, key: torch.where(first, 0.7 * value, value)}))):
            elsewhere = ~first.expand_as(result)
            error = _apart(result[elsewhere], before[place][elsewhere])
            if not error <= TOLERANCE:
                raise WrongRuleError(
                    f"{shown} is not {ELEMENTWISE}: an entry of {key!r} changes result {place} at other places by {error:.1e} "
                    "of its largest entry. Nothing was registered. Write letters for its axes."
                )


def _apart(result: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    if not wanted.numel():
        return 0.0
    return float((result.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-300))


def _broadcast(shapes: Sequence[Sequence[int]], results: Sequence[Tensor]) -> _Letters:
    """Letters of an elementwise function; axes of size 1 have none that matters."""
    rank = max(map(len, shapes))
    names = "abcdefghijklmnopqrstuvwxyz"[:rank]

    def term(shape: Sequence[int]) -> str:
        own = names[rank - len(shape) :]
        return "".join("_" if size == 1 else letter for letter, size in zip(own, shape, strict=True))

    return _Letters(ELEMENTWISE, tuple(map(term, shapes)), tuple(term(part.shape) for part in results))


def _permuted(tensor: Tensor, term: str, orders: Mapping[str, Tensor]) -> Tensor:
    for axis, letter in enumerate(term):
        if letter in orders:
            tensor = tensor.index_select(axis, orders[letter])
    return tensor


def _try(operator: Any, letters: _Letters | None, call: Call) -> None:
    """Check a law for the shapes and other arguments of a call, on random tensors.

    Raises:
        WrongRuleError: if it does not hold.
        Exception: if that cannot be tried.
    """
    tensors = _tensors(call.arguments)
    shapes = [value.shape for value in (*tensors.values(), *results_of(call.result))]
    if letters is not None and letters.sizes(shapes, (*letters.terms, *letters.results)) is None:
        raise WrongRuleError("other shapes than the letters say")
    if sum(math.prod(value.shape) for value in tensors.values()) > MOST:
        raise ValueError("too large")
    generator = torch.Generator().manual_seed(0)
    drawn = {key: torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5 for key, value in tensors.items()}
    _check(operator, letters, {**call.arguments, **drawn})


def _tensors(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if isinstance(value, (Tensor, Laid))}


def _redrawn(value: Any, generator: torch.Generator, operator: Any) -> Any:
    """Other numbers of the same signs, in float64, so that no two entries are the same."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if not bool(value.any()):
        raise EquinormError(f"a tensor of the samples of {qualified(operator)} is empty or zero throughout: it says nothing.")
    return value.detach().double() * (torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5)
