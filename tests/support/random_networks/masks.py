"""Operations of random networks whose sizes data decide: rows that a mask leaves, by a mask, by indices, or up to a place."""

from typing import Any

import torch
from torch import Tensor

from random_networks.operations import op, rank

CAN_EXPORT = torch.__version__ >= "2.12"
"""Earlier exporters refuse an index that data decide."""


def _mask(x: Tensor, dim: int = 0) -> Tensor:
    """By the signs of the first entries along an axis, which no positive scale changes."""
    return x.movedim(dim, 0).flatten(1)[:, 0] > 0


def _put_back(part: Any, x: Tensor) -> Tensor:
    out, mask = torch.zeros_like(x), _mask(x)
    out[mask] = 2 * x[mask]
    return out


def _add_back(part: Any, x: Tensor) -> Tensor:
    index = _mask(x).nonzero().squeeze(1)
    return x + torch.zeros_like(x).index_add(0, index.flip(0), x.index_select(0, index))


def _entries(part: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + y[x > 0].sum()


def _up_to(part: Any, x: Tensor) -> Tensor:
    count = _mask(x).sum().item()
    torch._check(count >= 0)
    torch._check(count <= x.size(0))
    return x + x[:count].sum(0)


if CAN_EXPORT:
    op("mask_and_put_back", _put_back, often=3)
    op("mask_and_add_back", _add_back, often=3)
    op("mask_and_sum", lambda part, x: x + x[_mask(x)].sum(0), often=3)
    op("mask_of_another", lambda part, x, y: x + y[_mask(x)].sum(0), arity=2, often=3)
    op("mask_second_axis", lambda part, x: x + x[:, _mask(x, 1)].sum(1, keepdim=True), choose=rank(3, 4), often=2)
    op("mask_two_axes", lambda part, x: x + x[x[..., 0] > 0].sum(0), choose=rank(3), often=2)
    op("mask_entries", _entries, arity=2)
    op("mask_with_all", lambda part, x: x + torch.cat([x[_mask(x)], x]).relu().sum(0), often=2)
    op("mask_and_flatten", lambda part, x: x + x[_mask(x)].flatten(0, 1).sum(0), choose=rank(3, 4), often=2)
    op("up_to", _up_to, often=2)
