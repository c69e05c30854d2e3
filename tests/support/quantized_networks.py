"""Small networks with layers of every kind that a quantizer rounds, and what their noise is made of."""

import itertools

import torch
from torch import nn
from torch.nn import functional

from equinorm.quantization.noise import Noise
from equinorm.quantization.operands import find_operands
from equinorm.quantization.points import find_points
from equinorm.quantization.scheme import Scheme
from equinorm.quantization.statistics import gather
from equinorm.quantization.terms import by_name, rounded_tensors


class Mixed(nn.Module):
    """Grouped, depthwise and transposed convolutions, a residual stream, a weight without a module, one that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 6, 1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.twice = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.grouped(torch.relu(self.depthwise(x))))
        x = torch.relu(self.up(x)).mean((2, 3))
        return functional.linear(torch.relu(self.twice(torch.relu(self.twice(x)))), self.weight)


def mixed(seed=0, spread=0.7):
    """Such a network in float64 whose channels differ in size, and inputs."""
    torch.manual_seed(seed)
    net, x = Mixed().double().eval(), torch.randn(32, 2, 5, 5, dtype=torch.float64)
    uneven_(net, x, spread)
    return net, x


def perceptron(seed=0, widths=(5, 7, 6, 3), spread=0.7):
    """Linear layers and ReLU in float64, channels of different sizes, and inputs."""
    torch.manual_seed(seed)
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    net, x = nn.Sequential(*layers[:-1]).double().eval(), torch.randn(40, widths[0], dtype=torch.float64)
    uneven_(net, x, spread)
    return net, x


def uneven_(net, x, spread):
    import equinorm

    symmetries = equinorm.symmetries(net, (x,))
    symmetries.rescale_(spread * torch.randn(symmetries.num_free, dtype=torch.float64))


def noise_of(net, x, scheme):
    """The noise of a network, its symmetries, and the statistics."""
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    symmetries, points = find_points(net, (x,), None, scheme)
    points = (*points, *find_operands(net, (x,), None, scheme, symmetries)[0])
    seen = gather(net, points, [((x,), {})])
    found = [one.observed for one in rounded_tensors(points, symmetries.tensors, by_name(symmetries.scalings), seen)]
    return Noise(found, symmetries.num_free), symmetries, seen
