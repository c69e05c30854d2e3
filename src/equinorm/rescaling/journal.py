"""Writes that one operation is made of: where the second fails, the first is taken back."""

import torch
from torch import Tensor

_INVERSES = {"mul_": "div_", "add_": "sub_", "sub_": "add_"}


class Journal:
    """Writes in place, and what has been written since the last `clear`."""

    def __init__(self) -> None:
        self._written: list[tuple[Tensor, str, Tensor]] = []

    def write(self, memory: Tensor, kind: str, other: Tensor) -> None:
        """Call memory.mul_(other), add_ or sub_."""
        getattr(memory, kind)(other)
        if not torch.compiler.is_compiling():
            self._written.append((memory, kind, other))

    def clear(self) -> None:
        """Begin anew."""
        self._written.clear()

    def take_back(self) -> bool:
        """Undo all of it, last first, to within rounding; says whether that worked."""
        try:
            while self._written:
                memory, kind, other = self._written.pop()
                getattr(memory, _INVERSES[kind])(other)
        except Exception:
            return False
        return True
