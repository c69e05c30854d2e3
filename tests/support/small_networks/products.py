"""Gates, attention, embeddings, shared weights and several outputs."""

import math

import torch
from torch import nn

from small_networks.cases import case, conv, lin, tokens, x

F = nn.functional

# ----------------------------------------------------------------------------------------------------------------- gates


@case("squeeze and excite", x(2, 2, 3, 3), a=conv(2, 3), s=conv(3, 2, 1), e=conv(2, 3, 1), d=conv(3, 2, 1))
def _(m, x):
    h = F.relu(m.a(x))
    return m.d(h * torch.sigmoid(m.e(F.relu(m.s(F.adaptive_avg_pool2d(h, 1))))))


@case("glu", x(3, 3), a=lin(3, 8), d=lin(4, 2))
def _(m, x):
    return m.d(F.glu(m.a(x)))


@case("swiglu, split", x(3, 3), g=lin(3, 4), u=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(F.silu(m.g(x)) * m.u(x))


@case("swiglu, fused", x(3, 3), a=lin(3, 8, True), d=lin(4, 2))
def _(m, x):
    gate, up = m.a(x).chunk(2, -1)
    return m.d(F.silu(gate) * up)


@case("bilinear gate", x(3, 3), g=lin(3, 4), u=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(m.g(x) * m.u(x))


@case("input times gate", x(3, 3), g=lin(3, 4), u=lin(4, 3), d=lin(3, 2))
def _(m, x):
    return m.d(x * m.u(F.relu(m.g(x))))


@case("residual bilinear gate", x(3, 3), a=lin(3, 4), g=lin(4, 4), u=lin(4, 4), d=lin(4, 2))
def _(m, x):
    h = m.a(x)
    return m.d(h + m.g(h) * m.u(h))


@case("squared relu", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x)).square())


@case("squared relu with residual", x(3, 3), s=lin(3, 4), a=lin(4, 5), b=lin(5, 4), d=lin(4, 2))
def _(m, x):
    h = m.s(x)
    return m.d(h + m.b(F.relu(m.a(h)).pow(2)))


@case("square root", x(3, 3), a=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d((m.a(x).abs() + 0).sqrt())


@case("quotient", x(3, 3), a=lin(3, 4), b=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(m.a(x) / m.b(x).abs().mean(0))


@case("nn.Bilinear", x(3, 3), a=lin(3, 2), b=lin(3, 4), w=nn.Bilinear(2, 4, 3, bias=False), d=lin(3, 2))
def _(m, x):
    return m.d(F.relu(m.w(m.a(x), F.relu(m.b(x)))))


@case("low rank adapter", x(3, 3), w=lin(3, 4), a=lin(3, 2), b=lin(2, 4), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.w(x) + 0.5 * m.b(m.a(x))))


@case("stacked experts", x(2, 3, 4), a=torch.zeros(2, 4, 3), b=torch.zeros(2, 3, 2))
def _(m, x):
    return torch.bmm(F.relu(torch.bmm(x, m.a)), m.b)


@case("mixture of experts", x(3, 4), r=lin(4, 2), a=torch.zeros(2, 4, 3), b=torch.zeros(2, 3, 2))
def _(m, x):
    h = F.relu(torch.einsum("ni,eij->nej", x, m.a))
    return torch.einsum("nej,ejo,ne->no", h, m.b, m.r(x).softmax(-1))


@case("functional weights", x(3, 3), a=torch.zeros(3, 4), b=torch.zeros(4), c=torch.zeros(4, 2))
def _(m, x):
    return torch.addmm(torch.ones(2, dtype=x.dtype), F.relu(x @ m.a + m.b), m.c)


# ------------------------------------------------------------------------------------------------------------- attention


def heads(h, count: int):
    return h.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))).softmax(-1) @ v


@case("attention by hand", x(2, 3, 3), q=lin(3, 4, True), k=lin(3, 4), v=lin(3, 4, True), o=lin(4, 2))
def _(m, x):
    return m.o(attend(heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2)).transpose(1, 2).flatten(2))


@case("attention, fused qkv", x(2, 3, 3), qkv=lin(3, 12), o=lin(4, 2))
def _(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    return m.o(attend(q, k, v).transpose(1, 2).flatten(2))


@case("sdpa, causal", x(2, 3, 3), q=lin(3, 4), k=lin(3, 4), v=lin(3, 4), o=lin(4, 2))
def _(m, x):
    h = F.scaled_dot_product_attention(heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2), is_causal=True)
    return m.o(h.transpose(1, 2).flatten(2))


@case("sdpa, grouped queries", x(2, 3, 3), q=lin(3, 8), k=lin(3, 4), v=lin(3, 4), o=lin(8, 2))
def _(m, x):
    h = F.scaled_dot_product_attention(heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2), enable_gqa=True)
    return m.o(h.transpose(1, 2).flatten(2))


@case("grouped queries, repeated keys", x(2, 3, 3), q=lin(3, 8), k=lin(3, 4), v=lin(3, 4), o=lin(8, 2))
def _(m, x):
    k, v = (heads(h, 2).repeat_interleave(2, 1) for h in (m.k(x), m.v(x)))
    return m.o(attend(heads(m.q(x), 4), k, v).transpose(1, 2).flatten(2))


@case("grouped queries, expanded keys", x(2, 3, 3), q=lin(3, 8), k=lin(3, 4), v=lin(3, 4), o=lin(8, 2))
def _(m, x):
    k, v = (heads(h, 2)[:, :, None].expand(2, 2, 2, 3, 2).reshape(2, 4, 3, 2) for h in (m.k(x), m.v(x)))
    return m.o(attend(heads(m.q(x), 4), k, v).transpose(1, 2).flatten(2))


@case(
    "einsum attention",
    x(2, 3, 3),
    q=torch.zeros(3, 2, 2),
    k=torch.zeros(3, 2, 2),
    v=torch.zeros(3, 2, 2),
    o=torch.zeros(2, 2, 2),
)
def _(m, x):
    q, k, v = (torch.einsum("bti,ihd->bthd", x, w) for w in (m.q, m.k, m.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd,hdo->bqo", scores, v, m.o)


@case("linear attention", x(2, 3, 3), q=lin(3, 4), k=lin(3, 4), v=lin(3, 4), o=lin(4, 2))
def _(m, x):
    return m.o(m.q(x) @ (m.k(x).transpose(1, 2) @ m.v(x)))


@case("attention pooling with a learned query", x(2, 3, 3), s=torch.zeros(4), k=lin(3, 4), v=lin(3, 4), o=lin(4, 2))
def _(m, x):
    weights = (m.k(x) @ m.s).softmax(-1)
    return m.o((weights[..., None] * m.v(x)).sum(1))


def rotate(h):
    positions = torch.arange(h.size(-2), dtype=h.dtype)[:, None] * torch.tensor([1.0, 0.3], dtype=h.dtype)
    angles = torch.cat([positions, positions], -1)
    first, second = h.chunk(2, -1)
    return h * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


@case("rotary embedding", x(2, 3, 3), q=lin(3, 8), k=lin(3, 8), v=lin(3, 4), o=lin(4, 2))
def _(m, x):
    return m.o(attend(rotate(heads(m.q(x), 2)), rotate(heads(m.k(x), 2)), heads(m.v(x), 2)).transpose(1, 2).flatten(2))


@case(
    "query and key norms",
    x(2, 3, 3),
    q=lin(3, 4),
    k=lin(3, 4),
    v=lin(3, 4),
    g=nn.RMSNorm(4, eps=0.1),
    h=nn.RMSNorm(4, eps=0.1),
    o=lin(4, 2),
)
def _(m, x):
    return m.o(attend(m.g(m.q(x)), m.h(m.k(x)), m.v(x)))


@case("nn.MultiheadAttention", x(2, 3, 4), n=nn.LayerNorm(4), a=nn.MultiheadAttention(4, 2, batch_first=True), d=lin(4, 2))
def _(m, x):
    h = m.n(x)
    return m.d(F.relu(m.a(h, h, h, need_weights=False)[0]))


@case(
    "transformer block",
    x(2, 3, 3),
    s=lin(3, 4),
    n=nn.RMSNorm(4, eps=0.1),
    q=lin(4, 4),
    k=lin(4, 4),
    v=lin(4, 4),
    o=lin(4, 4),
    u=lin(4, 3),
    g=lin(4, 3),
    w=lin(3, 4),
    d=lin(4, 2),
)
def _(m, x):
    h = m.s(x)
    n = m.n(h)
    h = h + m.o(attend(heads(m.q(n), 2), heads(m.k(n), 2), heads(m.v(n), 2)).transpose(1, 2).flatten(2))
    h = h + m.w(F.silu(m.g(h)) * m.u(h))
    return m.d(h)


# ----------------------------------------------------------------------------------------- embeddings, sharing, outputs


@case("embedding", tokens(6, 3), e=nn.Embedding(6, 4), d=lin(4, 3), o=lin(3, 2))
def _(m, t):
    return m.o(F.relu(m.d(F.relu(m.e(t)))))


@case("embedding and head tied", tokens(6, 3), e=nn.Embedding(6, 3), a=lin(3, 3))
def _(m, t):
    return F.linear(F.relu(m.a(m.e(t))), m.e.weight)


@case("positions and class token", x(2, 2, 3), a=lin(3, 4), c=torch.zeros(1, 1, 4), p=torch.zeros(3, 4), d=lin(4, 2))
def _(m, x):
    h = torch.cat([m.c.expand(2, -1, -1), m.a(x)], 1) + m.p
    return m.d(F.relu(h)[:, 0])


@case("module called twice", x(3, 3), a=lin(3, 4), b=lin(4, 4), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.b(F.relu(m.b(F.relu(m.a(x)))))))


@case("module called on two branches", x(3, 3), x(3, 3), a=lin(3, 4), d=lin(8, 2))
def _(m, x, y):
    return m.d(F.relu(torch.cat([m.a(x), m.a(y)], -1)))


@case("weight and its transpose", x(3, 3), w=torch.zeros(4, 3))
def _(m, x):
    return F.linear(F.relu(F.linear(x, m.w)), m.w.T)


@case("bias tied to a gain", x(3, 3), a=lin(3, 4), g=torch.ones(4), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x) * m.g + m.g))


@case("two gains", x(3, 3), a=lin(3, 4), g=torch.ones(4), h=torch.ones(4), d=lin(4, 2))
def _(m, x):
    return m.d(m.h * F.relu(m.a(x) * m.g.exp() * 1.5))


@case("scalar gain", x(3, 3), a=lin(3, 4), g=torch.tensor(1.0), d=lin(4, 2))
def _(m, x):
    return m.d(m.g * F.relu(m.a(x)))


@case("intermediate result returned", x(3, 3), a=lin(3, 4), b=lin(4, 4), d=lin(4, 2))
def _(m, x):
    h = F.relu(m.b(F.relu(m.a(x))))
    return m.d(h), h[:, :2]


@case("unused outputs", x(3, 3), a=lin(3, 6), d=lin(3, 2))
def _(m, x):
    return m.d(F.relu(m.a(x))[:, ::2])


@case("recurrence unrolled", x(2, 3, 3), i=lin(3, 4, True), r=lin(4, 4), o=lin(4, 2))
def _(m, x):
    h = F.relu(m.i(x[:, 0]))
    for step in (1, 2):
        h = F.relu(m.i(x[:, step]) + m.r(h))
    return m.o(h)


@case("generated weights", x(3, 3), x(4, 2), a=lin(3, 4), g=lin(2, 4), d=lin(4, 2))
def _(m, x, y):
    return m.d(F.relu(m.a(x)) @ F.relu(m.g(y)))


@case("masked and selected", x(3, 3), a=lin(3, 4), b=lin(3, 4), d=lin(4, 2))
def _(m, x):
    h = torch.where(x.sum(-1, keepdim=True) > 0, m.a(x), m.b(x))
    return m.d(h.masked_fill(x[:, :1] > 0.5, 0.0))


# ------------------------------------------------------------------------------------------------- transposed parameters


@case("parameters transposed", x(3, 3), a=x(4, 3), b=x(5, 4), d=x(2, 5))
def _(m, x):
    return F.relu(F.relu(x @ m.a.t()) @ m.b.T) @ m.d.transpose(0, 1)


@case("parameters transposed twice, with size 1", x(3, 3), a=x(1, 4, 3), d=x(4, 2))
def _(m, x):
    return F.relu(x @ m.a.mT.squeeze(0)) @ m.d.t().unsqueeze(0).permute(2, 0, 1).squeeze(1)


@case("parameters flipped", x(3, 3), a=x(4, 3), d=x(2, 4))
def _(m, x):
    return F.relu(x @ m.a.t().flip(1)) @ m.d.tril().t()


@case("a parameter and its transpose", x(3, 4), a=x(4, 4), d=x(4, 2))
def _(m, x):
    return F.relu(F.relu(x @ m.a.t()) @ m.a) @ m.d


# --------------------------------------------------------------------------------------------------- mixtures of experts


def route(m, x):
    """Each row's best expert, and its weight."""
    weights, experts = torch.softmax(m.r(x), -1).max(-1)
    return weights[:, None], experts


@case("experts", x(6, 3), r=lin(3, 2), u=x(2, 4, 3), d=x(2, 3, 4), o=lin(3, 2))
def _(m, x):
    weights, experts = route(m, x)
    h = F.relu(torch.bmm(m.u[experts], x.unsqueeze(-1)).squeeze(-1))
    return m.o(weights * torch.bmm(m.d[experts], h.unsqueeze(-1)).squeeze(-1))


@case("experts with gates and biases", x(6, 3), r=lin(3, 2), u=x(2, 3, 8), b=x(2, 8), d=x(2, 4, 2), e=x(2, 2))
def _(m, x):
    weights, experts = route(m, x)
    gate, up = (torch.bmm(x[:, None], m.u[experts]).squeeze(1) + m.b[experts]).chunk(2, -1)
    return weights * (torch.bmm((F.silu(gate) * up)[:, None], m.d.index_select(0, experts)).squeeze(1) + m.e[experts])


@case("experts, two for each row", x(3, 3), r=lin(3, 3), u=x(3, 4, 3), d=x(3, 2, 4))
def _(m, x):
    weights, experts = torch.softmax(m.r(x), -1).topk(2, -1)
    experts, rows = experts.reshape(-1), x.repeat_interleave(2, 0)
    h = F.relu(torch.bmm(m.u[experts], rows[..., None])[..., 0]).square()
    found = torch.bmm(m.d[experts], h[..., None])[..., 0] * weights.reshape(-1, 1)
    return found.view(3, 2, 2).sum(1)


@case("experts summed before they are used", x(4, 3), r=lin(3, 2), u=x(2, 4, 3), d=lin(4, 2))
def _(m, x):
    _, experts = route(m, x)
    return m.d(F.relu(torch.bmm(m.u[experts], x.unsqueeze(-1)).squeeze(-1)).sum(0))


@case("experts by two indices", x(4, 3), r=lin(3, 2), q=lin(3, 2), u=x(2, 4, 3), d=x(2, 2, 4))
def _(m, x):
    _, experts = route(m, x)
    h = F.relu(torch.bmm(m.u[experts], x.unsqueeze(-1)).squeeze(-1))
    return torch.bmm(m.d[m.q(x).argmax(-1)], h.unsqueeze(-1)).squeeze(-1)


@case("experts of neighbours", x(4, 3), r=lin(3, 2), u=x(2, 4, 3), d=x(2, 2, 4))
def _(m, x):
    _, experts = route(m, x)
    h = F.relu(torch.bmm(m.u[experts], x.unsqueeze(-1)).squeeze(-1))
    return torch.bmm(m.d[experts], h.roll(1, 0).unsqueeze(-1)).squeeze(-1)


@case("rows chosen from an activation", x(4, 3), a=lin(3, 4), d=lin(4, 2), r=lin(3, 4))
def _(m, x):
    h = F.relu(m.a(x))
    return m.d(h.t()[m.r(x).argmax(-1)])


@case("experts, rows cut apart", x(4, 3), r=lin(3, 2), u=x(2, 5, 3), d=x(2, 3, 5))
def _(m, x):
    _, experts = route(m, x)
    h = F.relu(torch.bmm(m.u[experts][:2], x[:2, :, None]))
    return torch.bmm(m.d[experts][-2:], h)


@case("chosen gains, cut apart", x(4, 3), r=lin(3, 2), a=x(2, 3), b=x(2, 3), d=lin(3, 2))
def _(m, x):
    _, experts = route(m, x)
    return m.d(x[:2] * m.a[experts][:2] * m.b[experts][-2:])


@case("chosen from tables of two sizes", x(4, 3), r=lin(3, 2), a=x(2, 3), b=x(5, 3), d=lin(3, 2))
def _(m, x):
    _, experts = route(m, x)
    return m.d(x * m.a[experts] * m.b[experts])


@case("one row chosen", x(4, 3), r=lin(3, 2), a=x(2, 3), d=lin(3, 2))
def _(m, x):
    _, experts = route(m, x)
    return m.d(x[0] * m.a[experts[:1]].squeeze(0)), m.a[experts].split([2, 2])[1] * m.a[experts][3]


@case("chosen, narrowed and split", x(4, 3), r=lin(3, 2), a=x(2, 4), u=lin(3, 4), d=lin(4, 2))
def _(m, x):
    _, experts = route(m, x)
    first, second = m.a[experts].narrow(0, 1, 3).split([1, 2])
    return m.d(F.relu(m.u(x[:2])) * second), first.sum() * 0


# ------------------------------------------------------------------------------------------ messages between nodes of a graph
SOURCE, TARGET = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([1, 0, 2, 3, 0])


@case("messages, summed", x(4, 3), a=lin(3, 5), m=lin(5, 4), s=lin(5, 4), d=lin(4, 2))
def _(m, x):
    h = F.relu(m.a(x))
    sums = torch.zeros(4, 4, dtype=x.dtype).index_add_(0, TARGET, m.m(h[SOURCE]))
    return m.d(F.relu(sums + m.s(h)))


@case("messages, largest and mean", x(4, 3), a=lin(3, 5), m=lin(5, 4), d=lin(8, 2))
def _(m, x):
    messages = F.relu(m.m(F.relu(m.a(x))[SOURCE]))
    places, start = TARGET[:, None].expand(-1, 4), torch.zeros(4, 4, dtype=x.dtype)
    gathered = [start.scatter_reduce(0, places, messages, how, include_self=False) for how in ("amax", "mean")]
    return m.d(torch.cat(gathered, 1))


@case("experts, added where they belong", x(4, 3), r=lin(3, 2), u=x(2, 5, 3), d=x(2, 4, 5), o=lin(4, 2))
def _(m, x):
    order = m.r(x).argmax(-1).argsort()
    h = F.relu(torch.einsum("td,efd->etf", x[order], m.u))
    sums = torch.zeros(4, 4, dtype=x.dtype).index_add_(0, order, torch.einsum("etf,edf->td", h, m.d))
    return m.o(F.relu(sums))


@case("zeros written by a mask", x(4, 3), a=lin(3, 5), d=lin(5, 2))
def _(m, x):
    h = m.a(x)
    h[h < 0] = 0.0
    return m.d(h)


@case("distances", x(4, 3), a=lin(3, 5), d=lin(4, 2))
def _(m, x):
    h = F.relu(m.a(x))
    return m.d(torch.cdist(h, h[:4]) / 3)
