"""Blocks of vision models, one or more of each family, small enough for the oracle, and what is to be found in each."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from oracle import Verdict, verdict
from torch import nn

from zoo.__main__ import staying_double


class Block(NamedTuple):
    """A block and its group.

    Attributes:
        kind: a class by its path, or a function that makes the block.
        args: inputs: shapes, and lists and dicts of them; other values stay as they are.
        options: of the class.
        found: dimension of the group that is found.
        missed: how many more dimensions there are.
        why: they are not found.
    """

    kind: str | Callable[..., nn.Module]
    args: tuple[Any, ...]
    options: dict[str, Any]
    found: int
    missed: int
    why: str

    def made(self) -> nn.Module:
        """The block in evaluation mode."""
        kind = self.kind
        if isinstance(kind, str):
            module, _, name = kind.rpartition(".")
            kind = getattr(importlib.import_module(module), name)
        made = kind(**self.options)
        made.eval()  # returns nothing in some
        return made

    def judged(self) -> Verdict:
        """What the oracle says of it."""
        torch.manual_seed(0)
        made = self.made()
        with staying_double():  # some ask for float32 where the oracle needs float64
            return verdict(made, [drawn(arg) for arg in self.args])


class Blocks(dict[str, Block]):
    """Blocks by family; what stands behind a comma tells those of one family apart.

    Args:
        package: in which classes are looked for: `package.family.Class`, or `root.path.Class` for a path with dots.
    """

    def __init__(self, root: str, package: str) -> None:
        super().__init__()
        self.root, self.package = root, package

    def __call__(self, name: str, kind: Any, *args: Any, found: int, missed: int = 0, why: str = "", **options: Any) -> None:
        assert name not in self, name
        if isinstance(kind, str):
            kind = f"{self.root}.{kind}" if "." in kind else f"{self.package}.{name.partition(',')[0]}.{kind}"
        self[name] = Block(kind, args, options, found, missed, why)

    @property
    def families(self) -> set[str]:
        """Of all blocks."""
        return {name.partition(",")[0] for name in self}


EPS = "divided by max(norm, eps), which is of degree 0 only where the norm is above eps"
KEYS = "keys behind a batch norm in evaluation mode: what its mean and shift add to all keys alike cancels in the softmax"
ZEROS = "a buffer of zeros stands for the bias of the keys; values of buffers are not looked at"


def drawn(arg: Any) -> Any:
    """Inputs of these shapes."""
    if isinstance(arg, tuple):
        return torch.randn(arg)
    if isinstance(arg, list):
        return [drawn(part) for part in arg]
    return {key: drawn(part) for key, part in arg.items()} if isinstance(arg, dict) else arg
