"""Several optimizers take turns: a step of training is over when each of them has stepped."""

from collections.abc import Sequence
from typing import Any

from torch import optim

from equinorm._errors import RescaleError, warn

PATIENCE = 100
"""Steps of one optimizer without another before that is told."""


class Turns:
    """How often each optimizer has stepped since the last step of all was over.

    Args:
        optimizers: that train a model together.
        counts: to go on from; None: all are to step.

    Raises:
        RescaleError: for counts of other optimizers.
    """

    def __init__(self, optimizers: Sequence[optim.Optimizer], counts: Any = None) -> None:
        counts = [0] * len(optimizers) if counts is None else counts
        if not isinstance(counts, (tuple, list)) or len(counts) != len(optimizers):
            raise RescaleError(f"the state is of a hook on other optimizers: it says {counts!r} of {len(optimizers)}.")
        self._optimizers, self.counts = optimizers, [*counts]

    def take(self, optimizer: optim.Optimizer) -> bool:
        """One has stepped. Have all now?"""
        place = next(place for place, one in enumerate(self._optimizers) if one is optimizer)
        self.counts[place] += 1
        if all(self.counts):
            self.counts = [0] * len(self.counts)
            return True
        if self.counts[place] == PATIENCE:
            self._tell_of_waiting()
        return False

    def _tell_of_waiting(self) -> None:
        """Warn where one optimizer goes on and on without another: nothing is balanced meanwhile."""
        waiting = [f"{type(one).__name__} {place}" for place, one in enumerate(self._optimizers) if not self.counts[place]]
        warn(
            f"ENorm waits for {', '.join(waiting[:3])}, counted from 0, which made no step in {PATIENCE} steps of another "
            "optimizer. The weights are balanced when all have stepped; leave out those that do not train them."
        )
