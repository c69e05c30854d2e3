"""`Scaling.log_scales`: what a vector of free log-scales means for each entry of each tensor, whose ids count from 1."""

import copy

import pytest
import torch
from torch import nn

import equinorm
from equinorm import RescaleError


class Mixed(nn.Module):
    """Pinned channels, several factors, an offset, a square."""

    def __init__(self):
        super().__init__()
        self.first, self.gain, self.last = nn.Linear(4, 6), nn.Parameter(torch.rand(6)), nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        h = nn.functional.layer_norm(self.first(x), (6,)) * (1 + self.gain)
        h = self.last(h).relu().square()
        return self.out(torch.cat([h[:, :2].sigmoid(), h[:, 2:]], 1))


def test_every_entry_moves_by_its_log_scale():
    torch.manual_seed(0)
    net = Mixed().double()
    symmetries = equinorm.symmetries(net, (torch.rand(2, 4).double(),))
    z = torch.randn(symmetries.num_free, dtype=torch.float64)
    before = copy.deepcopy(dict(net.named_parameters()))
    symmetries.rescale_(z)
    for scaling in symmetries.scalings:
        old = before[scaling.name].detach() + scaling.offset
        moved = old * scaling.log_scales(z).exp() - scaling.offset
        torch.testing.assert_close(symmetries.tensors[scaling.name].detach(), moved, rtol=1e-13, atol=1e-14)
    kinds = [scaling for scaling in symmetries.scalings if scaling.factors]
    assert any(scaling.offset for scaling in kinds)
    assert any(bool((ids == 0).any()) for scaling in kinds for _, ids in scaling.factors)


def test_ids_are_one_above_places():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    symmetries = equinorm.symmetries(net, (torch.rand(1, 4),))
    z = torch.tensor([1.0, 2.0, 3.0])
    found = {scaling.name: scaling.log_scales(z).tolist() for scaling in symmetries.scalings}
    assert found == {"0.weight": [[1.0], [2.0], [3.0]], "0.bias": z.tolist(), "2.weight": [[-1.0, -2.0, -3.0]], "2.bias": 0.0}
    assert [ids.flatten().tolist() for _, ids in symmetries.scalings[0].factors] == [[1, 2, 3]]
    assert symmetries.scalings[0].log_scales(z).dtype == torch.float64


def test_gradients_pass():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    symmetries = equinorm.symmetries(net, (torch.rand(1, 4),))
    z = torch.zeros(3, requires_grad=True)
    sum(scaling.log_scales(z).expand(scaling.shape).sum() for scaling in symmetries.scalings).backward()
    assert z.grad.tolist() == [4 + 1 - 2] * 3


@pytest.mark.parametrize("shape", [(), (2,), (3, 1)])
def test_vectors_of_another_shape(shape):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    scaling = equinorm.symmetries(net, (torch.rand(1, 4),)).scalings[0]
    with pytest.raises(RescaleError, match=r"log-scales of 0\.weight need .* shape \(num_free,\), at least 3, not \("):
        scaling.log_scales(torch.zeros(shape))
