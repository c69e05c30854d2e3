"""Operations of random networks without weights: functions, pairs of values, movement, reductions."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from random_networks.operations import F, axis, binary, op, rank, unary

# ------------------------------------------------------------------------------------------------------------ elementwise
unary("relu", F.relu, lambda x: x.clamp(min=0), often=6)
unary("relu_in_place", F.relu_, often=2)
unary("leaky_relu", lambda x: F.leaky_relu(x, 0.25), lambda x: torch.where(x > 0, x, 0.25 * x))
unary("abs", torch.abs, lambda x: torch.maximum(x, -x))
unary("neg", torch.neg, lambda x: 0 - x)
unary("square", torch.square, lambda x: x * x)
unary("cube", lambda x: x**3, lambda x: x * x * x)
unary("root", lambda x: x.abs().sqrt(), lambda x: x.abs().pow(0.5), exact=False)
unary("double", lambda x: 2 * x, lambda x: x + x)
unary("mask_positive", lambda x: x * (x > 0), lambda x: x.masked_fill(x <= 0, 0))
unary("mask_half", lambda x: torch.where(x > 0.5, x, 0.0))
unary("clip", lambda x: x.clamp(-1, 1), F.hardtanh)
unary("sigmoid", torch.sigmoid, lambda x: 1 / (1 + (-x).exp()))
unary("tanh", torch.tanh)
unary("gelu", F.gelu)
unary("silu", F.silu, lambda x: x * x.sigmoid())
unary("elu", F.elu)
unary("shift_by_one", lambda x: x + 1, lambda x: torch.add(x, torch.ones_like(x)))
unary("softmax", lambda x: x.softmax(-1))
unary("unit_rms", lambda x: x / x.square().mean(-1, keepdim=True).sqrt())
unary("dropout", lambda x: F.dropout(x, 0.5, training=False))


def _not_across(draw, x: Tensor, y: Tensor) -> dict[str, Any] | None:
    """PyTorch refuses to add a value in place to its own transpose."""
    is_shared = x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    return None if is_shared and x.stride() != y.stride() else {}


# ---------------------------------------------------------------------------------------------------------- two values
binary("add", torch.add, lambda x, y: torch.stack([x, y]).sum(0), often=6)
binary("sub", torch.sub, lambda x, y: x + y.neg(), often=2)
binary("mul", torch.mul, lambda x, y: torch.addcmul(torch.zeros_like(x), x, y), often=2)
binary("maximum", torch.maximum, lambda x, y: torch.where(x > y, x, y))
binary("choose_by_sign", lambda x, y: torch.where(x > 0, x, y))
binary("gate", lambda x, y: x * y.sigmoid(), lambda x, y: F.glu(torch.cat([x, y], -1), -1))
binary("soft_quotient", lambda x, y: x / (y.abs() + 0.5))
binary("add_mean", lambda x, y: x + y.mean(1, keepdim=True), lambda x, y: x + y.sum(1, keepdim=True) / y.size(1))
binary("add_in_place", lambda x, y: x.add_(y), choose=_not_across, often=1)
binary("write_in_place", lambda x, y: _write(x, y), lambda x, y: torch.cat([y[:, :1], x[:, 1:]], 1))
binary("scores", lambda x, y: x @ y.transpose(-1, -2), lambda x, y: torch.einsum("...ik,...jk->...ij", x, y), choose=rank(2, 3))
op(
    "concatenate",
    lambda part, x, y, dim: torch.cat([x, y], dim),
    arity=2,
    choose=lambda draw, x, y: {"dim": draw(st.integers(1, x.dim() - 1))},
    also=lambda part, x, y, dim: torch.stack([x, y], dim).flatten(dim, dim + 1),
    often=3,
)


def _write(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, :1] = y[:, :1]
    return x


def attention_by_hand(part: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))).softmax(-1) @ v


op(
    "attention",
    lambda part, q, k, v: F.scaled_dot_product_attention(q, k, v),
    arity=3,
    choose=rank(3),
    also=attention_by_hand,
    often=4,
)

# ------------------------------------------------------------------------------------------------------------- movement
op(
    "flip",
    lambda part, x, dim: x.flip(dim),
    choose=axis(first=1),
    also=lambda part, x, dim: x.index_select(dim, torch.arange(x.size(dim) - 1, -1, -1)),
)
op(
    "roll",
    lambda part, x, dim: x.roll(1, dim),
    choose=axis(),
    also=lambda part, x, dim: torch.cat([x.narrow(dim, x.size(dim) - 1, 1), x.narrow(dim, 0, x.size(dim) - 1)], dim),
)
op(
    "half",
    lambda part, x, dim: x.chunk(2, dim)[0],
    choose=axis(first=1, least=2),
    also=lambda part, x, dim: x.narrow(dim, 0, (x.size(dim) + 1) // 2),
    often=2,
)
op("every_other", lambda part, x: x[:, ::2], also=lambda part, x: x[:, torch.arange(0, x.size(1), 2)])
op("select", lambda part, x: x[..., -1], choose=rank(3, 4), also=lambda part, x: x.unbind(-1)[-1])
op("flatten", lambda part, x: x.flatten(1), choose=rank(3, 4), also=lambda part, x: x.reshape(x.size(0), -1), often=3)
op(
    "unflatten",
    lambda part, x, into: x.unflatten(1, (into, -1)),
    choose=lambda draw, x: {"into": 2} if x.dim() < 4 and x.size(1) % 2 == 0 else None,
    also=lambda part, x, into: torch.stack(x.chunk(2, 1), 1),
)
op(
    "transpose",
    lambda part, x: x.transpose(1, -1),
    choose=rank(3, 4),
    also=lambda part, x: torch.movedim(x, (1, -1), (-1, 1)),
    often=3,
)
op(
    "pad",
    lambda part, x: F.pad(x, (1, 1)),
    also=lambda part, x: torch.cat([torch.zeros_like(x[..., :1]), x, x.new_zeros(*x.shape[:-1], 1)], -1),
)
op(
    "pad_with_one",
    lambda part, x: F.pad(x, (0, 1), value=1.0),
    also=lambda part, x: torch.cat([x, torch.ones_like(x[..., :1])], -1),
)
op(
    "repeat",
    lambda part, x: x.repeat_interleave(2, 1),
    also=lambda part, x: x.unsqueeze(2).expand(-1, -1, 2, *x.shape[2:]).reshape(x.size(0), -1, *x.shape[2:]),
)
op(
    "shuffle",
    lambda part, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    choose=lambda draw, x: {} if x.size(1) % 2 == 0 else None,
    also=lambda part, x: torch.cat([x[:, i :: x.size(1) // 2] for i in range(x.size(1) // 2)], 1),
)
op("tril", lambda part, x: x.tril(), choose=rank(3))
op(
    "pixel_shuffle",
    lambda part, x: F.pixel_shuffle(x, 2),
    choose=lambda draw, x: {} if x.dim() == 4 and x.size(1) == 4 else None,
)

# ------------------------------------------------------------------------------------------------------------ reductions
op(
    "sum",
    lambda part, x, dim: x.sum(dim),
    choose=lambda draw, x: axis(first=1)(draw, x) if x.dim() > 2 else None,
    also=lambda part, x, dim: torch.stack(x.unbind(dim)).sum(0),
)
op(
    "mean",
    lambda part, x, dim: x.mean(dim),
    choose=lambda draw, x: axis(first=1)(draw, x) if x.dim() > 2 else None,
    also=lambda part, x, dim: x.sum(dim) / x.size(dim),
    often=2,
)
op(
    "amax",
    lambda part, x, dim: x.amax(dim),
    choose=lambda draw, x: axis(first=1)(draw, x) if x.dim() > 2 else None,
    also=lambda part, x, dim: x.max(dim).values,
)
op(
    "norm",
    lambda part, x, dim: x.norm(dim=dim, keepdim=True),
    choose=axis(first=1, least=2),
    also=lambda part, x, dim: x.square().sum(dim, keepdim=True).sqrt(),
)
op(
    "std",
    lambda part, x, dim: x.std(dim, keepdim=True),
    choose=axis(first=1, least=2),
    also=lambda part, x, dim: x.var(dim, keepdim=True).sqrt(),
)
op("center", lambda part, x, dim: x - x.mean(dim, keepdim=True), choose=axis(least=2))
op("cumsum", lambda part, x, dim: x.cumsum(dim), choose=axis(first=1))
op("sort", lambda part, x: x.sort(-1).values)
op(
    "max_pool",
    lambda part, x: F.max_pool2d(x, 2),
    choose=lambda draw, x: {} if x.dim() == 4 and min(x.shape[2:]) > 1 else None,
    also=lambda part, x: F.max_pool2d(x, (2, 1), (2, 1)).unfold(-1, 2, 2).amax(-1),
    often=2,
)
op(
    "avg_pool",
    lambda part, x: F.avg_pool2d(x, 2),
    choose=lambda draw, x: {} if x.dim() == 4 and min(x.shape[2:]) > 1 else None,
    often=2,
)
op(
    "upsample",
    lambda part, x: F.interpolate(x, scale_factor=2),
    choose=lambda draw, x: {} if x.dim() == 4 and x.size(-1) < 4 else None,
    also=lambda part, x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
)
op("upsample_bilinear", lambda part, x: F.interpolate(x, size=(3, 3), mode="bilinear"), choose=rank(4))
