"""What rules and laws from users have in common: which operators may have one, samples of calls, and when it holds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equinorm._errors import EquinormError
from equinorm.discovery.rules import qualified

MOST = 1 << 18
"""Entries of the tensors of a call that is still tried."""

TOLERANCE = 1e-9
"""Relative to the largest entry, in float64: operators may lose digits, wrong rules lose all."""


class WrongRuleError(EquinormError):
    """A rule allows a rescaling, or a law a permutation, that changes its operator's results."""


def overload_of(operator: Any) -> torch._ops.OpOverload:
    """An operator of torch.ops, or of torch.library.custom_op, as its only overload.

    Raises:
        EquinormError: if it is none, or writes into its inputs.
    """
    found = getattr(operator, "_opoverload", operator)  # of torch.library.custom_op
    if isinstance(found, torch._ops.OpOverloadPacket) and len(found.overloads()) == 1:
        found = getattr(found, found.overloads()[0])
    if not isinstance(found, torch._ops.OpOverload):
        raise EquinormError(
            f"operator must be an operator of torch.ops with one overload, or one of torch.library.custom_op, not {operator!r}."
        )
    if found._schema.is_mutable:
        what = f"{qualified(found)} writes into its inputs ({found._schema})"
        raise EquinormError(f"{what}. Only functional operators can have a rule or a law.")
    return found


def checked_samples(samples: Iterable[Sequence[Any]], name: str) -> list[tuple]:
    """Samples of an operator's calls.

    Raises:
        EquinormError: if there are none, or one is no tuple.
    """
    found = list(samples)
    if not found:
        raise EquinormError(f"{name} needs samples: tuples of positional arguments of at least one call.")
    for sample in found:
        if not isinstance(sample, (tuple, list)):
            raise EquinormError(f"each sample of {name} must be a tuple of positional arguments, not {type(sample).__name__}.")
    return [tuple(sample) for sample in found]


class RuleTrials:
    """Remembers for which shapes and other arguments a rule holds.

    Args:
        kinds: of the values that stand for tensors.
        shown: arguments of the samples, with which it holds.
    """

    def __init__(self, kinds: tuple[type, ...], shown: Iterable[Mapping[str, Any]]) -> None:
        self._kinds = (Tensor, *kinds)
        self._settings = {self._setting(arguments) for arguments in shown}
        self._answers: dict[str, bool | None] = {}

    def hold(self, arguments: Mapping[str, Any], attempt: Callable[[], object]) -> bool:
        """Does it hold for these, by an attempt at the first use, or by the samples where none can be made?

        Args:
            arguments: of a call.
            attempt: tries it; raises WrongRuleError where it does not hold, and anything else where that cannot be told.
        """
        setting = self._setting(arguments)
        shapes = [value.shape for value in arguments.values() if isinstance(value, self._kinds)]
        use = f"{setting} {shapes}"
        if use not in self._answers:
            self._answers[use] = _outcome(attempt)
        answer = self._answers[use]
        return setting in self._settings if answer is None else answer

    def _setting(self, arguments: Mapping[str, Any]) -> str:
        """What is no tensor, told apart by type and sign too."""
        return repr({key: value for key, value in arguments.items() if not isinstance(value, self._kinds)})


def _outcome(attempt: Callable[[], object]) -> bool | None:
    try:
        attempt()
    except WrongRuleError:
        return False
    except Exception:  # on integers of unknown range, say
        return None
    return True
