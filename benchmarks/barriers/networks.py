"""The networks, and how each pair is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3×3 convolutions, and a 1×1 convolution beside them where the size changes (option B)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        beside = [nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.shortcut = nn.Identity() if (into, stride) == (out, 1) else nn.Sequential(*beside)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet20(width: int) -> nn.Sequential:
    """He et al. 2016: three stages of three blocks of 16, 32 and 64 channels, times the width."""
    first, second, third = (channels * width for channels in (16, 32, 64))
    sizes = [(first, first, 1)] * 3
    sizes += [(first, second, 2), *[(second, second, 1)] * 2, (second, third, 2), *[(third, third, 1)] * 2]
    start = [nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    return nn.Sequential(*start, *(Block(*size) for size in sizes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 10))


def perceptron() -> nn.Sequential:
    """Three layers, 512 hidden channels in each, with biases."""
    layers = [nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


@dataclass(frozen=True, slots=True)
class Setting:
    """How a pair is trained.

    Attributes:
        width: of a ResNet-20; 0 for the perceptron.
        epochs: over the training images.
        lr: the largest; one cycle, up for a fifth of the steps.
        pooled: are images averaged down to 16×16?
        half: are products computed in bfloat16 (autocast)?
    """

    width: int
    epochs: int
    lr: float
    pooled: bool = True
    half: bool = False

    def network(self) -> nn.Sequential:
        """An untrained one."""
        return resnet20(self.width) if self.width else perceptron()

    def images(self, batch: Tensor) -> Tensor:
        """A batch as the network takes it."""
        return F.avg_pool2d(batch, 2) if self.pooled else batch

    def example(self) -> Tensor:
        """An input of the right shape."""
        size = 16 if self.pooled else 32
        return torch.zeros(2, 3, size, size)


SETTINGS = {
    "MLP": Setting(0, 12, 0.05, pooled=False),
    "ResNet-20 ×1": Setting(1, 2, 0.2),
    "ResNet-20 ×4": Setting(4, 2, 0.2, half=True),
}
