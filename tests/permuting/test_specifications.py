"""What is found is what is written by hand for Git Re-Basin: for multilayer perceptrons, VGG-16, ResNet-20 and ResNet-50."""

import importlib.util
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equinorm

Groups = set[frozenset[tuple[str, int]]]
"""Axes that move together."""


def groups(model: nn.Module, *inputs: Tensor) -> Groups:
    """Of the parameters and statistics of a model."""
    return {frozenset(axes) for axes in equinorm.permutations(model, inputs).spec().perm_to_axes.values()}


def conv(name: str) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """Out- and in-axes of a convolution without bias."""
    return {(f"{name}.weight", 0)}, {(f"{name}.weight", 1)}


def norm(name: str) -> set[tuple[str, int]]:
    return {(f"{name}.{part}", 0) for part in ("weight", "bias", "running_mean", "running_var")}


def dense(name: str) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """Out- and in-axes of a layer with bias."""
    return {(f"{name}.weight", 0), (f"{name}.bias", 0)}, {(f"{name}.weight", 1)}


def chain(names: list[str]) -> Groups:
    """One layer's out-axes with the next one's in-axes."""
    return {frozenset(dense(a)[0] | dense(b)[1]) for a, b in itertools.pairwise(names)}


def test_multilayer_perceptron():
    widths = [784, 512, 512, 512, 10]
    with torch.device("meta"):
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())][:-1]
        found = groups(nn.Sequential(*layers), torch.randn(1, 784))
    assert found == chain(["0", "2", "4", "6"])


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        is_same = stride == 1 and into == out
        self.shortcut = (
            nn.Identity() if is_same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        blocks = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Block(*sizes) for sizes in blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def test_resnet20():
    with torch.device("meta"):
        found = groups(ResNet20(), torch.randn(2, 3, 32, 32))
    expected: Groups = set()
    streams = [conv("conv1")[0] | norm("bn1"), set(), set()]
    for number in range(9):
        name, stage = f"blocks.{number}", number // 3
        expected.add(frozenset(conv(f"{name}.conv1")[0] | norm(f"{name}.bn1") | conv(f"{name}.conv2")[1]))
        is_first = number in (3, 6)
        streams[stage - is_first] |= conv(f"{name}.conv1")[1]
        streams[stage] |= conv(f"{name}.conv2")[0] | norm(f"{name}.bn2")
        if is_first:
            streams[stage - 1] |= conv(f"{name}.shortcut.0")[1]
            streams[stage] |= conv(f"{name}.shortcut.0")[0] | norm(f"{name}.shortcut.1")
    streams[2] |= dense("linear")[1]
    assert found == expected | {frozenset(stream) for stream in streams}


needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")


@needs_torchvision
def test_vgg16():
    from zoo.from_torchvision import import_models

    with torch.device("meta"):
        found = groups(import_models().vgg16().eval(), torch.randn(1, 3, 224, 224))
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert found == chain([*(f"features.{number}" for number in convolutions), *(f"classifier.{n}" for n in (0, 3, 6))])


@needs_torchvision
def test_resnet50():
    from zoo.from_torchvision import import_models

    with torch.device("meta"):
        found = groups(import_models().resnet50(), torch.randn(2, 3, 64, 64))
    expected: Groups = set()
    streams = [conv("conv1")[0] | norm("bn1"), set(), set(), set(), set()]
    for stage, count in enumerate((3, 4, 6, 3), 1):
        for number in range(count):
            name = f"layer{stage}.{number}"
            expected.add(frozenset(conv(f"{name}.conv1")[0] | norm(f"{name}.bn1") | conv(f"{name}.conv2")[1]))
            expected.add(frozenset(conv(f"{name}.conv2")[0] | norm(f"{name}.bn2") | conv(f"{name}.conv3")[1]))
            streams[stage - (number == 0)] |= conv(f"{name}.conv1")[1]
            streams[stage] |= conv(f"{name}.conv3")[0] | norm(f"{name}.bn3")
        first = f"layer{stage}.0.downsample"
        streams[stage - 1] |= conv(f"{first}.0")[1]
        streams[stage] |= conv(f"{first}.0")[0] | norm(f"{first}.1")
    streams[4] |= dense("fc")[1]
    assert found == expected | {frozenset(stream) for stream in streams}


def test_axes_name_their_family():
    spec = equinorm.permutations(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(1, 3),)).spec()
    assert spec.axes_to_perm == {
        "0.weight": ("0.weight[0]", None),
        "0.bias": ("0.weight[0]",),
        "2.weight": (None, "0.weight[0]"),
        "2.bias": (None,),
    }
