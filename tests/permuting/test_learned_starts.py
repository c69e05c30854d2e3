"""First states that are weights: channels move with their layer, layers stay."""

import torch
from torch import Tensor, nn

import equinorm


class Started(nn.Module):
    """Two layers with learned first states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.start, self.last = nn.GRU(3, 5, 2), nn.Parameter(torch.randn(2, 1, 5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x, self.start.expand(-1, x.shape[1], -1).contiguous())[0])


@torch.no_grad()
def test_layers_of_first_states_are_not_permuted():
    torch.manual_seed(0)
    net, x = Started().double(), torch.randn(4, 4, 3).double()
    found, before = equinorm.permutations(net, x), net(x)
    found.permute_([torch.arange(family.size).flip(0).expand(family.shape) for family in found.families])
    assert [family.size for family in found.families] == [5]
    assert float((net(x) - before).abs().max()) <= 1e-12
