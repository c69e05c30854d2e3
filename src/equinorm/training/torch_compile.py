"""Functions compiled by torch.compile, each apart from all others."""

import itertools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from equinorm._errors import EquinormError, first_line, warn

P = ParamSpec("P")
T = TypeVar("T")

_numbers = itertools.count()


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, compiled as one graph for each pattern of its arguments: their number, shapes and strides.

    torch.compile keeps its results by code object and stops at eight for each. Hence every compiled function has code of its
    own; patterns beyond these run as they are, after a warning.

    Raises:
        EquinormError: at the first call, before anything is changed, if it cannot be compiled on this machine.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # takes seconds to import

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    code = call.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)
    inner = torch.compile(own, fullgraph=True, dynamic=False)

    def call_compiled(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except FailOnRecompileLimitHit:
            warn(
                "what ENorm moves takes more patterns than torch.compile keeps (gradients or states come and go); further ones "
                "run without compile=True."
            )
            return function(*args, **kwargs)
        except TorchDynamoException as error:
            raise EquinormError(
                f"torch.compile cannot compile the step on this machine: {first_line(error)}. "
                "Leave out compile=True to do without."
            ) from error

    return call_compiled
