"""What chooses among entries that may be equal tells which came first; nothing may be permuted then."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equinorm


class Chosen(nn.Module):
    """Rows of a table, chosen by scores."""

    def __init__(self, choose) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Linear(6, 8) for _ in range(3))
        self.table, self.longer = (nn.Parameter(torch.randn(rows, 4)) for rows in (8, 10))
        self.choose = choose

    def forward(self, x):
        return self.choose(self, self.one(x), x)


def mask(net, x):
    """Four of eight places are open."""
    scores = net.two(x)
    return torch.zeros_like(scores).scatter(1, scores.topk(4).indices, 1.0) == 1


def rows(net, scores):
    """Six numbers for each of eight scores."""
    return scores[:, :, None] * net.two.weight


def shares(x):
    return x / x.sum(-1, keepdim=True)


def centred(x):
    return x - x.mean(-1, keepdim=True)


def gated(net, scores):
    """Products, which two values are made into: written down anew by each who reads them."""
    return rows(net, scores).softmax(-1) * net.two.weight.exp()


def inside(net, scores, x):
    with torch.no_grad():
        return net.table[scores.relu().argmax(-1)]


def outside(net, scores, x):
    scores = (scores - 1.5).relu()
    with torch.no_grad():
        place = scores.argmax(-1)
    return net.table[place]


EQUAL = {
    "votes are counted": lambda n, s, x: n.table[F.one_hot(s.view(16, 4, 8).argmax(-1), 8).double().sum(1).argmax(-1)],
    "shares of votes": lambda n, s, x: n.table[
        (s.view(16, 4, 8).argmax(-1, keepdim=True) == torch.arange(8)).double().mean(1).argmax(-1)
    ],
    "two masks": lambda n, s, x: n.table[
        s.masked_fill(~mask(n, x), -torch.inf).masked_fill(n.three(x).topk(4).values[:, 3:] > n.three(x), -torch.inf).topk(3)[1]
    ].sum(1),
    "the sign is turned behind a mask": lambda n, s, x: n.table[s.masked_fill(mask(n, x), -torch.inf).neg().argmax(-1)],
    "gates of cut scores": lambda n, s, x: n.table[((s - 1.5).relu() * n.two(x).sigmoid()).argmax(-1)],
    "squares of cut scores": lambda n, s, x: n.table[(s - 1.5).relu().square().argmax(-1)],
    "shares of cut scores": lambda n, s, x: n.table[((s - 1.5).relu() / (s.relu().sum(-1, keepdim=True) + 1)).argmax(-1)],
    "larger than nothing": lambda n, s, x: n.table[torch.maximum(s - 1.5, torch.zeros_like(s)).argmax(-1)],
    "whole numbers": lambda n, s, x: n.table[torch.div(s, 0.5, rounding_mode="floor").argmax(-1)],
    "signs multiplied by signs": lambda n, s, x: n.table[F.linear(x.sign(), n.one.weight.sign()).argmax(-1)],
    "the largest of cut groups": lambda n, s, x: n.longer[(s - 1.5).relu().view(-1, 4, 2).amax(-1).argmax(-1)],
    "the same for all": lambda n, s, x: n.table[((s - 1.5).relu() + n.two(x)[:, :1]).argmax(-1)],
    "padded": lambda n, s, x: n.longer[F.pad(s - 1, (0, 2)).argmax(-1)],
    "written at places": lambda n, s, x: n.table[torch.zeros_like(s).scatter(1, s.topk(2)[1], s.topk(2)[0]).topk(4)[1]].sum(1),
    "a stack": lambda n, s, x: n.table[torch.stack([s, n.two(x)], -1).argmax(-1)].sum(1),
    "whole numbers behind a mask": lambda n, s, x: n.table[torch.where(mask(n, x), (s * 10).long(), float("-inf")).argmax(-1)],
    "cut in a subgraph": inside,
    "cut outside of a subgraph": outside,
    "chosen twice in an order of their own": lambda n, s, x: s.topk(6, sorted=False)[0].topk(3, sorted=False)[0] @ n.longer[:3],
    "sums of softmax": lambda n, s, x: n.table[rows(n, s).softmax(-1).sum(-1).argmax(-1)],
    "products of softmax with ones": lambda n, s, x: n.table[(rows(n, s).softmax(-1) @ torch.ones(6).double()).topk(3)[1]].sum(
        1
    ),
    "shares of a sum": lambda n, s, x: n.table[shares(rows(n, s).exp()).mean(-1).argmax(-1)],
    "norms of what is normalized": lambda n, s, x: n.table[F.normalize(rows(n, s), dim=-1).pow(2).sum(-1).argmax(-1)],
    "means of layer norm": lambda n, s, x: n.table[F.layer_norm(rows(n, s), (6,)).mean(-1).argmax(-1)],
    "means of what is centred": lambda n, s, x: n.table[centred(rows(n, s)).sum(-1).argmax(-1)],
    "shares of a sum, both written down": lambda n, s, x: n.table[
        (gated(n, s) / gated(n, s).sum(-1, keepdim=True)).sum(-1).argmax(-1)
    ],
    "nothing left of two layers": lambda n, s, x: n.table[(n.one(x) - n.one(x)).argmax(-1)],
    "softmax of one": lambda n, s, x: n.table[s[..., None].softmax(-1)[..., 0].argmax(-1)],
    "nothing left": lambda n, s, x: n.table[(s - s.clone()).argmax(-1)],
    "directions of single numbers": lambda n, s, x: n.table[F.normalize(s[..., None], dim=-1)[..., 0].argmax(-1)],
    "cosines of single numbers": lambda n, s, x: n.table[
        F.cosine_similarity(s[..., None], n.two(x)[..., None], dim=-1).topk(2)[1]
    ].sum(1),
    "products of directions": lambda n, s, x: n.table[
        F.linear(F.normalize(x[:, :1], dim=-1), F.normalize(n.one.weight[:, :1], dim=-1)).argmax(-1)
    ],
    "signs by roots of squares": lambda n, s, x: n.table[(s / s.square().sqrt()).argmax(-1)],
    "signs by reciprocals": lambda n, s, x: n.table[(s * s.abs().reciprocal()).sort(-1)[1][:, 0]],
    "rounded, with the gradient of what is not": lambda n, s, x: n.table[(s + (s.round() - s).detach()).argmax(-1)],
    "the smaller of a score and the mean": lambda n, s, x: n.table[torch.minimum(s, s.mean(-1, keepdim=True)).argmax(-1)],
    "deviations of single numbers": lambda n, s, x: n.table[s[..., None].std(-1, correction=0).argmax(-1)],
    "groups of one channel": lambda n, s, x: n.table[F.group_norm(s, 8).argmax(-1)],
    "twice the same": lambda n, s, x: n.table[torch.cat([s[:, :4], s[:, :4]], -1).topk(3)[1]].sum(1),
    "large scores in a sigmoid": lambda n, s, x: n.table[(1000 * s).sigmoid().argmax(-1)],
    "a number times its reciprocal": lambda n, s, x: n.table[(s * s.reciprocal()).argmax(-1)],
    "squares of sine and cosine": lambda n, s, x: n.table[(s.sin() ** 2 + s.cos() ** 2).argmax(-1)],
    "one number in order": lambda n, s, x: n.table * s.sum().sort()[0],
}


@pytest.mark.parametrize("name", EQUAL)
def test_no_member_computes_something_else(name):
    net, x = Chosen(EQUAL[name]).double().eval(), torch.randn(64, 6, dtype=torch.float64)
    wanted = net(x)
    for seed in (1, 2):
        moved = copy.deepcopy(net)
        found = equinorm.permutations(moved, (x,))
        found.permute_(found.random(torch.Generator().manual_seed(seed)))
        torch.testing.assert_close(moved(x), wanted, rtol=1e-12, atol=1e-12)


DIFFERENT = {
    "scores and biases": lambda n, s, x: n.table[(s.sigmoid() + n.table[:, 0]).argmax(-1)],
    "shares of another sum": lambda n, s, x: n.table[
        (gated(n, s) / gated(n, n.two(x)).sum(-1, keepdim=True)).sum(-1).argmax(-1)
    ],
    "gates": lambda n, s, x: n.table[(s.softmax(-1) * n.two(x).sigmoid() / 2).argmax(-1)],
    "one share of a softmax": lambda n, s, x: n.table[rows(n, s).softmax(-1)[..., 0].argmax(-1)],
    "weighted shares": lambda n, s, x: n.table[(rows(n, s).softmax(-1) @ n.three.weight[0]).argmax(-1)],
    "cut scores with scores": lambda n, s, x: n.table[(s.relu() + n.two(x)).argmax(-1)],
    "noise": lambda n, s, x: n.table[(s + n.two(x) * F.softplus(n.three(x))).argmax(-1)],
    "softmax, written down": lambda n, s, x: n.table[
        ((s - s.amax(-1, keepdim=True)).exp() / (s - s.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)).argmax(-1)
    ],
    "distances": lambda n, s, x: n.table[(n.table.square().sum(-1) - 2 * x[:, :4] @ n.table.t()).argmin(-1)],
    "directions of rows": lambda n, s, x: n.table[
        F.linear(F.normalize(x, dim=-1), F.normalize(n.one.weight, dim=-1)).argmax(-1)
    ],
    "centred": lambda n, s, x: n.table[centred(s).argmax(-1)],
    "layer norm": lambda n, s, x: n.table[F.layer_norm(s, (8,)).argmax(-1)],
    "one mask": lambda n, s, x: n.table[s.masked_fill(~mask(n, x), -torch.inf).topk(4)[1]].sum(1),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_entries_name_what_they_choose(name):
    net, x = Chosen(DIFFERENT[name]).double().eval(), torch.randn(64, 6, dtype=torch.float64)
    found = equinorm.permutations(net, (x,))
    assert any(family.size == 8 for family in found.families)
    wanted = net(x)
    found.permute_(found.random(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(net(x), wanted, rtol=1e-12, atol=1e-12)
