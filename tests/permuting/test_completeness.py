"""Discovery against brute force: every permutation that numbers show, on networks small enough to try them all."""

import pytest
import torch
from permutation_oracle import claimed, preserving
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A function of parameters and an input."""

    def __init__(self, function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def two_hidden(x, a, b, c):
    return torch.tanh(torch.tanh(x @ a) @ b) @ c


def residual(x, a, b, c, d):
    h = x @ a
    return (h + F.silu(h @ b) @ c) @ d


def tied(x, a, b):
    return torch.tanh(torch.tanh(x @ a) @ b) @ a.T


def concatenated(x, a, b, c):
    return torch.cat([F.gelu(x @ a), F.relu(x @ b)], -1) @ c


def gated(x, a, b):
    up, gate = (x @ a).chunk(2, -1)
    return (up * F.silu(gate)) @ b


def in_turns(x, a, b):
    """Gates and values one after the other, as GPT-OSS has them."""
    h = x @ a
    return (h[:, 1::2] * F.silu(h[:, ::2])) @ b


def attention(x, q, v, o):
    """Two heads of two channels; queries are their own keys."""
    heads, values = ((x @ w).unflatten(-1, (2, 2)).transpose(-2, -3) for w in (q, v))
    mixed = (heads @ heads.transpose(-1, -2)).softmax(-1) @ values
    return mixed.transpose(-2, -3).flatten(-2) @ o


def normalized(x, a, gain, b):
    return F.layer_norm(x @ a, (3,), gain) @ b


def grouped(x, a, b, c):
    """Two groups of two channels."""
    return F.conv1d(F.relu(F.conv1d(F.relu(F.conv1d(x[..., None], a)), b, groups=2)), c)[..., 0]


def shuffled(x, a, b):
    """Channels of two halves interleaved, of which the first two are read."""
    return F.gelu(x @ a).unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2)[..., :2] @ b


def pooled(x, a, b):
    return torch.tanh(x @ a).topk(2, -1).values @ b


def routed(x, router, up, down):
    """Every expert, weighed by a softmax."""
    weights = (x @ router).softmax(-1)
    return torch.einsum("be,beh,eho->bo", weights, torch.tanh(torch.einsum("bi,eih->beh", x, up)), down)


def chosen(x, router, up):
    """The best of three experts."""
    best = (x @ router).argmax(-1)
    return torch.einsum("bi,eio->beo", x, up)[torch.arange(len(x)), best]


def of_its_expert(x, router, up, down):
    """The best of two experts, whose weights are looked up."""
    best = (x @ router).argmax(-1)
    return (torch.tanh(x[:, None] @ up[best]) @ down[best]).squeeze(1)


def codebook(x, a, book, b):
    """The row of a table that is nearest to x @ a."""
    return F.embedding(torch.cdist(x @ a, book).argmin(-1), book) @ b


def own_order(x, router, up):
    """The best two of three experts, in an order of their own."""
    weights, index = (x @ router).softmax(-1).topk(2, -1, sorted=False)
    return (
        torch.einsum("bi,eio->beo", x, up).gather(1, index[..., None].expand(-1, -1, up.shape[2])) * weights[..., None]
    ).sum(1)


def in_two_ways(x, a, b, c):
    """Two times two channels, each with a gain of its own, joined and for a moment seen as two by two."""
    first, second = (x @ a).split(2, -1)
    return torch.tanh(torch.cat([first * b, second * c], -1).unflatten(-1, (2, 2)).flatten(1)) @ a.T


def pointwise(x, a, kernel, b):
    """Channels as positions of a convolution whose kernel sees one of them at a time."""
    return torch.tanh(F.conv1d((x @ a)[:, None], kernel)).sum(1) @ b


def windows(x, a, b):
    """Two channels at two positions, as patches and back, then padded and seen in windows of two."""
    patches = torch.tanh(F.unfold((x @ a).unflatten(-1, (2, 2, 1)), (2, 1), padding=(1, 0)))
    padded = F.pad(F.fold(patches, (2, 1), (2, 1), padding=(1, 0))[..., 0], (1, 0), value=0.5)
    return torch.tanh(padded.unfold(-1, 2, 1)).amax(-1).flatten(1) @ b


def written(x, a, b, c):
    """Two layers, written into one tensor."""
    both = torch.slice_scatter(x.new_zeros(len(x), 4), torch.tanh(x @ a), 1, 0, 2)
    return torch.slice_scatter(both, F.gelu(x @ b), 1, 2, 4) @ c


def written_by_place(x, a, b, c):
    """One channel of four replaced by that of another layer, one by a number, and one row of inputs by a weight."""
    hidden = torch.select_scatter(torch.tanh(x @ a), F.gelu(x @ b)[:, 0], 1, 3)
    hidden[:, 2] = 0.5
    hidden[1] = b[0, 1]
    return hidden @ c


NETWORKS = {
    two_hidden: ([(2, 2), (2, 3), (3, 2)], 0),
    residual: ([(2, 3), (3, 2), (2, 3), (3, 2)], 0),
    tied: ([(2, 3), (3, 3)], 0),
    concatenated: ([(2, 2), (2, 2), (4, 2)], 0),
    gated: ([(2, 4), (2, 2)], 0),
    in_turns: ([(2, 4), (2, 2)], 0),
    attention: ([(2, 4), (2, 4), (4, 2)], 0),
    normalized: ([(2, 3), (3,), (3, 2)], 0),
    grouped: ([(4, 2, 1), (4, 2, 1), (2, 4, 1)], 0),
    shuffled: ([(2, 4), (2, 2)], 2),
    pooled: ([(2, 4), (2, 2)], 0),
    routed: ([(2, 2), (2, 2, 2), (2, 2, 2)], 0),
    chosen: ([(2, 3), (3, 2, 2)], 0),
    of_its_expert: ([(2, 2), (2, 2, 2), (2, 2, 2)], 0),
    codebook: ([(2, 2), (3, 2), (2, 2)], 0),
    own_order: ([(2, 3), (3, 2, 2)], 0),
    pointwise: ([(2, 3), (2, 1, 1), (3, 2)], 0),
    windows: ([(2, 4), (4, 2)], 0),
    written: ([(2, 2), (2, 2), (4, 2)], 0),
    written_by_place: ([(2, 4), (2, 2), (4, 2)], 2),
    in_two_ways: ([(2, 4), (2,), (2,)], 2),
}
"""Shapes of the weights, and how many permutations are missed: of channels that are interleaved, then cut; of those that
are overwritten, each by something else; of those of two layers that are joined, then seen as a product: they are permuted
alike.
"""


@pytest.mark.parametrize("function", NETWORKS, ids=lambda function: function.__name__)
def test_every_permutation_is_found_or_known_to_be_missed(function):
    shapes, missed = NETWORKS[function]
    torch.manual_seed(0)
    inputs = (torch.randn(3, 4, 2, dtype=torch.float64) if function is attention else torch.randn(5, 2, dtype=torch.float64),)
    model = Net(function, *shapes)
    there, found = preserving(model, inputs), claimed(model, inputs)
    assert found <= there
    assert len(there - found) == missed
