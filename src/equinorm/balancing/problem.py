"""The convex problem: sums of exponentials of log-scales, kept as blocks of energies.

    φ(z) = Σ_t E_t · exp(q · Σ_s a_ts · z[id_ts]),     q = p, or 1 with a maximum instead of the sum if p = ∞.

The solver sees `blocks` only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from equinorm.balancing.blocks import AnyBlock, Block
from equinorm.balancing.norm import Norm
from equinorm.balancing.sides import GROUND
from equinorm.balancing.singles import Singles
from equinorm.rescaling.last_answers import LastAnswers


def _is_single(block: Block) -> bool:
    """Is it a list of terms that one family moves?"""
    one_side = not block.is_matrix and len(block.sides) == 1
    return one_side and not block.is_empty and block.sides[0].family != GROUND


class Precise(Protocol):
    """Something that sums in float64 if it is told to."""

    precise: bool


class Shared(Protocol):
    """Processes that solve together, each with parts of the energies."""

    def agreed(self, z: Tensor) -> Tensor:
        """The same log-scales in all of them."""
        ...

    def joined(self, slack: Tensor) -> Tensor:
        """The least of all of them, entry by entry."""
        ...

    def read(self, z: Tensor) -> None:
        """Read energies at these log-scales, so that no process needs the others until they are elsewhere."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A network's energies.

    Attributes:
        blocks: all energies that depend on free classes.
        families: first and last + 1 id of every family.
        constants: logarithm of each tensor's energy that no free class changes, by tensor index.
        num_free: number of free classes.
        norm: whose energies they are.
        streams: weights whose sums are taken in float32 until `refine`.
        shared: who solves it together; None for one process.
        kept: what is worked out from the layouts of the blocks alone, for the next time.
        singles: the blocks that can be dealt with as one; None if there are none.
        others: the other blocks.
    """

    blocks: tuple[AnyBlock, ...]
    families: tuple[tuple[int, int], ...]
    constants: Mapping[int, float]
    num_free: int
    norm: Norm
    streams: tuple["Precise", ...] = ()
    shared: Shared | None = None
    kept: LastAnswers = field(default_factory=LastAnswers)
    singles: Singles | None = field(init=False)
    others: tuple[AnyBlock, ...] = field(init=False)

    def __post_init__(self) -> None:
        single = [isinstance(block, Block) and _is_single(block) for block in self.blocks]
        own = [block for block, is_one in zip(self.blocks, single, strict=True) if is_one and isinstance(block, Block)]
        object.__setattr__(self, "singles", Singles(own, self.norm, self.kept) if own else None)
        others = tuple(block for block, is_one in zip(self.blocks, single, strict=True) if not is_one)
        object.__setattr__(self, "others", others)

    def log_energies(self, z: Tensor) -> dict[int, float]:
        """Logarithm of each tensor's energy by tensor index; of its largest entry if p = ∞."""
        parts: dict[int, list[float]] = {index: [value] for index, value in self.constants.items()}
        for block in self.others:
            parts.setdefault(block.tensor, []).append(block.log_total(z, self.norm))
        if self.singles is not None:
            for block, total in zip(self.singles.blocks, self.singles.log_totals(z), strict=True):
                parts.setdefault(block.tensor, []).append(total)
        return {index: self.norm.join(values) for index, values in parts.items()}

    @property
    def is_precise(self) -> bool:
        """Are all sums taken in float64, or from energies that are kept?"""
        return all(stream.precise for stream in self.streams)

    def refine(self) -> None:
        """Take sums in float64 from now on."""
        for stream in self.streams:
            stream.precise = True

    def without(self, dead: Tensor) -> "Problem":
        """The same problem without the edges of dead classes."""
        return replace(self, blocks=tuple(block.without(dead) for block in self.blocks))
