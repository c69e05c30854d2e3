"""Inputs, a network of two layers, and the check that a random member of the group found keeps the function."""

import copy

import torch
from torch import nn

import equinorm

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def check(net: nn.Module, args: tuple, num_free: int) -> equinorm.Symmetries:
    """So many classes, and a random member of the group keeps the function."""
    symmetries = equinorm.symmetries(net, args)
    assert symmetries.num_free == num_free
    twin = copy.deepcopy(net)
    z = torch.randn(num_free, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equinorm.symmetries(twin, args).rescale_(z)
    assert equinorm.deviation(twin, net, args) <= 1e-12
    return symmetries
