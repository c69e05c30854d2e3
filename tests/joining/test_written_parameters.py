"""Activations are measured on copies of what a graph writes: the networks stay as they are."""

import torch
from torch import Tensor, nn

import equinorm


class Clamped(nn.Module):
    """Clamps its own weight at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(6, 3)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x @ self.weight.detach().clamp_(-0.1, 0.1).t()).tanh())


def test_networks_that_write_into_parameters_are_untouched():
    torch.manual_seed(0)
    nets, x = (Clamped(), Clamped()), torch.randn(8, 3)
    before = [net.weight.detach().clone() for net in nets]
    equinorm.align(*nets, (x,), data=[x])
    assert all(torch.equal(net.weight, own) for net, own in zip(nets, before, strict=True))
