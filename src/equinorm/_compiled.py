"""Functions compiled by torch.compile, each apart from all others."""

import itertools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from equinorm._errors import EquinormError

P = ParamSpec("P")
T = TypeVar("T")

_numbers = itertools.count()


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, compiled as one graph at its first call.

    torch.compile keeps its results by code object and stops at a few for each, so every compiled function has code of its own.

    Raises:
        EquinormError: at the first call, before anything is changed, if it cannot be compiled on this machine.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    code = call.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)
    inner = torch.compile(own, fullgraph=True, dynamic=False)

    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise EquinormError(
                f"torch.compile cannot compile the step on this machine: {reason} On a CPU it needs a C++ compiler. Leave out "
                "compile=True to do without."
            ) from error

    return run
