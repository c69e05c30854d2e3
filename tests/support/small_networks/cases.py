"""A collection of small networks, one for each way in which symmetries arise; for comparison with the oracle."""

import torch
from torch import Tensor, nn

CASES: dict[str, nn.Module] = {}
INPUTS: dict[str, tuple] = {}


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return (torch.arange(int(torch.tensor(shape).prod())) % 6).reshape(shape)


class Net(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *args):
        return self.function(self, *args)


def case(name: str, *args: Tensor, module: nn.Module | None = None, **parts):
    """Enter a module, or the decorated function with these parts as its module."""
    assert name not in CASES, name
    INPUTS[name] = args
    if module is not None:
        CASES[name] = module.double()
        return None

    def enter(function):
        CASES[name] = Net(function, **parts).double()
        return function

    return enter


def lin(a: int, b: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(a, b, bias=bias)


def conv(a: int, b: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=options.pop("bias", False), **options)


def seq(name: str, arg: Tensor, *modules: nn.Module) -> None:
    case(name, arg, module=nn.Sequential(*modules))
