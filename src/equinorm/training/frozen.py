"""Frozen parameters: what was saved of them elsewhere stays valid only while they keep still."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from equinorm._errors import BalanceError, warn
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.balancing.layout import NetworkLayout, lay_out
from equinorm.balancing.scope import counted

FROZEN = ("hold", "move")


class Selection:
    """Which tensors move, while parameters are frozen and unfrozen.

    Args:
        symmetries: of the model.
        held: mask over 0..num_free of classes that must not move in any case.
        biases: count biases in the norm.
        match_biases: do biases move?
        frozen: "hold" the classes that would move a frozen parameter, or "move" them.

    Attributes:
        candidates: scalings of what moves where nothing is frozen.
        moving: those of them that move now.
        network: the layouts of the tensors whose norm counts now.
        frozen: scalings of what is frozen and would move otherwise.
        held: mask over 0..num_free of classes that do not move now.

    Raises:
        BalanceError: for another word than these.
    """

    def __init__(self, symmetries: Symmetries, held: Tensor, biases: bool, match_biases: bool, frozen: str) -> None:
        if frozen not in FROZEN:
            raise BalanceError(f"frozen must be 'hold' or 'move', not {frozen!r}.")
        self._symmetries, self._always, self._biases, self._match_biases = symmetries, held, biases, match_biases
        self._holds, self._is_told, self._pattern = frozen == "hold", False, ()
        self.candidates = [scaling for scaling in self._within(held) if match_biases or scaling.role != "bias"]
        tensors = symmetries.tensors
        self._tied = [_parameters(scaling, tensors) for scaling in self.candidates]
        self._flat = [tensor for tied in self._tied for tensor in tied]
        self._trained: list[bool] = []
        self.moving: list[Scaling] = []
        self.network: NetworkLayout
        self.frozen: list[Scaling] = []
        self._choose(self._frozen())

    def renew(self) -> bool:
        """Look again; says whether anything was frozen or unfrozen since."""
        trained = [tensor.requires_grad for tensor in self._flat]
        if trained == self._trained or not self._holds:
            return False
        self._trained, pattern = trained, self._frozen()
        if pattern == self._pattern:
            return False
        self._choose(pattern)
        return True

    def tell(self) -> None:
        """Warn once that frozen parameters hold something."""
        if self.frozen and not self._is_told:
            self._is_told = True
            left = torch.zeros_like(self.held)
            for scaling in self.moving:
                left[scaling.free()] = True
            warn(
                f"frozen parameters stay as they are, and so does what would move with them: {shown(self.frozen)}. "
                f"{int((left & ~self.held).sum())} of {self._symmetries.num_free} scale classes are left to move. If the whole "
                "network is saved together, ENorm(frozen='move') rescales frozen parameters too; if not (adapters without "
                "their base), leave it."
            )

    def _frozen(self) -> tuple[bool, ...]:
        """For every candidate: is it a parameter that nobody trains?"""
        if not self._holds:
            return ()
        return tuple(bool(tied) and not any(tensor.requires_grad for tensor in tied) for tied in self._tied)

    def _choose(self, pattern: tuple[bool, ...]) -> None:
        self.frozen = [scaling for scaling, is_frozen in zip(self.candidates, pattern, strict=False) if is_frozen]
        now = self._always.clone()
        for scaling in self.frozen:
            now[scaling.free()] = True
        within = self._within(now)
        found = self._symmetries
        self.network = lay_out(counted(within, self._biases), found.family_ranges, found.num_free, now)
        self.moving = [scaling for scaling in within if self._match_biases or scaling.role != "bias"]
        self._pattern, self.held = pattern, now

    def _within(self, held: Tensor) -> list[Scaling]:
        """Scalings of the tensors that a class moves which is not held."""
        return [s for s in self._symmetries.scalings if s.factors and s.numel and bool((~held[s.free()]).any())]


def _parameters(scaling: Scaling, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tied tensors of a parameter; none for buffers, which are never trained."""
    return [tensors[name] for name in scaling.names if name in tensors] if scaling.kind == "parameter" else []


def shown(scalings: Sequence[Scaling]) -> str:
    """A few of their names."""
    more = f" and {len(scalings) - 3} more" if len(scalings) > 3 else ""
    return ", ".join(scaling.name for scaling in scalings[:3]) + more
