"""The mean beside a variance flips with what it is the mean of."""

import torch
from torch import Tensor, nn

import equinorm


class Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.up(x), 0)
        return self.last(variance) + self.last(mean.exp())


def test_a_mean_that_is_read_otherwise_pins():
    assert equinorm.signs(Spread(), torch.randn(5, 3)).num_free == 0
