"""Objects that answer for others, and numbers of a parameter that are read through something that is no tensor."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equinorm

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Unbound:
    """Stands for a request that there is not, as context-local objects of web frameworks do: all that one asks of it raises."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"working outside of a request: {name}")


class Unhashable(type):
    def __hash__(cls) -> int:
        raise TypeError(f"classes of {cls.__name__} have no hash")


class Odd(metaclass=Unhashable):
    """Its class cannot be a key."""


REQUESTS = [Unbound()]  # a global that any discovery here meets; in a list, as pytest looks at what a module holds


class Scaled(nn.Module):
    """A network times a number that is read from what it holds."""

    def __init__(self, hold: Callable[[Tensor], Any], number: Callable[[Any], float]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)
        object.__setattr__(self, "held", hold(self.a.bias.detach()))
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * self.number(self.held)


def test_globals_that_raise_whatever_they_are_asked():
    with pytest.raises(RuntimeError, match="outside of a request"):
        isinstance(REQUESTS[0], int)
    assert equinorm.symmetries(Scaled(lambda _: None, lambda _: 2.0), X).num_free == 5


def test_classes_without_a_hash():
    assert equinorm.symmetries(Scaled(lambda bias: [Odd()], lambda _: 2.0), X).num_free == 5


def _again(entries: Any) -> Any:
    """The first entry of an iterator, which does not move."""
    return next(iter(entries.__reduce__()[1]))[0]


DISGUISED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], float]]] = {
    "memoryview": (lambda bias: bias.numpy().data, lambda held: held[0]),
    "method": (lambda bias: bias[0].item, lambda held: held()),
    "method of an array": (lambda bias: bias.numpy().tolist, lambda held: held()[0]),
    "flat": (lambda bias: bias.numpy().flat, lambda held: float(held[0])),
    "iterator": (lambda bias: iter([bias.numpy()]), lambda held: float(_again(held)[0])),
    "repeated": (lambda bias: itertools.repeat(bias.numpy()), lambda held: float(next(held)[0])),
    "view of a dict": (lambda bias: {0: bias.numpy()}.values(), lambda held: float(next(iter(held))[0])),
    "a slice of memory": (lambda bias: np.frombuffer(bias.numpy().data[1:]), lambda held: float(held[0])),
}


@pytest.mark.parametrize("kind", DISGUISED)
def test_numbers_of_a_parameter_are_read_in_disguise(kind):
    assert equinorm.symmetries(Scaled(*DISGUISED[kind]), X).num_free == 0
