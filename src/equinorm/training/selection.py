"""Frozen parameters: what was saved of them elsewhere stays valid only while they keep still."""

from collections.abc import Mapping

import torch
from torch import Tensor

from equinorm._display import and_more
from equinorm._errors import BalanceError, describe, warn
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.balancing.layout import NetworkLayout, lay_out
from equinorm.balancing.scope import counted, nothing_moves
from equinorm.modules.choosing import Choice
from equinorm.training.settings import SelectionOptions


class Selection:
    """Which tensors move, while parameters are frozen and unfrozen.

    Args:
        symmetries: of the model.
        held: mask over 0..num_free of classes that must not move in any case.
        options: what else decides which move.

    Attributes:
        candidates: scalings of what moves where nothing is frozen.
        moving: those of them that move now.
        network: the layouts of the tensors whose norm counts now.
        frozen: scalings of what is frozen and would move otherwise.
        held: mask over 0..num_free of classes that do not move now.
    """

    def __init__(self, symmetries: Symmetries, held: Tensor, options: SelectionOptions) -> None:
        self._symmetries, self._always, self._options = symmetries, held, options
        self._holds, self._is_told, self._pattern = options.frozen == "hold", False, ()
        self.candidates = self._within(held)
        tensors = symmetries.tensors
        self._tied = [_parameters(scaling, tensors) for scaling in self.candidates]
        self._flat = [tensor for tied in self._tied for tensor in tied]
        self._trained: list[bool] = []
        self.moving: list[Scaling] = []
        self.network: NetworkLayout
        self.frozen: list[Scaling] = []
        self._choose(self._frozen())

    def check(self, modules: Choice | None) -> None:
        """Refuse a model in which nothing moves.

        Args:
            modules: outside of which nothing may.

        Raises:
            BalanceError: which says why.
        """
        if not self.candidates:
            raise BalanceError(f"{nothing_moves(self._symmetries, modules)}.")
        if not self.moving:
            raise BalanceError(
                f"every hidden channel of {describe(self._symmetries.model)} that can be rescaled would move a frozen "
                f"parameter, as {self._frozen_names()}. Unfreeze them before ENorm is made, or let them move: "
                "ENorm(..., frozen='move')."
            )

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
                f"frozen parameters stay as they are, and so does what would move with them: {self._frozen_names()}. "
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
        self.moving, found = self._within(now), self._symmetries
        self.network = lay_out(counted(self.moving, self._options.biases), found.family_ranges, found.num_free, now)
        self._pattern, self.held = pattern, now

    def _within(self, held: Tensor) -> list[Scaling]:
        """Scalings of the tensors that move with a class which is not held."""
        tensors = [s for s in self._symmetries.scalings if self._options.match_biases or s.role != "bias"]
        return [s for s in tensors if s.factors and s.numel and bool((~held[s.free()]).any())]

    def _frozen_names(self) -> str:
        return and_more([scaling.name for scaling in self.frozen], 3)


def _parameters(scaling: Scaling, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tied tensors of a parameter; none for buffers, which are never trained."""
    return [tensors[name] for name in scaling.names if name in tensors] if scaling.kind == "parameter" else []
