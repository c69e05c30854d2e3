"""Random mixtures of experts: random members leave outputs unchanged; experts are free where nothing tells them apart."""

import os
from collections import Counter
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import equinorm

EXAMPLES = int(os.environ.get("EQUINORM_EXAMPLES", "12"))
INTO, INNER, PLACES = 5, 3, 24


@dataclass(frozen=True)
class Design:
    """How a mixture chooses experts and what it makes of them.

    Attributes:
        groups: groups of three experts, of which one or more stay open.
        open: groups that stay open; 0 for all, without a mask.
        fill: what closed groups get.
        scores: softmax, sigmoid, biased (sigmoid plus a shift for the choice only), rectified.
        count: experts chosen for each place.
        chooser: topk, unsorted (topk in an order of its own), sort, max, argmax.
        experts: gathered, masked, one_hot, range, loop, sized (a loop over the places that each expert has).
        combined: sum, largest, first (of those chosen), slots (a gain for each of them).
        inside: what gathered experts do between their layers: nothing, own (a gain for each expert), shared (one for all),
            places (a softmax over places), neighbours (the next place's values are added).
    """

    groups: int
    open: int
    fill: float
    scores: str
    count: int
    chooser: str
    experts: str
    combined: str
    inside: str = "nothing"

    @property
    def size(self) -> int:
        """Experts of all groups."""
        return 3 * self.groups

    @property
    def chosen(self) -> int:
        """Experts that are chosen for each place."""
        return 1 if self.chooser in ("max", "argmax") else self.count

    @property
    def moves(self) -> bool:
        """Must experts be found to move?"""
        looped = self.experts in ("loop", "sized")
        closed = self.open and (
            3 * self.open < self.chosen or (self.fill == 0 and self.scores == "biased") or self.chooser == "sort"
        )
        are_apart = self.combined in ("first", "slots") or (self.experts == "gathered" and self.inside == "neighbours")
        told = are_apart and self.chooser == "unsorted" and self.chosen > 1  # slots of an order of its own meet others
        return not (looped or closed or told or self.scores == "rectified")

    @property
    def orders(self) -> int:
        """Orders of channels inside of gathered experts."""
        return self.size if self.inside in ("nothing", "own") else 1


class Mixture(nn.Module):
    """A layer in front, a mixture of experts, a layer behind."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.design = design
        self.first, self.last = nn.Linear(3, INTO), nn.Linear(INTO, 2)
        self.router = nn.Linear(INTO, design.size)
        self.shift = nn.Parameter(torch.randn(design.size) / 4)
        self.slots = nn.Parameter(torch.rand(design.chosen) + 0.5)
        if design.experts in ("loop", "sized"):
            self.experts = nn.ModuleList(nn.Linear(INTO, INTO) for _ in range(design.size))
        else:
            self.up = nn.Parameter(torch.randn(design.size, INTO, INNER))
            self.down = nn.Parameter(torch.randn(design.size, INNER, INTO))
            self.gains = nn.Parameter(torch.randn(design.size, INNER))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        weights, index = self._choice(self.router(x))
        found = getattr(self, f"_{self.design.experts}")(x, index) * weights[..., None]
        if self.design.combined == "first":
            return self.last(found[:, 0])
        if self.design.combined == "slots":
            return self.last((found * self.slots[:, None]).sum(1))
        return self.last(found.sum(1) if self.design.combined == "sum" else found.amax(1))

    def _choice(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the experts of each place, of shape (places, chosen)."""
        design = self.design
        scores = logits.softmax(-1) if design.scores == "softmax" else logits.sigmoid()
        if design.scores == "rectified":
            scores = (scores - 0.5).relu()
        choice = scores + self.shift if design.scores == "biased" else scores
        if design.open:
            of_groups = choice.view(-1, design.groups, 3).amax(-1)
            kept = torch.zeros_like(of_groups).scatter_(1, of_groups.topk(design.open, -1, sorted=False).indices, 1)
            kept = kept[..., None].expand(-1, -1, 3).reshape(-1, design.size)
            choice = choice.masked_fill(~kept.bool(), design.fill)
        if design.chooser == "argmax":
            index = choice.argmax(-1, keepdim=True)
        elif design.chooser == "max":
            index = choice.max(-1, keepdim=True).indices
        elif design.chooser == "sort":
            index = choice.sort(-1, descending=True).indices[:, : design.count]
        else:
            index = choice.topk(design.count, -1, sorted=design.chooser == "topk").indices
        weights = scores.gather(1, index)
        return weights / (weights.sum(-1, keepdim=True) + 1), index

    def _gathered(self, x: Tensor, index: Tensor) -> Tensor:
        chosen = index.reshape(-1)
        hidden = F.silu(x.repeat_interleave(index.shape[1], 0)[:, None] @ self.up[chosen])
        if self.design.inside == "own":
            hidden = hidden * self.gains[chosen].unsqueeze(1)
        elif self.design.inside == "shared":
            hidden = hidden * self.gains[0]
        elif self.design.inside == "places":
            hidden = hidden.softmax(0)
        elif self.design.inside == "neighbours":
            hidden = hidden + hidden.roll(1, 0)
        return (hidden @ self.down[chosen]).view(*index.shape, INTO)

    def _masked(self, x: Tensor, index: Tensor) -> Tensor:
        all_of_them = torch.einsum("beh,ehi->bei", torch.einsum("bi,eih->beh", x, self.up).tanh(), self.down)
        return all_of_them.gather(1, index[..., None].expand(-1, -1, INTO)) if index.shape[1] == 1 else self._one_hot(x, index)

    def _one_hot(self, x: Tensor, index: Tensor) -> Tensor:
        kept = F.one_hot(index, self.design.size + 1)[..., :-1].to(x.dtype)
        return torch.einsum("bke,beh,ehi->bki", kept, torch.einsum("bi,eih->beh", x, self.up).tanh(), self.down)

    def _range(self, x: Tensor, index: Tensor) -> Tensor:
        kept = (index[..., None] == torch.arange(self.design.size)).to(x.dtype)
        return torch.einsum("bke,beh,ehi->bki", kept, torch.einsum("bi,eih->beh", x, self.up).tanh(), self.down)

    def _loop(self, x: Tensor, index: Tensor) -> Tensor:
        return sum(expert(x)[:, None] * (index == place)[..., None] for place, expert in enumerate(self.experts))

    def _sized(self, x: Tensor, index: Tensor) -> Tensor:
        found = x.new_zeros(index.numel(), INTO)
        mask = F.one_hot(index, self.design.size).permute(2, 0, 1)
        for place, expert in enumerate(self.experts):
            rows, slots = torch.where(mask[place])
            found = found.index_add(0, rows * index.shape[1] + slots, expert(x[None, rows].reshape(-1, INTO)))
        return found.view(*index.shape, INTO)


@st.composite
def designs(draw) -> Design:
    groups = draw(st.sampled_from([1, 2, 3]))
    return Design(
        groups=groups,
        open=draw(st.sampled_from([0, 1, groups])),
        fill=draw(st.sampled_from([float("-inf"), 0.0])),
        scores=draw(st.sampled_from(["softmax", "sigmoid", "biased", "rectified"])),
        count=draw(st.sampled_from([1, 2, 3])),
        chooser=draw(st.sampled_from(["topk", "unsorted", "unsorted", "sort", "max", "argmax"])),
        experts=draw(st.sampled_from(["gathered", "gathered", "masked", "one_hot", "range", "loop", "sized"])),
        combined=draw(st.sampled_from(["sum", "sum", "largest", "first", "slots"])),
        inside=draw(st.sampled_from(["nothing", "own", "shared", "places", "neighbours"])),
    )


def test_random_members_leave_outputs_unchanged_and_experts_are_found() -> None:
    seen: Counter[bool] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200)
    @given(designs())
    @example(Design(2, 1, float("-inf"), "biased", 2, "unsorted", "gathered", "sum"))
    @example(Design(2, 1, float("-inf"), "softmax", 3, "unsorted", "gathered", "slots"))
    @example(Design(1, 0, 0.0, "softmax", 2, "topk", "sized", "sum"))
    @example(Design(3, 0, 0.0, "softmax", 2, "topk", "gathered", "sum", "own"))
    @example(Design(1, 0, 0.0, "softmax", 2, "topk", "gathered", "sum", "neighbours"))
    @torch.no_grad()
    def holds(design: Design) -> None:
        model, x = Mixture(design).double().eval(), torch.randn(PLACES, 3, dtype=torch.float64)
        found, before = equinorm.permutations(model, x), model(x)
        for seed in range(3):
            found.permute_(found.random(torch.Generator().manual_seed(seed)))
            assert float((model(x) - before).abs().max() / before.abs().max()) <= 1e-12, found.details()
        moving = sum(
            part.size if not family.within else family.size * family.orders
            for family in found.families
            for part in family.axes
            if (part.tensor, part.axis) == ("router.weight", 0)
        )
        expected = design.size if design.groups == 1 or not design.open else 3 * design.groups + design.groups
        assert moving == (expected if design.moves else 0), found.details()
        seen[design.moves] += 1
        if design.experts == "gathered":
            inside = [f.orders for f in found.families for p in f.axes if (p.tensor, p.axis) == ("down", 1)]
            assert inside == [design.orders], found.details()

    holds()
    assert min(seen[True], seen[False]) >= 0.2 * seen.total(), seen
