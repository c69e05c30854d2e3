"""Writes into memory that is read again: through views, dropouts, new tensors, buffers, inputs and lists."""

import copy

import pytest
import torch
from exactness import X, check
from torch import Tensor, nn

import equinorm


class Mutating(nn.Module):
    """Changes a tensor in place that it reads again, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        part = hidden[:, :2]
        part.add_(1.0)
        return self.down(torch.relu(hidden))


def test_mutation_through_a_view_is_seen():
    check(Mutating().double(), (X,), 4)


class Dropping(nn.Module):
    """Writes a slice of what a dropout takes, or of what it returns: the same tensor where it does nothing."""

    def __init__(self, before: bool, result: bool = False) -> None:
        super().__init__()
        self.before, self.result = before, result
        self.up, self.down, self.dropout = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.up(x).clone()
        dropped = self.dropout(hidden)
        (hidden if self.before else dropped)[:, :2].add_(1.0)
        out = self.down(torch.relu(dropped if self.before else hidden))
        return (out, dropped) if self.result else out


@pytest.mark.parametrize(("before", "result", "num_free"), [(True, False, 4), (False, False, 4), (True, True, 0)])
def test_slices_written_around_an_idle_dropout(before, result, num_free):
    check(Dropping(before, result).double().eval(), (X,), num_free)


class Filled(nn.Module):
    """Fills a new tensor in place: zeros fit any scale, the last column does not."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.up, self.down = value, nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        mask = hidden.new_zeros(6)
        mask[5:] = self.value
        return self.down(torch.relu(hidden + mask))


@pytest.mark.parametrize(("value", "num_free"), [(0.0, 6), (1.0, 5)])
def test_new_tensors_filled_in_place(value, num_free):
    check(Filled(value).double(), (X,), num_free)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.side, self.down = (nn.Linear(a, b, bias=False) for a, b in [(4, 6), (4, 6), (6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        out = torch.zeros_like(hidden)
        out[:, :3] = self.side(x)[:, :3]
        out[:, 3:] = hidden[:, 3:]
        return self.down(torch.relu(out))


def test_slices_overwritten_by_activations():
    net = Overwriting().double()
    symmetries = equinorm.symmetries(net, X)
    twin = copy.deepcopy(net)
    equinorm.symmetries(twin, X).rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    assert equinorm.deviation(twin, net, X) <= 1e-12
    assert symmetries.num_free >= 6


class Indexed(nn.Module):
    """Reads channels in an order that a buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.register_buffer("order", torch.tensor([3, 1, 5, 0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))[:, self.order])


class Counting(Indexed):
    """The same, but the buffer changes at every call: no constant."""

    def forward(self, x: Tensor) -> Tensor:
        self.order.copy_(self.order.roll(1))
        return super().forward(x)


def test_integer_buffers_are_constants_unless_they_change():
    net = Indexed().double()
    check(net, (X,), 6)
    before = net.order.clone()
    changing = Counting().double()
    assert equinorm.symmetries(changing, X).num_free == 1  # any channel may be read anywhere
    assert torch.equal(changing.order, before)


class Writes(nn.Module):
    """A hidden value meets memory that something else writes or shares."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("memory", torch.zeros(2, 6))
        self.alias = self.up.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        if self.how == "noise into zeros":
            noise = torch.zeros_like(hidden)
            noise[:, :4].normal_()
            hidden = hidden + noise
        elif self.how == "drawn into zeros":
            noise = torch.zeros_like(hidden)
            noise[:, :4] = torch.rand(2, 4, dtype=x.dtype)
            hidden = hidden + noise
        elif self.how == "remembered":
            out = self.down(hidden + self.memory)
            self.memory.copy_(hidden)
            return out
        elif self.how == "assigned":
            out = self.down(hidden + self.memory)
            self.memory = hidden.detach()
            return out
        elif self.how == "aliased attribute":
            return self.down(hidden) + self.alias.sum()
        elif self.how == "aliased by einsum":
            view = torch.einsum("ij->ij", hidden)
            view.mul_(x.sum())
            view.add_(1.0)
        elif self.how == "aliased by dropout":
            view = torch.dropout(hidden, 0.5, False)
            view[:, 0] = 1.0
        elif self.how == "input":
            x.add_(hidden[:, :4])
        return self.down(hidden)


@pytest.mark.parametrize(
    ("how", "most"),
    [
        ("noise into zeros", 2),
        ("drawn into zeros", 2),
        ("remembered", 0),
        ("assigned", 0),
        ("aliased attribute", 0),
        ("aliased by einsum", 0),
        ("aliased by dropout", 6),  # what is overwritten moves alone
        ("input", 2),
    ],
)
def test_memory_that_something_else_writes_or_shares(how, most):
    torch.manual_seed(0)
    net = Writes(how).double()
    net.alias = net.up.bias.detach()
    symmetries = equinorm.symmetries(net, X.clone())
    assert symmetries.num_free <= most
    before = copy.deepcopy(net)
    before.alias = before.up.bias.detach()
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    for _ in range(2):  # the second call reads what the first has written
        torch.manual_seed(1)
        a, given_a = net(given := X.clone()), given
        torch.manual_seed(1)
        b, given_b = before(given := X.clone()), given
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given_a, given_b, rtol=1e-12, atol=1e-12)


class ListsOfWrites(nn.Module):
    """Writes into zeros through an operation on lists of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        shift = x.new_zeros(6)
        torch._foreach_add_([shift], [x.new_ones(6)])
        return self.down(self.up(x).relu() + shift)


def test_writes_into_lists_of_tensors():
    check(ListsOfWrites().double(), (X,), 0)
