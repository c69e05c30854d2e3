"""Tables of which an input reads a part: what was found with a short input holds with longer ones."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm

LONG, WIDTH = 9, 6


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


class Narrowed(Positions):
    def positions(self, length: int) -> Tensor:
        return self.table[0].narrow(0, 0, length)


class First(Positions):
    """The first row by itself, as a class token has it."""

    def positions(self, length: int) -> Tensor:
        return torch.cat([self.table[:, 0][:, None], self.table[:, 1:length].clone()], 1)


class Last(Positions):
    def positions(self, length: int) -> Tensor:
        return self.table[:, -length:]


class Doubled(Positions):
    """Cut after a product, a transposition and an axis more."""

    def positions(self, length: int) -> Tensor:
        return (self.table * 2).transpose(1, 2).unsqueeze(0)[..., :length].squeeze(0).transpose(1, 2)


class Split(Positions):
    def positions(self, length: int) -> Tensor:
        return torch.cat([self.table[0].chunk(2)[0][:3], self.table[0].split([length, LONG - length])[0][3:]])


class WithoutGradients(Positions):
    def positions(self, length: int) -> Tensor:
        with torch.no_grad():
            table = self.table.clone()
        return table.expand(2, -1, -1)[:, :length]


@pytest.mark.parametrize("kind", [Positions, Narrowed, First, Last, Doubled, Split, WithoutGradients])
def test_what_is_found_with_a_short_input_holds_with_a_longer_one(kind):
    torch.manual_seed(0)
    model = kind().double()
    twin, short, longer = copy.deepcopy(model), torch.randint(7, (2, 4)), torch.randint(7, (2, LONG))
    symmetries, permutations = equinorm.symmetries(model, short), equinorm.permutations(model, short)
    assert symmetries.num_free == WIDTH + 8
    assert sorted(family.size for family in permutations.families) == [WIDTH, 8]
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    permutations.permute_(permutations.random(torch.Generator().manual_seed(0)))
    assert not torch.allclose(model.table, twin.table)
    assert equinorm.deviation(model, twin, short) <= 1e-12
    assert equinorm.deviation(model, twin, longer) <= 1e-12
    assert [pin for pin in permutations.pins if pin.reason.detail.startswith("inputs of this size")]


def test_a_table_that_is_read_in_parts_is_read_whole():
    class Parts(Positions):
        def positions(self, length: int) -> Tensor:
            return torch.cat([self.table[:, :3], self.table[:, 3:]], 1)[:, :length]

    permutations = equinorm.permutations(Parts(), torch.randint(7, (2, 4)))
    assert not [pin for pin in permutations.pins if pin.reason.detail.startswith("inputs of this size")]


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
