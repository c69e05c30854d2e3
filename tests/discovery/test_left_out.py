"""Tables of which an input reads a part: what was found with a short input holds with longer ones."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm.discovery.graph.export import Graphs
from equinorm.discovery.left_out import left_out
from equinorm.discovery.table_entries import unread

LONG, WIDTH = 12, 6


class Positions(nn.Module):
    """Tokens and positions into a residual stream without normalization, all of whose channels may move; so may hidden ones."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(7, WIDTH), nn.Parameter(torch.randn(1, LONG, WIDTH))
        self.up, self.down, self.out = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)

    def positions(self, length: int) -> Tensor:
        return self.table[:, :length]

    def forward(self, indices: Tensor) -> Tensor:
        x = (self.tokens(indices) + self.positions(indices.shape[1])).relu()
        return self.out((x + self.down(self.up(x).relu())).relu())


class First(Positions):
    """The first row by itself, as a class token has it."""

    def positions(self, length: int) -> Tensor:
        return torch.cat([self.table[:, 0][:, None], self.table[:, 1:length].clone()], 1)


class WithoutGradients(Positions):
    def positions(self, length: int) -> Tensor:
        with torch.no_grad():
            table = self.table.clone()
        return table.expand(2, -1, -1)[:, :length]


class Transformed(Positions):
    """Normalized and projected before it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def positions(self, length: int) -> Tensor:
        return self.project(self.norm(self.table))[:, :length]


@pytest.mark.parametrize("kind", [Positions, First, WithoutGradients, Transformed])
def test_what_is_found_with_a_short_input_holds_with_a_longer_one(kind):
    torch.manual_seed(0)
    model = kind().double()
    twin, short, longer = copy.deepcopy(model), torch.randint(7, (2, 4)), torch.randint(7, (2, LONG))
    symmetries, permutations = equinorm.symmetries(model, short), equinorm.permutations(model, short)
    norm = 0 if kind is not Transformed else WIDTH  # behind its normalization, gains may scale
    assert symmetries.num_free == WIDTH + 8 + norm
    assert sorted(family.size for family in permutations.families) == [*([WIDTH] * (1 + bool(norm))), 8]
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    permutations.permute_(permutations.random(torch.Generator().manual_seed(0)))
    assert not torch.allclose(model.table, twin.table)
    assert equinorm.deviation(model, twin, short) <= 1e-12
    assert equinorm.deviation(model, twin, longer) <= 1e-12
    assert [pin for pin in permutations.pins if pin.reason.detail.startswith("inputs of this size")]


def test_a_table_that_is_read_in_parts_is_read_whole():
    class Parts(Positions):
        def positions(self, length: int) -> Tensor:
            return torch.cat([self.table[:, :3], self.table[:, 3:]], 1).flip(1).mean(1, keepdim=True)

    permutations = equinorm.permutations(Parts(), torch.randint(7, (2, 4)))
    assert not [pin for pin in permutations.pins if pin.reason.detail.startswith("inputs of this size")]


def mask(table: Tensor, length: int) -> Tensor:
    """1 for the first rows of a table, 0 for others."""
    return (torch.arange(len(table)) < length).to(table.dtype)


WAYS = {
    "narrowed": lambda table, length: table.narrow(0, 0, length),
    "its end": lambda table, length: table[-length:],
    "doubled": lambda table, length: (table * 2).T.unsqueeze(0)[..., :length].squeeze(0).T,
    "split": lambda table, length: torch.cat([table.chunk(2)[0][:3], table.split([length, len(table) - length])[0][3:]]),
    "picked": lambda table, length: table[torch.arange(length)],
    "selected": lambda table, length: table.index_select(0, torch.arange(length)),
    "gathered": lambda table, length: table.gather(0, torch.arange(length)[:, None].expand(length, WIDTH)),
    "taken": lambda table, length: torch.take_along_dim(table, torch.arange(length)[:, None], 0),
    "in threes": lambda table, length: table.view(-1, 3, WIDTH)[: length // 3].reshape(length, WIDTH),
    "in columns": lambda table, length: table.view(3, -1, WIDTH)[:, : length // 3].reshape(length, WIDTH),
    "flattened": lambda table, length: table.flatten()[: length * WIDTH].view(length, WIDTH),
    "turned": lambda table, length: table.flip(0)[-length:],
    "rolled": lambda table, length: table.roll(1, 0).roll(-1, 0)[:length],
    "cropped": lambda table, length: nn.functional.pad(table, (0, 0, 0, length - len(table))),
    "in windows": lambda table, length: table.unfold(0, length, 1)[0].T,
    "joined": lambda table, length: torch.cat([table[:2], table[2:]])[:length],
    "summed": lambda table, length: (table + table.relu())[:length],
    "overwritten": lambda table, length: torch.slice_scatter(table, torch.zeros_like(table[length:]), 0, length)[:length],
    "masked": lambda table, length: (table * (torch.arange(len(table)) < length)[:, None]).sum(0),
    "in a sum of products": lambda table, length: torch.einsum("l,lw->w", mask(table, length), table),
    "by a vector": lambda table, length: torch.mv(table.T, mask(table, length)),
    "added": lambda table, length: torch.addmm(table[:1], mask(table, length)[None], table),
    "weighted": lambda table, length: torch.addcmul(table[:1], table, mask(table, length)[:, None]).sum(0),
    "one-hot": lambda table, length: nn.functional.one_hot(torch.arange(length), len(table)).to(table.dtype) @ table,
}
"""Rows of a table for an input of this length."""


class Tables(nn.Module):
    """Tables of which a part each is read in another way, and multiplied with hidden channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList(torch.randn(LONG, WIDTH) for _ in WAYS)
        self.up = nn.ModuleList(nn.Linear(4, WIDTH) for _ in WAYS)
        self.down = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in WAYS)

    def forward(self, x: Tensor) -> list[Tensor]:
        parts = zip(WAYS.values(), self.tables, self.up, self.down, strict=True)
        return [down(cut(table, x.shape[1]).relu() * up(x).relu()) for cut, table, up, down in parts]


@pytest.fixture(scope="module")
def tables() -> tuple[Tables, Tables, Tables]:
    """Networks as drawn, rescaled at random and permuted at random; what may be is found with a short input."""
    torch.manual_seed(0)
    drawn, short = Tables().double(), torch.randn(2, 6, 4, dtype=torch.float64)
    rescaled, permuted = copy.deepcopy(drawn), copy.deepcopy(drawn)
    symmetries, permutations = equinorm.symmetries(rescaled, short), equinorm.permutations(permuted, short)
    assert symmetries.num_free == 2 * WIDTH * len(WAYS)
    assert sorted(family.size for family in permutations.families) == [WIDTH] * len(WAYS)
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    permutations.permute_(permutations.random(torch.Generator().manual_seed(0)))
    return drawn, rescaled, permuted


@pytest.mark.parametrize("length", [6, LONG])
@pytest.mark.parametrize("way", WAYS)
def test_whatever_way_a_table_is_cut_longer_inputs_find_it_as_it_was(tables, way, length):
    drawn, *others = tables
    number, x = [*WAYS].index(way), torch.randn(2, length, 4, dtype=torch.float64)
    for other in others:
        assert not torch.allclose(drawn.tables[number], other.tables[number])
        assert (drawn(x)[number] - other(x)[number]).abs().max() <= 1e-12 * drawn(x)[number].abs().max()


def test_a_large_table_is_not_written_down():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.cut = (
                nn.Parameter(torch.empty(*shape, device="meta")) for shape in ((3, 1 << 20, 1), (1 << 25, 2))
            )

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.weight.unbind()
            return (query * key * value * x).sum() + self.cut.T[:1].flip(1).sum()

    (call,) = Graphs(Packed(), [((torch.empty(1 << 20, 1, device="meta"),), None)], [None], {})
    found = left_out([(call.exported, lambda node: None)])
    assert {source.names: [int(mask.sum()) for mask in masks] for source, masks in found.items()} == {("cut",): [1 << 25, 2]}


@pytest.mark.parametrize(
    ("boxes", "left"),
    [
        ([((0, 1), (0, 1, 2))], ([2], [])),
        ([((0,), (0, 1, 2)), ((2,), (0, 1, 2))], ([1], [])),
        ([((0, 1), (0,)), ((0, 1, 2), (1, 2)), ((2,), (0,))], ([], [])),
        ([((0, 1), (0, 1)), ((2,), (2,))], ([0, 1, 2], [0, 1, 2])),  # no box: some of every row, and of every column
        ([], ([0, 1, 2], [0, 1, 2])),
    ],
)
def test_what_boxes_leave(boxes, left):
    masks = [[torch.isin(torch.arange(3), torch.tensor(places)) for places in part] for part in boxes]
    assert tuple(mask.nonzero().flatten().tolist() for mask in unread((3, 3), masks)) == left


class Slim(nn.Module):
    """Some of the hidden channels of a network that has more of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = (nn.Parameter(torch.randn(*shape)) for shape in ((12, 5), (10, 12), (3, 10)))
        self.width = 6

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.up[: self.width]).relu()
        x = nn.functional.linear(x, self.middle[:, : self.width]).relu()
        return nn.functional.linear(x, self.down)


def test_what_is_found_in_a_part_of_a_network_holds_in_the_whole():
    torch.manual_seed(0)
    model, x = Slim().double(), torch.randn(2, 5, dtype=torch.float64)
    twin, symmetries, permutations = copy.deepcopy(model), equinorm.symmetries(model, x), equinorm.permutations(model, x)
    assert symmetries.num_free == 1 + 10  # channels of which some are left out have one scale
    assert [family.size for family in permutations.families] == [6, 10]
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    permutations.permute_(permutations.random(torch.Generator().manual_seed(0)))
    model.width = twin.width = 12
    assert equinorm.deviation(model, twin, x) <= 1e-12


def test_every_other_row_of_a_long_table():
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Parameter(torch.randn(1200, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((x + self.table[::2].mean(0)).relu())

    assert not [family for family in equinorm.permutations(Strided(), torch.randn(2, 4)).families if family.size == 1200]


@torch.no_grad()
def test_one_column_of_a_product_of_weights():
    """Places along the columns are none of those along which the product sums, which are another number."""

    class Column(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.weight = nn.Parameter(torch.randn(LONG, WIDTH)), nn.Parameter(torch.randn(2, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * nn.functional.linear(self.table, self.weight)[: x.shape[1], 0]

    for find in (equinorm.symmetries, equinorm.permutations):
        net, short, long = Column().double(), torch.randn(2, 4).double(), torch.randn(2, LONG).double()
        before, found = copy.deepcopy(net), find(net, short)
        if isinstance(found, equinorm.Permutations):
            found.permute_(found.random(torch.Generator().manual_seed(0)))
        else:
            found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
        assert equinorm.deviation(net, before, (short,)) <= 1e-12
        assert equinorm.deviation(net, before, (long,)) <= 1e-12


@pytest.mark.parametrize("is_added", [True, False])
def test_a_bias_that_is_added_to_a_product_is_read_as_the_product_is(is_added):
    """Unread columns of a product with a weight are free, and so are their biases, as in a linear layer."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b, self.v = (nn.Parameter(torch.randn(shape)) for shape in ((4, WIDTH), (WIDTH,), (WIDTH // 2, 2)))

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.w + self.b if is_added else nn.functional.linear(x, self.w.t(), self.b)
            return x.relu()[:, : WIDTH // 2] @ self.v

    assert equinorm.symmetries(Half(), torch.randn(5, 4)).num_free == WIDTH


@pytest.mark.parametrize("way", ["of activations", "of weights", "not a product", "a vector", "by rows"])
def test_other_tables_that_are_added_are_no_biases(way):
    """Longer inputs may show their other entries."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = (LONG, LONG), (LONG, LONG) if way == "by rows" else LONG, LONG
            self.w, self.b, self.c = (nn.Parameter(torch.randn(shape)) for shape in shapes)

        def forward(self, x: Tensor) -> Tensor:
            scores = {
                "of activations": lambda: x.mT @ x.repeat(1, LONG // x.shape[1]) + self.b,
                "of weights": lambda: (self.w @ self.w + self.b)[: x.shape[1]],
                "not a product": lambda: x.mT.repeat(1, LONG // x.shape[0]) + self.b,
                "a vector": lambda: x.mT.repeat(1, LONG // x.shape[0])[:, :, None].expand(-1, -1, LONG) @ self.c + self.b,
                "by rows": lambda: x.mT.repeat(LONG // x.shape[1], LONG // x.shape[0]) @ self.w + self.b,
            }[way]()
            return x @ scores.relu()[: x.shape[1], : x.shape[1]]

    pins = equinorm.permutations(Cut(), torch.randn(3, 3)).pins
    assert [pin for pin in pins if pin.tensor == "b" and pin.reason.detail.startswith("inputs of this size")]
