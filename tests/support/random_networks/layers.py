"""Operations of random networks that have weights."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from random_networks.moves import attention_by_hand
from random_networks.operations import SIZES, F, Vector, op, rank

# ------------------------------------------------------------------------------------------------- weights on the last axis
op(
    "linear",
    lambda part, x, out, bias: part(x),
    choose=lambda draw, x: {"out": draw(SIZES), "bias": draw(st.booleans())},
    part=lambda x, out, bias: nn.Linear(x.size(-1), out, bias=bias),
    also=lambda part, x, out, bias: torch.einsum("...i,oi->...o", x, part.weight) + (part.bias if bias else 0),
    often=12,
)
op(
    "matrix",
    lambda part, x, out: x @ part.w,
    choose=lambda draw, x: {"out": draw(SIZES)},
    part=lambda x, out: Vector(x.size(-1), out),
    also=lambda part, x, out: F.linear(x, part.w.T),
    often=3,
)
op(
    "gain",
    lambda part, x: x * part.w,
    part=lambda x: Vector(x.size(-1)),
    also=lambda part, x: x.mul(part.w.expand(x.shape)),
    often=2,
)
op(
    "gain_plus_one",
    lambda part, x: x * (1 + part.w),
    part=lambda x: Vector(x.size(-1)),
    also=lambda part, x: (part.w + 1) * x,
)
op("shift", lambda part, x: x + part.w, part=lambda x: Vector(x.size(-1)), also=lambda part, x: x - (-part.w), often=2)
op("scalar_gain", lambda part, x: x * part.w, part=lambda x: Vector())
op("prelu", lambda part, x: F.prelu(x, part.w), choose=rank(2), part=lambda x: Vector(x.size(1)))
op("layer_norm", lambda part, x: part(x), part=lambda x: nn.LayerNorm(x.size(-1), eps=0.1), often=2)
op(
    "rms_norm",
    lambda part, x: part(x),
    part=lambda x: nn.RMSNorm(x.size(-1), eps=0.1),
    also=lambda part, x: x * (x.pow(2).mean(-1, keepdim=True) + 0.1).rsqrt() * part.weight,
)
op(
    "swiglu",
    lambda part, x, out: torch.mul(*(f(h) for f, h in zip((F.silu, torch.clone), part(x).chunk(2, -1), strict=True))),
    choose=lambda draw, x: {"out": draw(SIZES)},
    part=lambda x, out: nn.Linear(x.size(-1), 2 * out),
    also=lambda part, x, out: (
        F.silu(F.linear(x, part.weight[:out], part.bias[:out])) * F.linear(x, part.weight[out:], part.bias[out:])
    ),
)

# -------------------------------------------------------------------------------------------- weights that are used again


def _again(part: Any, x: Tensor, times: int, gated: bool) -> Tensor:
    """A layer applied to its own result; gated, times the value before."""
    for _ in range(times):
        x = F.relu(part(x)) * (x if gated else 1)
    return x


def _again_by_copies(part: Any, x: Tensor, times: int, gated: bool) -> Tensor:
    for weight in part.weight.expand(times, -1, -1):
        x = F.relu(torch.einsum("...i,oi->...o", x, weight)).mul(x if gated else 1)
    return x


op(
    "again",
    _again,
    choose=lambda draw, x, **_: {"times": draw(st.sampled_from([2, 3])), "gated": draw(st.booleans())},
    part=lambda x, times, gated: nn.Linear(x.size(-1), x.size(-1), bias=False),
    also=_again_by_copies,
    often=3,
)
op(
    "there_and_back",
    lambda part, x, out: F.relu(x @ part.w) @ part.w.T,
    choose=lambda draw, x: {"out": draw(SIZES)},
    part=lambda x, out: Vector(x.size(-1), out),
    also=lambda part, x, out: torch.einsum("...o,io->...i", F.relu(torch.einsum("...i,io->...o", x, part.w)), part.w),
    often=2,
)

# ------------------------------------------------------------------------------------------------- weights on the second axis


def _conv(draw, x: Tensor) -> dict[str, Any] | None:
    if x.dim() not in (3, 4):
        return None
    groups = draw(st.sampled_from([g for g in (1, 1, 2, x.size(1)) if x.size(1) % g == 0]))
    return {
        "out": groups * draw(st.sampled_from([1, 2])),
        "kernel": draw(st.sampled_from([1, 3])),
        "groups": groups,
        "bias": draw(st.booleans()),
    }


def _conv_part(x: Tensor, out: int, kernel: int, groups: int, bias: bool) -> nn.Module:
    kind = nn.Conv1d if x.dim() == 3 else nn.Conv2d
    return kind(x.size(1), out, kernel, padding=kernel // 2, groups=groups, bias=bias)


def _conv_grouped(part: Any, x: Tensor, out: int, kernel: int, groups: int, bias: bool) -> Tensor:
    """Each group on its own, then concatenated."""
    call = F.conv1d if x.dim() == 3 else F.conv2d
    pieces = zip(x.chunk(groups, 1), part.weight.chunk(groups, 0), strict=True)
    y = torch.cat([call(piece, weight, padding=kernel // 2) for piece, weight in pieces], 1)
    return y + part.bias.view(-1, *[1] * (x.dim() - 2)) if bias else y


op("conv", lambda part, x, **_: part(x), choose=_conv, part=_conv_part, also=_conv_grouped, often=10)
op(
    "conv_transpose",
    lambda part, x, out: part(x),
    choose=lambda draw, x: {"out": draw(SIZES)} if x.dim() == 4 and x.size(-1) < 4 else None,
    part=lambda x, out: nn.ConvTranspose2d(x.size(1), out, 2),
    often=2,
)
op(
    "batch_norm",
    lambda part, x: part(x),
    choose=rank(2, 3, 4),
    part=lambda x: (nn.BatchNorm1d if x.dim() < 4 else nn.BatchNorm2d)(x.size(1), eps=0.1),
    often=4,
)
op(
    "group_norm",
    lambda part, x, groups: part(x),
    choose=lambda draw, x: (
        {"groups": draw(st.sampled_from([g for g in (1, 2, 3) if x.size(1) % g == 0]))} if x.dim() > 2 else None
    ),
    part=lambda x, groups: nn.GroupNorm(groups, x.size(1), eps=0.1),
)
op(
    "squeeze_excite",
    lambda part, x: x * torch.sigmoid(part(x.mean((-2, -1)))).unsqueeze(-1).unsqueeze(-1),
    choose=rank(4),
    part=lambda x: nn.Sequential(nn.Linear(x.size(1), 2), nn.ReLU(), nn.Linear(2, x.size(1))),
    also=lambda part, x: torch.einsum("bchw,bc->bchw", x, part(F.adaptive_avg_pool2d(x, 1).flatten(1)).sigmoid()),
)


# ------------------------------------------------------------------------------------------------------------ attention
op(
    "multi_head_attention",
    lambda part, x, heads: _heads(part, x, heads),
    choose=lambda draw, x: {"heads": draw(st.sampled_from([1, 2]))} if x.dim() == 3 else None,
    part=lambda x, heads: nn.Linear(x.size(-1), 6 * heads),
    also=lambda part, x, heads: _heads_apart(part, x, heads),
    often=3,
)


def _heads(part: Any, x: Tensor, heads: int) -> Tensor:
    q, k, v = part(x).unflatten(-1, (3, heads, 2)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _heads_apart(part: Any, x: Tensor, heads: int) -> Tensor:
    pieces = part(x).split(2, -1)
    return torch.cat([attention_by_hand(None, *pieces[i::heads]) for i in range(heads)], -1)
