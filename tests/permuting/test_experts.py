"""Experts that a router chooses are permuted with its rows; indices that say more than which expert pin them."""

import contextlib
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import equinorm

with contextlib.suppress(ImportError):  # not while something is exported: it would not register what its models return
    importlib.import_module("transformers.integrations.moe")

EXPERTS, INTO, INNER = 5, 6, 4


class Mixture(nn.Module):
    """A router, experts in tensors of three axes, and a way from scores to outputs.

    Args:
        choose: given the module, an input and scores of shape (places, experts).
        experts: how many.
    """

    def __init__(self, choose: Callable[["Mixture", Tensor, Tensor], Tensor], experts: int = EXPERTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.choose = nn.Linear(INTO, experts), choose
        self.up = nn.Parameter(torch.randn(experts, 2 * INNER, INTO))
        self.down = nn.Parameter(torch.randn(experts, INTO, INNER))
        self.bias = nn.Parameter(torch.randn(experts, INTO))
        self.gain, self.places = nn.Parameter(torch.randn(INNER)), nn.Parameter(torch.randn(40, INNER))

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self, x, self.router(x).softmax(-1))

    def of(self, x: Tensor, index: Tensor) -> Tensor:
        """What the experts of an index, of shape (places,), make of one input each."""
        gate, value = (self.up[index] @ x[:, :, None]).squeeze(-1).chunk(2, -1)
        return (self.down[index] @ (nn.functional.silu(gate) * value)[:, :, None]).squeeze(-1) + self.bias[index]


def largest(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    weights, index = scores.max(-1, keepdim=True)
    return m.of(x, index[:, 0].to(torch.int32)) * weights


def sorted_scores(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    values, index = scores.sort(-1, descending=True)
    return m.of(x, index[:, 1]) * values[:, 1:2]


def gathered(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = (scores + 0.1 * scores.sin()).topk(2, -1).indices
    weights = scores.gather(1, index)
    return sum(m.of(x, index.select(1, k)) * weights[:, k : k + 1] for k in range(2))


def scattered(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    weights, index = scores.topk(2, -1)
    kept = torch.zeros_like(scores).scatter(1, index, weights)
    h = torch.einsum("eoi,bi->beo", m.up, x)[:, :, :INNER].tanh()
    return torch.einsum("eoi,bei,be->bo", m.down, h, kept)


def selected(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return m.bias.index_select(0, scores.argmax(-1)) * x


def cut_and_joined(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    first, second = (m.up[index] @ x[:, :, None]).tanh().squeeze(-1).chunk(2)
    return (m.down[index] @ torch.cat([first, second])[:, :INNER, None]).squeeze(-1)


FOUND = {f.__name__: f for f in (largest, sorted_scores, gathered, scattered, selected, cut_and_joined)}


def next_one(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return m.of(x, (scores.argmax(-1) + 1) % EXPERTS)


def first_or_not(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    return m.of(x, index) * (1 + (index == 0))[:, None]


def as_numbers(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    return m.of(x, index) + index[:, None].to(x.dtype)


def names_of_names(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    order = scores.topk(3, -1).indices
    return m.of(x, order.gather(1, (order[:, :1] > 2).long())[:, 0])


def pairs(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    return m.of(x, index) + m.down[index, index][:, :1]


def of_other_places(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return m.of(x, scores[:, :3].argmax(-1))


def of_one_place(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return m.of(x, scores.sum(-1, keepdim=True).argmax(-1))


def written(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    kept = torch.arange(EXPERTS, dtype=x.dtype).expand(len(x), EXPERTS).scatter(1, scores.argmax(-1, keepdim=True), 0.0)
    return (kept @ m.bias) * x


def by_numbers(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return (m.down.index_select(0, (scores[:, 0] * 20).long() % EXPERTS) @ x[:, :INNER, None]).squeeze(-1)


PINNED = (by_numbers, next_one, first_or_not, as_numbers, names_of_names, pairs, of_other_places, of_one_place, written)


def rectified(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return m.of(x, torch.cat([scores - 0.3, scores]).relu().chunk(2)[0].topk(2, -1).indices[:, 1])


def compared(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return m.of(x, (scores > 0.2).to(x.dtype).argmax(-1))


def one_for_all(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return m.of(x, scores[:, :1].expand(-1, EXPERTS).max(-1).indices)


@pytest.mark.parametrize("choose", [rectified, compared, one_for_all], ids=lambda choose: choose.__name__)
def test_scores_that_are_often_equal_pin(choose):
    found, apart = moved(*network(choose))
    assert apart <= 1e-12
    assert all(("2.down", 0) not in places for places in found.spec().perm_to_axes.values())


def unsorted_values(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return x * (scores.topk(4, -1, sorted=False).values @ torch.arange(4, dtype=x.dtype))[:, None]


def last_of_several(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    each = torch.einsum("eoi,bo->bie", m.down, x)
    return torch.zeros_like(scores).scatter(1, each.argmax(-1), each.sum(-1)) @ m.bias


@pytest.mark.parametrize("choose", [unsorted_values, last_of_several], ids=lambda choose: choose.__name__)
def test_orders_that_decide_are_kept(choose):
    net, x = network(choose)
    found, apart = moved(net, x)
    assert apart <= 1e-12
    kept = ("2.router.weight", 0) if choose is unsorted_values else ("2.down", 2)
    assert all(kept not in places for places in found.spec().perm_to_axes.values())


def network(choose: Callable[..., Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, INTO), nn.Tanh(), Mixture(choose), nn.Linear(INTO, 2)).double(), torch.randn(
        40, 3
    ).double()


@torch.no_grad()
def moved(net: nn.Module, x: Tensor) -> tuple[equinorm.Permutations, float]:
    """What is found, and how far five random members move the outputs."""
    found, before, apart = equinorm.permutations(net, x), net(x), 0.0
    for seed in range(5):
        found.permute_(found.random(torch.Generator().manual_seed(seed)))
        apart = max(apart, float((net(x) - before).abs().max() / before.abs().max()))
    return found, apart


@pytest.mark.parametrize("name", FOUND)
def test_experts_move_with_their_routers_rows(name):
    found, apart = moved(*network(FOUND[name]))
    assert apart <= 1e-12
    family = next(family for family in found.families if ("2.router.weight", 0) in found.spec().perm_to_axes[family.name])
    assert family.size == EXPERTS
    assert not family.within
    tables = {part.tensor for part in family.axes if part.axis == 0}
    assert tables >= {"2.router.weight", "2.router.bias"}
    assert tables & {"2.up", "2.down", "2.bias"}


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """That of transformers, which exists in float64 too."""
    pytest.importorskip("transformers.integrations.moe")
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)


def grouped(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index, order = scores.argmax(-1).sort()
    ends = torch.histc(index.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
    gate, value = grouped_product(x[order], m.up.transpose(1, 2), ends).chunk(2, -1)
    return grouped_product(nn.functional.silu(gate) * value, m.down.transpose(1, 2), ends)[order.argsort()]


def by_data(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return m.of(x, (x[:, 0] * 3).long() % EXPERTS)


def with_other_axes(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    rows = m.up.transpose(1, 2)[:, :, INNER:].index_select(0, index).unsqueeze(1).squeeze(1)
    hidden = (x[:, None] @ rows).tanh() * (1 + x[:, :1, None] ** 2)
    return torch.bmm(hidden, m.down[index].mT)[:, 0]


APART = {f.__name__: f for f in (largest, gathered, grouped, by_data, with_other_axes)}


@pytest.mark.parametrize("name", APART)
def test_channels_of_each_expert_have_an_order_of_their_own(name):
    net, x = network(APART[name])
    found, apart = moved(net, x)
    assert apart <= 1e-12
    family = next(family for family in found.families if ("2.down", 2) in found.spec().perm_to_axes[family.name])
    assert (family.within, family.size) == ((EXPERTS,), INNER)


def hidden(m: Mixture, x: Tensor, index: Tensor) -> Tensor:
    return (m.up[index][:, :INNER] @ x[:, :, None]).squeeze(-1).tanh()


def outside(m: Mixture, inside: Tensor, index: Tensor) -> Tensor:
    return (m.down[index] @ inside[:, :, None]).squeeze(-1)


def of_another_index(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    order = scores.topk(2, -1).indices
    return outside(m, hidden(m, x, order[:, 0]), order[:, 1])


def of_a_changed_index(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1).clone()
    view = index.view(-1)
    inside = hidden(m, x, view)
    index.add_(1).remainder_(EXPERTS)
    return outside(m, inside, view)


def of_an_index_in_shared_memory(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    """As before, where the graph keeps the change in place: this einsum shares memory, which its schema denies."""
    return of_a_changed_index(m, torch.einsum("ab->ab", x.clone()), scores)


def over_places(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    return outside(m, hidden(m, x, index).softmax(0), index)


def with_the_next_place(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    inside = hidden(m, x, index)
    return outside(m, inside + inside.roll(1, 0), index)


def with_one_gain(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    return outside(m, hidden(m, x, index) * m.gain, index)


def through_one_layer(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    inside = hidden(m, x, scores.argmax(-1))
    return nn.functional.linear(inside, m.down[0]) + x


def with_each_other(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    inside = hidden(m, x, index)
    return (inside @ inside.T) @ x + outside(m, inside, index)


def made_by_experts(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    index = scores.argmax(-1)
    return outside(m, hidden(m, x, index), index)


def summed_after_softmax(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    return x + x[made_by_experts(m, x, scores).softmax(-1).sum(-1).argmax(0)]


def taken_from_themselves(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    made = made_by_experts(m, x, scores)
    return x + x[(made.expm1().log1p() - made).sum(-1).argmax(0)]


@pytest.mark.parametrize("choose", [summed_after_softmax, taken_from_themselves], ids=lambda choose: choose.__name__)
@pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch.export cannot record an index that data choose here")
def test_what_experts_made_is_held_where_only_rounding_tells_it_apart(choose):
    found, apart = moved(*network(choose))
    assert apart <= 1e-12
    assert all(("2.down", 2) not in places for places in found.spec().perm_to_axes.values())


def groups_by_their_ends(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    """The ends of groups choose rows too, which are other rows than those in the groups."""
    index = scores.argmax(-1)
    ends = torch.histc(index.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32).clamp(max=EXPERTS - 1)
    inside = (m.up[ends][:, :INNER] @ x[:EXPERTS, :, None]).squeeze(-1).tanh()
    return x + grouped_product(inside, m.down.transpose(1, 2), ends).sum(0)


def groups_and_rows(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    """The same index holds the ends of groups here and chooses rows there."""
    ends = torch.histc(scores.argmax(-1).float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32).clamp(max=EXPERTS - 1)
    of_rows = (m.up[ends][:, :INNER] @ x[:EXPERTS, :, None]).squeeze(-1)
    of_groups = grouped_product(x[:EXPERTS], m.up[:, :INNER].transpose(1, 2), ends)
    return x + grouped_product(of_groups * of_rows, m.down.transpose(1, 2), ends).sum(0)


def of_each_place(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    """With a gain for each place, which stays in its place."""
    index = scores.argmax(-1)
    return outside(m, hidden(m, x, index) * m.places, index)


def in_two_ranks(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    """Broadcast, so that each row meets all others."""
    index = scores.argmax(-1)
    inside = hidden(m, x, index)
    return outside(m, (inside[:, None] * inside).sum(1), index)


def in_two_halves(m: Mixture, x: Tensor, scores: Tensor) -> Tensor:
    """Cut along places and joined again."""
    index = scores.argmax(-1)
    return outside(m, torch.cat(hidden(m, x, index).chunk(2)), index)


TOGETHER = {
    f.__name__: f
    for f in (
        of_another_index,
        of_a_changed_index,
        of_an_index_in_shared_memory,
        over_places,
        with_the_next_place,
        with_one_gain,
        through_one_layer,
        with_each_other,
        groups_by_their_ends,
        groups_and_rows,
        of_each_place,
        in_two_ranks,
        in_two_halves,
    )
}


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_meet_others_have_one_order_for_all(name):
    net, x = network(TOGETHER[name])
    found, apart = moved(net, x)
    assert apart <= 1e-12
    read = [f for f in found.families if any((p.tensor, p.axis, p.offset) == ("2.up", 1, 0) for p in f.axes)]
    assert [(family.within, family.size) for family in read] == [((), INNER)]


@pytest.mark.parametrize("choose", PINNED, ids=lambda choose: choose.__name__)
def test_indices_that_say_more_pin(choose):
    found, apart = moved(*network(choose))
    assert apart <= 1e-12
    assert all(family.size != EXPERTS or "2.down" not in str(family) for family in found.families)


def test_an_index_that_is_returned_pins():
    class Returned(Mixture):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            index = self.router(x).argmax(-1)
            return self.of(x, index), index

    assert all(
        f.size != EXPERTS for f in equinorm.permutations(Returned(largest).double(), torch.randn(4, INTO).double()).families
    )
