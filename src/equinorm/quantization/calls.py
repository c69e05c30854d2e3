"""Calls of linear maps and of sums: what a quantizer rounds, found while the network runs, whatever its modules are."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Key = tuple[str, int]
"""What identifies a place where numbers are rounded: a weight and which of its calls, or a sum and which of its operands."""


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A linear map: axes that follow the channels of what it reads, and whether its weight is stored (in, out)."""

    spatial: int
    is_transposed: bool = False
    places: tuple[str, ...] = ()


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def product(input: Tensor, weight: Tensor) -> Tensor:
    """x·W of a weight that is stored (in, out)."""
    return torch.matmul(input, weight)


def shifted_product(bias: Tensor, input: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """b + x·W."""
    return torch.addmm(bias, input, weight, beta=beta, alpha=alpha)


KINDS: dict[Any, LinearMap] = {
    functional.linear: LinearMap(0, places=("input", "weight", "bias")),
    torch.conv1d: LinearMap(1, places=_CONVOLUTION),
    torch.conv2d: LinearMap(2, places=_CONVOLUTION),
    torch.conv3d: LinearMap(3, places=_CONVOLUTION),
    torch.conv_transpose1d: LinearMap(1, True, _TRANSPOSED),
    torch.conv_transpose2d: LinearMap(2, True, _TRANSPOSED),
    torch.conv_transpose3d: LinearMap(3, True, _TRANSPOSED),
}
KINDS |= {
    getattr(getattr(torch.ops.aten, function.__name__), overload): kind
    for function, kind in KINDS.items()
    for overload in ("default", "padding", "input")
    if overload in getattr(torch.ops.aten, function.__name__).overloads()
}
"""Functions that modules and users call, and operators of exported graphs."""

_PRODUCT = LinearMap(0, True, ("input", "weight"))
PRODUCTS: dict[Any, Any] = dict.fromkeys(
    (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.ops.aten.matmul.default), product
)
PRODUCTS |= dict.fromkeys((torch.addmm, torch.Tensor.addmm, torch.ops.aten.addmm.default), shifted_product)
"""Functions whose last operand is a weight if it has two axes."""

_SET = {"input", "weight", "bias", "beta", "alpha"}
_NAMES = {"other": "weight", "mat1": "input", "mat2": "weight", "self": "input"}
KINDS |= {product: _PRODUCT, shifted_product: LinearMap(0, True, ("bias", "input", "weight"))}
OPERATORS = {f"aten.{function.__name__}" for function in KINDS} | {"aten.matmul", "aten.addmm"}
"""What linear maps are in graphs."""

NOT_ROUNDED = {f"aten.{name}" for name in ("einsum", "mm", "bmm", "baddbmm", "bilinear", "_grouped_mm")}
NOT_ROUNDED |= {f"aten.{name}{cell}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")}
"""Further ones, which are not rounded whatever they read."""


def addend(operator: str) -> str:
    """Which argument of a linear map in a graph is added to its product."""
    return "self" if operator in ("aten.addmm", "aten.baddbmm") else "bias"


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One call of a linear map.

    Attributes:
        function: what is called.
        arguments: by name.
        name: of the parameter that is its weight.
        number: of calls with this weight before it.
    """

    function: Any
    arguments: dict[str, Any]
    name: str
    number: int

    @property
    def kind(self) -> LinearMap:
        """Which map it is."""
        return KINDS[self.function]

    @property
    def axis(self) -> int:
        """Axis of the channels of what it reads and returns, from the end."""
        return -1 - self.kind.spatial

    @property
    def groups(self) -> int:
        """Groups of channels that do not mix."""
        return int(self.arguments.get("groups", 1))

    def run(self, **changed: Any) -> Tensor:
        """The result, some arguments replaced."""
        return self.function(**{**self.arguments, **changed})


ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.ops.aten.add.Tensor}
ADDITIONS_IN_PLACE = {Tensor.add_, Tensor.__iadd__, torch.ops.aten.add_.Tensor}


@dataclass(frozen=True, slots=True, eq=False)
class ActivationSum:
    """One sum of two activations.

    Attributes:
        operands: both.
        options: further arguments.
        where: the line that adds; empty in generated code.
        number: of sums on that line before it: others may be left out, as those of a mask that hides nothing.
        is_in_place: does it write into the first?
    """

    operands: tuple[Tensor, Tensor]
    options: dict[str, Any]
    where: str
    number: int
    is_in_place: bool

    @property
    def keys(self) -> tuple[Key, Key]:
        """What identifies the operands."""
        return (f"{self.where}+{self.number}", 0), (f"{self.where}+{self.number}", 1)

    def run(self, first: Tensor, second: Tensor) -> Tensor:
        """The sum of what stands for the operands."""
        result = torch.add(first, second, **self.options)
        return self.operands[0].copy_(result) if self.is_in_place else result


def _line() -> str:
    """The line that calls an operation of PyTorch; empty in generated code, where nothing chooses what runs."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == overrides.__file__:
        frame = frame.f_back
    name = frame.f_code.co_filename
    return "" if name.startswith("<") else f"{name}:{frame.f_lineno}"


class CallWatch(TorchFunctionMode):
    """While active, every linear map whose weight is a parameter of a model is handed to a function instead.

    Args:
        model: whose parameters count.
        handle: gets the call, returns its result.
        add: gets sums of two activations and returns their result; None leaves them alone.
    """

    def __init__(
        self, model: nn.Module, handle: Callable[[LayerCall], Any], add: Callable[[ActivationSum], Any] | None = None
    ) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in model.named_parameters()}
        self._constants = {*self._names, *(id(tensor) for tensor in model.buffers())}
        self._handle, self._add, self._numbers = handle, add, Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._add is not None and (func in ADDITIONS or func in ADDITIONS_IN_PLACE):
            operands = (*args, *(kwargs[key] for key in ("input", "other") if key in kwargs))
            if self._are_activations(operands):
                where = _line()
                number = self._numbers[where]
                self._numbers[where] += 1
                options = {key: value for key, value in kwargs.items() if key not in ("input", "other")}
                return self._add(ActivationSum((operands[0], operands[1]), options, where, number, func in ADDITIONS_IN_PLACE))
        kind = PRODUCTS.get(func, func)
        if kind not in KINDS:
            return func(*args, **kwargs)
        named = {_NAMES.get(key, key): value for key, value in kwargs.items()} if kind is not func else kwargs
        arguments = {**dict(zip(KINDS[kind].places, args, strict=False)), **named}
        weight = arguments.get("weight")
        name = self._names.get(id(weight), "")
        if weight is None or not name or (kind is not func and (weight.dim() != 2 or named.keys() - _SET)):
            return func(*args, **kwargs)
        number = self._numbers[name]
        self._numbers[name] += 1
        return self._handle(LayerCall(kind, arguments, name, number))

    def _are_activations(self, args: tuple) -> bool:
        """Are these two tensors of floating-point numbers with channels, none of them the model's own?"""
        return len(args) == 2 and all(
            isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and id(value) not in self._constants
            for value in args
        )
