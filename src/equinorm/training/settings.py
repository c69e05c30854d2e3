"""What can be asked of ENorm, and what is refused before a model is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from equinorm._arguments import check_count
from equinorm._errors import BalanceError, RescaleError
from equinorm.balancing.norm import Norm
from equinorm.balancing.options import check_options

FROZEN = ("hold", "move")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a hook does: the norm p, asymmetry c, how many cycles, after every how many steps, and the method.

    Raises:
        BalanceError: for values out of range.
    """

    p: float
    c: float
    cycles: int
    every: int
    method: str

    def __post_init__(self) -> None:
        check_options(self.p, self.c, self.cycles, 0.0, self.method)
        for name in ("cycles", "every"):
            check_count(getattr(self, name), name, BalanceError)
        if Norm(self.p).is_max and self.method == "two-level":
            raise BalanceError("method='two-level' follows the minimum of a finite p; use method='cyclic' for p = inf.")


@dataclass(frozen=True, slots=True)
class SelectionOptions:
    """Which tensors move, and of which the norm counts.

    Attributes:
        biases: count biases in the norm.
        match_biases: do biases move?
        frozen: "hold" the classes that would move a frozen parameter, or "move" them.

    Raises:
        BalanceError: for another word than these, and for biases that count and keep still.
    """

    biases: bool
    match_biases: bool
    frozen: str

    def __post_init__(self) -> None:
        if self.biases and not self.match_biases:
            raise BalanceError("biases=True counts what match_biases=False leaves where it is; choose one of them.")
        if self.frozen not in FROZEN:
            raise BalanceError(f"frozen must be 'hold' or 'move', not {self.frozen!r}.")


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step balances and writes.

    Attributes:
        norm: whose minimum is followed.
        method: "cyclic" or "two-level".
        symmetric_biases: let biases take the steps that they would take at c = 1.
        power_of_two: round scales to powers of two.
        compile: passes over the weights as compiled kernels: in C++ on a CPU, by torch.compile elsewhere; None: where they came
            with the package, on a CPU.
    """

    norm: Norm
    method: str
    symmetric_biases: bool
    power_of_two: bool
    compile: bool | None

    def sharded(self, averages: Sequence[Any]) -> "StepOptions":
        """The same for a model that several processes hold.

        Raises:
            RescaleError: for what such models do not have yet.
        """
        if self.compile:
            raise RescaleError("compile=True is for models that one process holds: train a sharded one without it.")
        if averages:
            raise RescaleError(
                "averages of a sharded model are not followed: average its weights with ENorm removed, or train it unsharded."
            )
        return replace(self, compile=False)
