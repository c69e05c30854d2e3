"""Writing tensors in place by changes that can be undone exactly: all of them or none."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from equinorm._errors import EquinormError
from equinorm.rescaling.writing import uninterrupted


class Change(Protocol):
    """What becomes of one tensor."""

    @property
    def what(self) -> str:
        """Its name."""
        ...

    @property
    def tensor(self) -> Tensor:
        """To be written."""
        ...

    def taken(self) -> Tensor:
        """What the tensor becomes."""
        ...

    def given_back(self, taken: Tensor) -> Tensor:
        """What the tensor was, bitwise."""
        ...


def write_all_(changes: Sequence[Change], error: type[EquinormError]) -> None:
    """Write all of them, or none.

    Args:
        changes: which have been checked.
        error: what is raised if an operation fails; all is put back then, bitwise.
    """
    begun: list[tuple[Change, Tensor | None]] = []
    with torch.no_grad(), uninterrupted():
        try:
            for change in changes:
                taken = change.taken()
                begun.append((change, taken))
                change.tensor.copy_(taken)
                begun[-1] = (change, None)
        except BaseException as failure:
            lost = _put_back(begun)
            if not isinstance(failure, Exception):
                raise
            what = changes[len(begun) - 1 if begun and begun[-1][1] is not None else len(begun)].what
            outcome = (
                f"These could not be put back, load them again: {', '.join(lost)}." if lost else "All is as it was before."
            )
            raise error(f"writing {what} failed: {type(failure).__name__}: {failure}. {outcome}") from failure


def _put_back(begun: Sequence[tuple[Change, Tensor | None]]) -> list[str]:
    """Undo what was begun, last first; returns what cannot be."""
    lost: list[str] = []
    for change, taken in reversed(begun):
        try:
            change.tensor.copy_(change.given_back(change.tensor.detach().clone() if taken is None else taken))
        except Exception:
            lost.append(change.what)
    return lost
