"""Recurrent layers and cells flip their states with what tanh reads, and nothing that a sigmoid reads."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm


class Layer(nn.Module):
    """A recurrent layer whose outputs are read; its first state is an input if it is given."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        size = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
        self.layer, self.last = layer, nn.Linear(size, 2)

    def forward(self, x: Tensor, *states: Tensor) -> Tensor:
        return self.last(self.layer(x, (states if len(states) > 1 else states[0]) if states else None)[0])


class Steps(nn.Module):
    """Three steps of a cell."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.last = cell, nn.Linear(cell.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(3):
            state = self.cell(x[step], state)
        return self.last(state[0] if isinstance(state, tuple) else state)


LAYERS = {
    "rnn": (nn.RNN(3, 5), 5),
    "rnn without biases": (nn.RNN(3, 5, 2, bias=False, batch_first=True), 10),
    "rnn in both directions": (nn.RNN(3, 5, 2, bidirectional=True), 20),
    "lstm": (nn.LSTM(3, 5, 2, bidirectional=True), 20),
    "lstm with projections": (nn.LSTM(3, 5, 2, proj_size=4), 18),
    "gru": (nn.GRU(3, 5, 2, batch_first=True), 10),
    "relu": (nn.RNN(3, 5, nonlinearity="relu"), 0),
}
CELLS = {
    "rnn": (nn.RNNCell(3, 5), 5),
    "lstm": (nn.LSTMCell(3, 5, bias=False), 5),
    "gru": (nn.GRUCell(3, 5), 5),
    "relu": (nn.RNNCell(3, 5, nonlinearity="relu"), 0),
}


def flipped(net: nn.Module, *args: Tensor) -> tuple[int, float]:
    """How many classes flip, and how far all of them at once move the outputs."""
    twin = copy.deepcopy(net)
    signs = equinorm.signs(twin, args)
    signs.flip_(torch.where(torch.arange(signs.num_free) % 3 == 1, 1, -1))
    return signs.num_free, equinorm.deviation(net, twin, args)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer, free = LAYERS[name]
    assert flipped(Layer(copy.deepcopy(layer)).double(), torch.randn(4, 4, 3).double()) == (free, 0.0)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    cell, free = CELLS[name]
    assert flipped(Steps(copy.deepcopy(cell)).double(), torch.randn(3, 4, 3).double()) == (free, 0.0)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_states_that_are_given_pin(kind):
    states = [torch.randn(1, 4, 5).double() for _ in range(2 if kind is nn.LSTM else 1)]
    assert flipped(Layer(kind(3, 5)).double(), torch.randn(2, 4, 3).double(), *states) == (0, 0.0)
