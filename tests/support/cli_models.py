"""Models that the command line's tests name; each factory returns the same weights every time."""

import itertools

import torch
from torch import nn


def _seeded(build):
    def factory():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build()

    return factory


class Tied(nn.Module):
    """The embedding's weight is also the read-out's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 16)
        self.back = nn.Linear(16, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.back(torch.relu(self.hidden(self.embed(tokens)))))


class Branching(nn.Module):
    """torch.export cannot record it."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x, y):
        return self.out(torch.relu(self.left(x) + self.right(y)))


class Block(nn.Module):
    """Two convolutions; where the shape changes, the shortcut is subsampled and padded with zero channels."""

    def __init__(self, into, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.pad = stride, (out - into) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(y + x)


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _mlp(*widths, activation=nn.ReLU):
    layers = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), activation()]
    return nn.Sequential(*layers[:-1])


def _convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def _chain():
    """Balanced by the scales 2^0.51 and 2^0.49; rounded to 2 and 1 the norm would grow."""
    model = _mlp(1, 1, 1, 1)
    with torch.no_grad():
        for layer, power in zip(model[::2], (-0.51, 0.02, 0.49), strict=True):
            layer.weight.fill_(2**power)
    return model


def _with_nan():
    model = _mlp(4, 8, 2)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


def broken():
    raise ValueError("no such dataset")


def noisy():
    print("a factory that prints")  # noqa: T201
    return mlp()


def not_a_model():
    return 3


mlp = _seeded(lambda: _mlp(8, 16, 12, 4))
double = _seeded(lambda: _mlp(8, 16, 12, 4).double())
half = _seeded(lambda: _mlp(8, 16, 12, 4).half())
bounded = _seeded(lambda: _mlp(8, 16, 4, activation=lambda: nn.ReLU6(inplace=True)))
gelu = _seeded(lambda: _mlp(8, 16, 12, 4, activation=nn.GELU))
convolutional = _seeded(_convolutional)
branching = _seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), Branching()))
tied = _seeded(Tied)
two_inputs = _seeded(TwoInputs)
chain = _seeded(_chain)
resnet20 = _seeded(ResNet20)
narrow = _seeded(lambda: _mlp(8, *[6] * 33, 4))
with_nan = _seeded(_with_nan)
module = mlp()
