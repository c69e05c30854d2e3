"""Operations of random networks that are about what a value is: transformed parameters, constants made in forward, attributes,
casts, and second names of parameters."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from random_networks.operations import SIZES, F, Vector, op

FOLLOWS_CONSTANTS = True
"""Are constants made in forward known to be constants? Then writing them in another way must find the same group."""

READS_ALIASES = True
"""Do numbers that a forward reads from an alias of a parameter pin it? Until then such networks are not drawn."""

# ---------------------------------------------------------------------------------------------------- transformed parameters
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "neg": torch.neg,
    "relu": F.relu,
    "leaky": lambda w: F.leaky_relu(w, -0.5),
    "clone": torch.clone,
    "detach": Tensor.detach,
    "in place": lambda w: w.clone().abs_(),
    "column": lambda w: w.unsqueeze(0),
    "abs of column": lambda w: w.unsqueeze(0).abs(),
    "column of neg": lambda w: w.neg().unsqueeze(0),
    "square": torch.square,
    "sign": lambda w: w * w.sign(),
    "nonzero": lambda w: w * w.bool(),
    "double": lambda w: 2 * w,
    "scaled": lambda w: 0.1 * w,
    "clamped": lambda w: w.clamp(min=-0.25),
    "cast": lambda w: w.float().double(),
    "wide": lambda w: w.to(torch.complex128).real,
    "copied": lambda w: torch.empty_like(w).copy_(w),
    "copied from abs": lambda w: torch.empty_like(w).copy_(w.abs()),
    "flipped": lambda w: w.flip(0),
    "tail": lambda w: torch.cat([w[:1].neg(), w[1:]]),
}


def _transform(draw, x: Tensor) -> dict[str, Any]:
    return {"how": draw(st.sampled_from(list(TRANSFORMS)))}


def _shifted(part: Any, x: Tensor, how: str, number: float) -> Tensor:
    return x * (number + TRANSFORMS[how](part.w))


def _both(part: Any, x: Tensor, how: str, number: float) -> Tensor:
    """A parameter with a number added, and read in another way besides."""
    return x * (part.w + number) * TRANSFORMS[how](part.w).sign()


for _name, _run in {"gain_of_transformed_and_number": _shifted, "gain_and_sign": _both}.items():
    op(
        _name,
        _run,
        choose=lambda draw, x: {**_transform(draw, x), "number": draw(st.sampled_from([1, 0.5, -1]))},
        part=lambda x, how, number: Vector(x.size(-1)),
        often=6,
    )
op(
    "gain_of_number_less_transformed",
    lambda part, x, how: x * (1 - TRANSFORMS[how](part.w)),
    choose=_transform,
    part=lambda x, how: Vector(x.size(-1)),
    often=4,
)
op(
    "gain_of_transformed",
    lambda part, x, how: x * TRANSFORMS[how](part.w),
    choose=_transform,
    part=lambda x, how: Vector(x.size(-1)),
    often=4,
)
op(
    "shift_of_transformed",
    lambda part, x, how: x + TRANSFORMS[how](part.w),
    choose=_transform,
    part=lambda x, how: Vector(x.size(-1)),
)
op(
    "linear_of_transformed",
    lambda part, x, how, out: x @ TRANSFORMS[how](part.w).reshape(x.size(-1), out),
    choose=lambda draw, x: {**_transform(draw, x), "out": draw(SIZES)},
    part=lambda x, how, out: Vector(x.size(-1), out),
    often=6,
)


# --------------------------------------------------------------------------------------------------- constants made in forward
def _numbers(count: int) -> list[float]:
    return [float(number % 3) - 1 for number in range(count)]


def _order(count: int) -> list[int]:
    return [(3 * number + 1) % count for number in range(count)]


def _written(also: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    return also if FOLLOWS_CONSTANTS else None


CONSTANTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "zeros_made_in_forward": (lambda x: x + torch.tensor([0.0] * x.size(-1), dtype=x.dtype), lambda x: x + 0),
    "number_made_in_forward": (lambda x: x * torch.tensor(2.0, dtype=x.dtype), lambda x: 2 * x),
    "numbers_made_in_forward": (
        lambda x: x * torch.tensor(_numbers(x.size(-1)), dtype=x.dtype),
        lambda x: torch.stack([x[..., i] * number for i, number in enumerate(_numbers(x.size(-1)))], -1),
    ),
    "bound_made_in_forward": (lambda x: torch.maximum(x, torch.tensor(0.0, dtype=x.dtype)), F.relu),
    "index_made_in_forward": (
        lambda x: x[..., torch.tensor(_order(x.size(-1)))],
        lambda x: torch.stack([x[..., i] for i in _order(x.size(-1))], -1),
    ),
    "range_made_in_forward": (
        lambda x: x.index_select(-1, torch.arange(x.size(-1) - 1, -1, -1)),
        lambda x: x.flip(-1),
    ),
    "mask_made_in_forward": (
        lambda x: x * (torch.arange(x.size(-1)) % 2).to(x.dtype),
        lambda x: torch.stack([x[..., i] * (i % 2) for i in range(x.size(-1))], -1),
    ),
    "written_constant": (
        lambda x: x + torch.zeros(x.size(-1), dtype=x.dtype).index_fill_(0, torch.tensor([0]), 0.5),
        lambda x: torch.cat([x[..., :1] + 0.5, x[..., 1:]], -1),
    ),
}
for _name, (_one, _other) in CONSTANTS.items():
    op(_name, lambda part, x, run=_one: run(x), also=_written(lambda part, x, run=_other: run(x)))


# ------------------------------------------------------------------------------------------------------------------ attributes
class Holder(nn.Module):
    """Plain attributes beside a parameter, some of which show the parameter itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))
        self.register_buffer("buffer", torch.full((size,), 0.5))
        self.number, self.numbers = 0.5, (torch.full((size,), 2.0, dtype=torch.float64), 2.0)
        self.table = {"zeros": torch.zeros(size, dtype=torch.float64), "names": ["w"]}

    @property
    def alias(self) -> Tensor:
        return self.__dict__.setdefault("_alias", self.w.data)  # made after the weights have their dtype and numbers


ATTRIBUTES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "number": lambda part, x: x * part.number * part.w,
    "tensor in a tuple": lambda part, x: x * part.numbers[0] + part.w,
    "number in a tuple": lambda part, x: x * part.w * part.numbers[1],
    "zeros in a dict": lambda part, x: x * part.w + part.table["zeros"],
    "buffer": lambda part, x: x * part.buffer + part.w,
    "detached": lambda part, x: x * part.w.detach(),
    "number and buffer": lambda part, x: x * (part.w + part.number) * part.buffer,
}
ALIASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "alias": lambda part, x: x * part.alias,
    "alias and itself": lambda part, x: x * part.w + part.alias,
    "alias of an entry": lambda part, x: x * part.w + part.alias[0],
}
READ_ALIASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "number of an alias": lambda part, x: x * part.w + float(part.alias[0]),
    "number through numpy": lambda part, x: x * part.w + float(part.alias.numpy()[0]),
}
USES = {**ATTRIBUTES, **ALIASES, **(READ_ALIASES if READS_ALIASES else {})}


def _holder(x: Tensor, how: str) -> nn.Module:
    """With its alias in place, so that copies of the module hold one of their own."""
    return Holder(x.size(-1)).double()


op(
    "attributes",
    lambda part, x, how: USES[how](part, x),
    choose=lambda draw, x: {"how": draw(st.sampled_from(list(USES)))},
    part=_holder,
    often=8,
)

# ----------------------------------------------------------------------------------------------------------------------- casts
NARROW = [torch.float32, torch.bfloat16]


def _narrow(draw, *values: Tensor) -> dict[str, Any]:
    return {"dtype": draw(st.sampled_from(NARROW))}


op("cast_and_back", lambda part, x, dtype: x.to(dtype).to(x.dtype), choose=_narrow, casts=True, often=3)
op("sum_narrowly", lambda part, x, dtype: x.sum(-1, keepdim=True, dtype=dtype).to(x.dtype), choose=_narrow, casts=True, often=3)
op(
    "linear_narrowly",
    lambda part, x, dtype, out: F.linear(x.to(dtype), part.weight.to(dtype), part.bias.to(dtype)).to(x.dtype),
    choose=lambda draw, x: {**_narrow(draw), "out": draw(SIZES)},
    part=lambda x, dtype, out: nn.Linear(x.size(-1), out),
    casts=True,
    often=3,
)
op(
    "write_narrowly",
    lambda part, x, y, dtype: torch.zeros_like(x, dtype=dtype).copy_(y).to(x.dtype) + x,
    arity=2,
    choose=_narrow,
    casts=True,
    often=3,
)
op("cast_to_wider", lambda part, x: x.to(torch.complex128).real)
