"""Tensors whose sizes data decide: what is free there, on inputs that leave other numbers of rows, none and all included."""

import pytest
import torch
from torch import nn

import equinorm

pytestmark = pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 cannot export an index that data decides")
DIMENSION, HIDDEN = 4, 6


class Layers(nn.Module):
    """Two layers with something between that makes sizes of data."""

    def __init__(self, between, bias=True):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(DIMENSION, HIDDEN, bias), nn.Linear(HIDDEN, 3), between
        self.table = nn.Parameter(torch.randn(8, HIDDEN))
        self.chosen, self.gain = nn.Parameter(torch.randn(HIDDEN)), nn.Parameter(torch.randn(8, 1))

    def forward(self, x):
        return self.between(self, x, x[:, 0] > 0)


def rows(net, x, mask):
    return net.down(net.up(x[mask]).relu()).sum(0)


def hidden_rows(net, x, mask):
    return net.down(net.up(x).relu()[mask]).sum(0)


def put_back(net, x, mask):
    out = x.new_zeros(len(x), 3)
    out[mask] = net.down(net.up(x[mask]).relu())
    return out


def put_into_hidden(net, x, mask):
    hidden = net.up(x).relu()
    hidden[mask] = 2 * hidden[mask]
    return net.down(hidden)


def put_zeros(net, x, mask):
    hidden = net.up(x[mask]).relu()
    hidden[hidden[:, 0] > 1] = 0
    return net.down(hidden).sum(0)


def zeros_of_rows(net, x, mask):
    hidden = net.up(x[mask]).relu()
    return net.down(hidden.new_zeros(hidden.shape) + hidden).sum(0)


def edges(net, x, mask):
    pairs = torch.stack([torch.arange(len(x)), torch.arange(len(x)).flip(0)])[:, mask]
    hidden = net.up(x)
    gathered = torch.zeros_like(hidden).index_add(0, pairs[1], hidden.index_select(0, pairs[0]))
    return net.down(gathered.relu())


def self_loops(net, x, mask):
    """As graph convolutions add them: each row to itself, and to others that a mask leaves."""
    every = torch.arange(len(x)).repeat(2, 1)
    pairs = torch.cat([torch.stack([every[0], every[0].flip(0)])[:, mask], every], 1)
    degree = x.new_zeros(len(x)).scatter_add(0, pairs[1], x.new_ones(pairs.size(1)))
    hidden = net.up(x)
    message = hidden.index_select(0, pairs[0]) / degree[pairs[1]].unsqueeze(1)
    gathered = hidden.new_zeros(hidden.shape).scatter_add(0, pairs[1].unsqueeze(1).expand_as(message), message)
    return net.down(gathered.relu())


def entries(net, x, mask):
    hidden = net.up(x).relu()
    return net.down(hidden) + hidden[hidden > 0.5].sum()


def several_axes(net, x, mask):
    hidden = net.up(x).relu().view(2, -1, HIDDEN)
    return net.down(hidden[mask.view(2, -1)]).sum(0)


def second_axis(net, x, mask):
    hidden = net.up(x).relu().unsqueeze(0)
    return net.down(hidden[:, mask]).sum(1)


def flattened(net, x, mask):
    hidden = net.up(x[mask]).relu()
    return net.down(hidden.reshape(-1).reshape(-1, HIDDEN)).sum(0)


def pairs_of_channels(net, x, mask):
    hidden = net.up(x[mask]).relu()
    return net.down(hidden.view(-1, 2).flip(1).reshape(-1, HIDDEN)).sum(0)


def first_of_rows(net, x, mask):
    """A cut at a place that data decide: which rows of the table are read depends on it."""
    count = mask.sum().item()
    torch._check(count >= 0)
    torch._check(count <= 8)
    return net.down(net.up(x).relu()).sum(0) + (net.table[:count].relu() @ net.down.weight.t()).sum(0)


def narrowed(net, x, mask):
    count = mask.sum().item()
    torch._check(count >= 1)
    torch._check(count < 7)
    return net.down(net.up(x).relu()).sum(0) + (net.table.narrow(0, 1, count).relu() @ net.down.weight.t()).sum(0)


def shifted_cut(net, x, mask):
    """Rows of a table meet later rows of a gain: how much later, data decide."""
    count = mask[:7].sum().item()
    torch._check(count >= 0)
    torch._check(count < 8)
    return net.down(net.up(x).relu()).sum(0) + (net.table.narrow(0, 0, 1) * net.gain.narrow(0, count, 1)).mean(1)


def cut_by_channels(net, x, mask):
    """Channels that data choose."""
    count = mask[:HIDDEN].sum().item()
    torch._check(count >= 0)
    torch._check(count <= HIDDEN)
    hidden = net.up(x).relu()
    return net.down(hidden).sum(0) + hidden[:, :count].sum() * net.down.weight[0, 0]


def split(net, x, mask):
    """Each part has a way of its own, as in a mixture of experts."""
    count = mask.sum().item()
    torch._check(count >= 0)
    torch._check(count <= len(x))
    first, second = net.up(x).split([count, len(x) - count])
    return net.down(torch.cat([first.relu(), second.abs()])).sum(0)


def by_number(net, x, mask):
    count = mask.sum().item()
    return net.down(net.up(x).relu()) * count


def power_by_number(net, x, mask):
    """Of a degree that data decide."""
    return net.down(net.up(x).relu() ** mask.sum().item())


def chosen_rows(net, x, mask):
    """Each choice meets its own row only."""
    index = mask.nonzero().squeeze(1)
    return net.down((net.up(x[mask]) * net.table[index]).relu()).sum(0)


def with_known_rows(net, x, mask):
    return net.down(torch.cat([net.up(x[mask]), net.table, net.chosen[None]]).relu()).sum(0)


def normalized(net, x, mask):
    hidden = net.up(x[mask])
    return net.down(nn.functional.normalize(hidden, dim=0, eps=0).nan_to_num(0.0)).sum(0)


def softmax_of_rows(net, x, mask):
    hidden = net.up(x[mask])
    weights = torch.softmax(hidden @ net.chosen, 0)
    return net.down((weights.unsqueeze(1) * hidden).relu()).sum(0)


def without_bias_between(net, x, mask):
    return net.down(net.up(x[mask]).relu().cumsum(0)).sum(0)


def placed_at_positions(net, x, mask):
    hidden = net.up(x).relu()
    index = torch.arange(len(x))[mask]
    return net.down(hidden.index_select(0, index)).sum(0)


def repeated(net, x, mask):
    hidden = net.up(x[mask]).relu()
    return net.down(hidden.repeat(2, 1)).sum(0) + net.down(net.chosen.relu().expand(hidden.size(0), -1)).sum(0)


FREE = {
    rows: HIDDEN,
    hidden_rows: HIDDEN,
    put_back: HIDDEN,
    put_into_hidden: HIDDEN,
    put_zeros: HIDDEN - 1,  # a channel is compared with 1
    zeros_of_rows: HIDDEN,
    edges: HIDDEN,
    self_loops: HIDDEN,
    entries: 0,
    several_axes: HIDDEN,
    second_axis: HIDDEN,
    flattened: 1,  # as of an axis of unknown size all entries scale alike
    pairs_of_channels: 2,  # of an axis of unknown size all entries scale alike: first and second of each pair
    first_of_rows: HIDDEN,
    narrowed: HIDDEN,
    shifted_cut: HIDDEN + 1,  # all rows of the gain against the table's first
    cut_by_channels: 1,
    split: 0,  # that both parts have eight rows together is not known
    by_number: HIDDEN,
    power_by_number: 0,
    chosen_rows: 2 * HIDDEN,  # of layer and table
    with_known_rows: HIDDEN,
    normalized: HIDDEN,
    softmax_of_rows: HIDDEN,
    without_bias_between: HIDDEN,
    placed_at_positions: HIDDEN,
    repeated: HIDDEN,
}


def draws():
    """Inputs of which some rows are masked, none, and all."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(8, DIMENSION, generator=generator, dtype=torch.float64) for _ in range(5)]
    for sign, x in ((1, found[0]), (-1, found[1])):
        x[:, 0] = sign * x[:, 0].abs()
    return found


@pytest.mark.parametrize("between", FREE, ids=lambda between: between.__name__)
def test_scales_hold_for_other_numbers_of_rows(between):
    torch.manual_seed(0)
    net = Layers(between).double()
    example = torch.randn(8, DIMENSION, dtype=torch.float64)
    symmetries = equinorm.symmetries(net, (example,))
    runs = [x for x in draws() if between is not narrowed or 1 <= int((x[:, 0] > 0).sum()) < 7]
    before = [net(x) for x in runs]
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    for x, expected in zip(runs, before, strict=True):
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert symmetries.num_free == FREE[between]


PERMUTED = {
    put_zeros: HIDDEN - 1,
    entries: 0,
    several_axes: 0,  # masks of several axes have no law
    pairs_of_channels: HIDDEN // 2,
    shifted_cut: 2 * HIDDEN,  # and the columns of the table, which are averaged
    cut_by_channels: 0,
    power_by_number: 0,  # numbers that data decide have no law
    split: 0,
    with_known_rows: HIDDEN + 8,  # and the rows of the table, which are summed
}
"""Channels that can be permuted, where not all that are hidden."""


@pytest.mark.parametrize("between", FREE, ids=lambda between: between.__name__)
def test_permutations_and_signs_hold_for_other_numbers_of_rows(between, monkeypatch):
    torch.manual_seed(0)
    net = Layers(between).double()
    example = torch.randn(8, DIMENSION, dtype=torch.float64)
    runs = [x for x in draws() if between is not narrowed or 1 <= int((x[:, 0] > 0).sum()) < 7]
    before = [net(x) for x in runs]
    permutations = equinorm.permutations(net, (example,))
    permutations.permute_(permutations.random(torch.Generator().manual_seed(1)))
    for x, expected in zip(runs, before, strict=True):
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert permutations.num_channels == PERMUTED.get(between, HIDDEN)
    monkeypatch.setattr(torch.Tensor, "relu", torch.Tensor.tanh)  # of which signs go through
    before = [net(x) for x in runs]
    signs = equinorm.signs(net, (example,))
    signs.flip_(-torch.ones(signs.num_free))
    assert all(torch.equal(net(x), expected) for x, expected in zip(runs, before, strict=True))
