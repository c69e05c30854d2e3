"""Lists of terms that one side moves, as one list: a network of many small tensors has hundreds."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm.balancing.blocks import Block
from equinorm.balancing.norm import Norm
from equinorm.rescaling.last_answers import LastAnswers


class ClassMaxima:
    """The largest of some values for each class.

    Args:
        ids: class of every factor, `width` for each value.
        keep: mask of the factors that count.
        width: factors of each value.
    """

    def __init__(self, ids: np.ndarray, keep: np.ndarray, width: int = 1) -> None:
        places = np.flatnonzero(keep & (ids > 0))
        places = places[np.argsort(ids[places], kind="stable")]
        self._values, ids = places // width, ids[places]
        self._starts = np.flatnonzero(np.diff(ids, prepend=-1))
        self._present = ids[self._starts]

    def maxima(self, values: np.ndarray, count: int) -> np.ndarray:
        """−∞ for classes without any."""
        found = np.full(count, -np.inf)
        if len(self._present):
            found[self._present] = np.maximum.reduceat(values[self._values], self._starts)
        return found


class SinglesStructure:
    """What the layouts of the lists tell, without a number of theirs."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.sizes = [len(block.energies) for block in blocks]
        self.starts = np.cumsum([0, *self.sizes[:-1]])
        self.ids = torch.cat([block.sides[0].ids for block in blocks])
        exponents = torch.tensor([block.sides[0].exponent for block in blocks], dtype=torch.float64)
        self.exponents = exponents.repeat_interleave(torch.tensor(self.sizes))
        self.are_alike = bool((exponents.abs() == 1).all())
        ids, signs = self.ids.numpy(), self.exponents.numpy()
        self.into, self.out = (ClassMaxima(ids, keep) for keep in (signs > 0, signs < 0))


class Singles:
    """Lists of terms that one side moves.

    Args:
        blocks: at least one, each a list of at least one term, with one side.
        norm: whose energies these are.
        kept: what is worked out from the layouts of the blocks alone, for the next time.

    Attributes:
        blocks: themselves.
        logs: logarithms of the energies of all their terms.
        ids: class of each term.
        exponents: by which its scale enters.
        are_alike: are these 1 and −1?
    """

    def __init__(self, blocks: Sequence[Block], norm: Norm, kept: LastAnswers) -> None:
        self._structure = kept.once(SinglesStructure, None, lambda: SinglesStructure(blocks))
        self.blocks, self._norm = blocks, norm
        self.ids, self.exponents, self.are_alike = self._structure.ids, self._structure.exponents, self._structure.are_alike
        self.logs = torch.cat([block.energies for block in blocks]).double().log()
        self.logs += torch.cat([block.offsets[0] for block in blocks])
        self._maxima: tuple[Tensor, Tensor] | None = None

    def log_totals(self, z: Tensor) -> list[float]:
        """Logarithm of the whole energy of each block."""
        logs = (self.logs + self._norm.q * self.exponents * z[self.ids]).numpy()
        starts, sizes = self._structure.starts, self._structure.sizes
        tops = np.maximum.reduceat(logs, starts)
        if self._norm.is_max:
            return tops.tolist()
        safe = np.where(np.isfinite(tops), tops, 0.0)
        with np.errstate(divide="ignore"):
            return (np.log(np.add.reduceat(np.exp(logs - safe.repeat(sizes)), starts)) + safe).tolist()

    def maxima(self, count: int) -> tuple[Tensor, Tensor]:
        """The largest log-energy into each class 0..count − 1 and out of it, −∞ without any; at log-scales 0."""
        if self._maxima is None:
            gathers, logs = (self._structure.into, self._structure.out), self.logs.numpy()
            into, out = (torch.from_numpy(gather.maxima(logs, count)) for gather in gathers)
            self._maxima = into, out
        return self._maxima
