"""The operations that random networks are made of, each with a second way to write it where there is one.

An operation is `run(part, *values, **options)`; `part` is a module with its weights, or None. `choose` draws the options, or
returns None where the values do not suit. `also` computes the same in another way: discovery must find the same group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

F = nn.functional
SIZES = st.sampled_from([2, 3, 4])


@dataclass(frozen=True)
class Op:
    name: str
    run: Callable[..., Tensor]
    arity: int = 1
    choose: Callable[..., dict[str, Any] | None] = lambda draw, *values: {}
    part: Callable[..., nn.Module] | None = None
    also: Callable[..., Tensor] | None = None
    often: int = 1
    exact: bool = True
    """Is the result bitwise the same times a power of two if the values are? False for roots of odd powers."""
    casts: bool = False
    """Does it round its values to fewer bits, which powers of two alone leave as they are?"""


OPS: dict[str, Op] = {}


def op(name: str, run: Callable[..., Tensor], **options: Any) -> None:
    assert name not in OPS, name
    OPS[name] = Op(name, run, **options)


class Vector(nn.Module):
    """A parameter of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))


def unary(name: str, run: Callable[[Tensor], Tensor], also: Callable[[Tensor], Tensor] | None = None, **options: Any) -> None:
    op(name, lambda part, x: run(x), also=also and (lambda part, x: also(x)), **options)


def binary(name: str, run: Callable[..., Tensor], also: Callable[..., Tensor] | None = None, **options: Any) -> None:
    op(name, lambda part, x, y: run(x, y), also=also and (lambda part, x, y: also(x, y)), arity=2, **options)


def axis(*, first: int = 0, least: int = 1) -> Callable[..., dict[str, Any] | None]:
    """Choose an axis of at least this size."""

    def choose(draw, x: Tensor) -> dict[str, Any] | None:
        axes = [d for d in range(first, x.dim()) if x.size(d) >= least]
        return {"dim": draw(st.sampled_from(axes))} if axes else None

    return choose


def rank(*ranks: int, **fixed: Any) -> Callable[..., dict[str, Any] | None]:
    return lambda draw, x, *_: dict(fixed) if x.dim() in ranks else None
