"""Constants made in a forward, and gains of a parameter with a number added."""

import numpy as np
import torch
from torch import nn

from small_networks.cases import case, lin, tokens, x

F = nn.functional
ORDER = [3, 1, 0, 2]


# ------------------------------------------------------------------------------------------------- constants made in a forward


@case("channels in an order made here", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x))[:, torch.tensor(ORDER)])


@case("channels in an order from NumPy", x(3, 3), a=lin(3, 4), b=lin(4, 4), d=lin(4, 2))
def _(m, x):
    h = F.relu(m.a(x))[:, torch.tensor(np.array(ORDER))]
    return m.d(F.relu(m.b(h))[:, torch.from_numpy(np.arange(4)[::-1].copy())])


@case("channels gathered by an order made here", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x)).gather(1, torch.tensor([ORDER] * 3)))


@case("an order used twice", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    order = torch.tensor(ORDER)
    return m.d(F.relu(m.a(x))[:, order][:, order])


@case("zeros made here", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x)) + torch.tensor([0.0] * 4) + x.new_tensor([0.0] * 4))


@case("zeros and ones made here", x(3, 3), a=lin(3, 4, True), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x)) * torch.tensor([0.0, 1.0, 2.0, 3.0]) + torch.tensor([0.0, 0.0, 1.0, 0.0]))


@case("a constant changed in place by constants", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0])
    mask[torch.tensor([2])] = 0.0
    mask += torch.tensor([0.0, 1.0, 0.0, 0.0])
    return m.d(F.relu(m.a(x)) * mask)


@case("a constant of which data change a part", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    shift = torch.tensor([0.0] * 4, dtype=x.dtype)
    shift[1] = x.sum()
    return m.d(F.relu(m.a(x)) + shift)


@case("a constant to which an activation is added", x(3, 3), a=lin(3, 4), b=lin(3, 4), d=lin(4, 2))
def _(m, x):
    shift = torch.tensor([0.0] * 4, dtype=x.dtype)
    part = shift[:2]
    shift += m.b(x).sum(0)
    return m.d(F.relu(m.a(x)) + shift), part * 1.5


@case("constants made without gradient", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    with torch.no_grad():
        order, zeros = torch.tensor(ORDER), torch.tensor([0.0] * 4)
    return m.d(F.relu(m.a(x))[:, order] + zeros)


@case("an activation changed in place at places made here", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    h = m.a(x)
    first = h[:, :2]
    h[:, torch.tensor([1, 3])] = 0.0
    first.mul_(2.0)
    return m.d(F.relu(h)[:, torch.tensor(ORDER)])


@case("a copy, then a sum in place", x(3, 3), a=lin(3, 4), b=lin(3, 4), d=lin(4, 2))
def _(m, x):
    total = torch.empty_like(m.a(x))
    total.copy_(m.a(x))
    total.add_(m.b(x))
    return m.d(F.relu(total))


# ------------------------------------------------------------------------------------------- gains with a number added to them

GAINS = {
    "1 + g[None]": lambda g: 1 + g[None],
    "1 + 0.1 g": lambda g: 1 + 0.1 * g,
    "g 0.1 + 1": lambda g: g * 0.1 + 1,
    "1 + g / 10": lambda g: 1 + g / 10,
    "1 - g": lambda g: 1 - g,
    "1 + (-g)": lambda g: 1 + (-g),
    "0.5 (1 + g)": lambda g: 0.5 * (1 + g),
    "1 - 0.3 g[None]": lambda g: torch.sub(torch.ones(4), g[None, :], alpha=0.3)[0],
    "a number plus a multiple": lambda g: torch.add(1, g, alpha=0.3),
    "a multiple minus a number": lambda g: torch.rsub(g * 2, 3.0, alpha=0.5),
    "ones plus a gain": lambda g: torch.ones_like(g) + g,
    "a tensor of one number plus a gain": lambda g: torch.tensor(1.0) + g.clone(),
    "in place": lambda g: g.clone().mul_(0.1).add_(1),
    "used twice alike": lambda g: (1 + g) * (1 + g[None, :]),
    # none of these scales as the parameter plus one number does
    "numbers that differ": lambda g: torch.tensor([1.0, 2.0, 3.0, 4.0]) + g,
    "two numbers": lambda g: (1 + g) * (1 + 0.5 * g),
    "with and without a number": lambda g: (1 + g) * g,
    "a number plus a square": lambda g: 1 + 0.1 * g * g,
}
for title, gain in GAINS.items():

    @case(f"gain: {title}", x(3, 3), a=lin(3, 4), g=torch.ones(4), d=lin(4, 2))
    def _(m, x, gain=gain):
        return m.d(F.softsign(m.a(x)) * gain(m.g))


@case("gain of channels: 1 + g.view", x(2, 3, 3, 3), a=nn.Conv2d(3, 4, 1), g=torch.ones(4), d=nn.Conv2d(4, 2, 1))
def _(m, x):
    return m.d(F.softsign(m.a(x)) * (1 + m.g.view(1, -1, 1, 1)))


@case("gain of channels: (1 - 0.5 g).view", x(2, 3, 3, 3), a=nn.Conv2d(3, 4, 1), g=torch.ones(4), d=nn.Conv2d(4, 2, 1))
def _(m, x):
    return m.d(F.softsign(m.a(x)) * (1 - 0.5 * m.g).view(1, -1, 1, 1))


@case("one gain for all: 1 + 0.1 g", x(3, 3), a=lin(3, 4), g=torch.tensor(1.0), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x)) * (1 + 0.1 * m.g))


@case("a norm's gain 1 + 0.1 g", x(3, 3), a=lin(3, 4), g=torch.ones(4), d=lin(4, 2))
def _(m, x):
    return m.d(F.layer_norm(m.a(x), [4], 1 + 0.1 * m.g, eps=0.3))


@case("weights times a number", x(3, 3), a=torch.ones(4, 3), b=torch.ones(4), d=torch.ones(4, 2))
def _(m, x):
    return F.relu(F.linear(x, m.a / 3**0.5, -0.1 * m.b)) @ (2 * m.d)


@case("gains chosen by data: 1 + g", x(4, 3), r=lin(3, 2), g=torch.ones(2, 3), d=lin(3, 2))
def _(m, x):
    return m.d(x * (1 + 0.5 * m.g[m.r(x).argmax(-1)]))


@case("tokens in an order made here", tokens(4, 3), e=nn.Embedding(6, 4), d=lin(4, 2))
def _(m, t):
    return m.d(F.relu(m.e(t))[:, torch.tensor([2, 0, 1])])


# ------------------------------------------------------------------------------- weights that meet the constant zero alone
PADDED = {
    "whole": lambda m, h: m.d(h),
    "in halves": lambda m, h: torch.cat([F.linear(h, m.d.weight[:2]), F.linear(h, m.d.weight[2:])], -1),
    "transposed": lambda m, h: h @ m.d.weight.T,
    "as einsum": lambda m, h: torch.einsum("bi,oi->bo", h, m.d.weight),
}
for title, read in PADDED.items():

    @case(f"columns that read padding: {title}", x(6, 3), a=lin(3, 3, True), d=lin(5, 4))
    def _(m, x, read=read):
        return F.softplus(read(m, F.pad(F.relu(m.a(x)), (1, 1))))


UNSCALED = {
    "padding": lambda x: F.pad(x, (1, 1)),
    "products with 0": lambda x: torch.cat([x[:, :1] * 0.0, x, 0 * x[:, 1:2]], -1),
}
for title, around in UNSCALED.items():

    @case(f"columns that read {title} of what does not scale", x(6, 3), d=lin(5, 4), e=lin(4, 2))
    def _(m, x, around=around):
        return m.e(F.relu(m.d(around(x))))


for title, shift in {"itself": lambda b: b, "in halves": lambda b: torch.cat([b[:2], b[2:]])}.items():

    @case(f"a shift of padding: {title}", x(6, 3), a=lin(3, 3), b=torch.ones(5), d=lin(5, 2))
    def _(m, x, shift=shift):
        return m.d(F.relu(F.pad(m.a(x), (1, 1)) + shift(m.b)))


@case("groups of which one reads zeros", x(6, 3), a=lin(3, 2), c=nn.Conv1d(4, 4, 1, groups=2), d=lin(4, 2))
def _(m, x):
    h = F.relu(m.a(x))
    return m.d(F.relu(m.c(torch.cat([h, torch.zeros_like(h)], -1).unsqueeze(-1))).flatten(1))


@case("weights that read zeros alone", x(6, 3), a=lin(3, 2), c=lin(2, 2, True), e=nn.Conv1d(2, 2, 1), d=lin(2, 2))
def _(m, x):
    zeros = torch.zeros_like(m.a(x))
    return m.d(F.relu(m.a(x) + m.c(zeros) + m.e(zeros.unsqueeze(-1)).squeeze(-1)))


@case("outer product with zeros", x(6, 3), a=lin(3, 2), g=torch.ones(3), d=lin(3, 2))
def _(m, x):
    h = F.pad(F.relu(m.a(x)), (1, 1))
    return m.d(torch.einsum("bi,j->bij", h, m.g).sum(1))
