"""The paper's networks, each without normalization or with batch, group or weight normalization.

All weights are drawn from N(0, 2 / fan-in) (He et al., 2015); biases start at 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from equinorm.experiments.config import METHODS, ExperimentError, Run

GROUPS = 32

_CENTRED = (1 - 1 / math.pi) ** -0.5
"""Centred weights pass on the variance of a rectified normal variable, not its mean square; they start so much larger."""

Norm = Callable[[int], list[nn.Module]]
"""From a number of channels to the layers that normalise them: one or none."""


def build(run: Run, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network of a run; weights are drawn from torch's global generator."""
    method = METHODS[run.method]
    norm = _norm(method.norm, run.network == "fc")
    if run.network == "fc":
        model = fully_connected(shape, classes, run.depth, run.width, run.biases, norm)
    elif run.network == "conv":
        model = fully_convolutional(shape[0], classes, run.width, run.biases, norm)
    else:
        model = ResNet(run.network, shape, classes, run.width, run.biases, norm)
    weighted = [*layers_of(model).values()]
    for layer in weighted:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for weight in centred(model, run):
        centre_(weight).data.mul_(_CENTRED)
    weighted[-1].weight.data.mul_(run.head)
    if isinstance(model, ResNet):
        if run.identity:
            model.start_skips_at_identity_()
        if method.norm == "none":
            model.temper_(run.identity)
        model.shrink_branches_(run.branch)
    if method.weight_norm:
        for layer in weighted:
            weight_norm(layer)
    return model


def layers_of(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and convolution layers by name, from the inputs on."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def matrices_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of more than one axis by name, from the inputs on; of a weight normalization the direction."""
    named = model.named_parameters()
    return {name: weight for name, weight in named if name.endswith(("weight", "original1")) and weight.dim() > 1}


def centred(model: nn.Module, run: Run) -> list[nn.Parameter]:
    """Weights that are kept without a mean: all but the first, the last, and skips that start at the identity."""
    inner = [*matrices_of(model).items()][1:-1]
    return [weight for name, weight in inner if run.centred and not (run.identity and ".skip." in name)]


@torch.no_grad()
def centre_(weight: Tensor) -> Tensor:
    """Subtract each neuron's mean over its fan-in, in place."""
    return weight.sub_(weight.mean(tuple(range(1, weight.dim())), keepdim=True))


@torch.no_grad()
def clip_units_(weight: Tensor, most: float) -> None:
    """Shorten the gradient of each neuron to so many times its weights' norm, in place (Brock et al., 2021)."""
    if weight.grad is None:
        return
    own, gradient = (tensor.flatten(1).norm(dim=1) for tensor in (weight, weight.grad))
    factors = (most * own.clamp(min=1e-3) / gradient).clamp(max=1.0)  # 0 / 0 cannot be: a positive number over 0 is infinite
    weight.grad.mul_(factors.view(-1, *[1] * (weight.dim() - 1)))


def _norm(kind: str, flat: bool) -> Norm:
    def layers(channels: int) -> list[nn.Module]:
        if kind == "batch":
            return [nn.BatchNorm1d(channels) if flat else nn.BatchNorm2d(channels)]
        if kind == "group":
            return [nn.GroupNorm(groups(channels, 16 if flat else 2), channels)]
        return []

    return layers


def groups(channels: int, least: int) -> int:
    """The largest number of groups up to 32 that divides the channels and leaves at least so many in each."""
    return next((count for count in range(GROUPS, 1, -1) if channels % count == 0 and channels // count >= least), 1)


def fully_connected(shape: tuple[int, int, int], classes: int, depth: int, width: int, biases: bool, norm: Norm) -> nn.Module:
    """inputs-width-[width]*depth-classes, normalised before each ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(shape)
    for _ in range(depth + 1):
        layers += [nn.Linear(features, width, bias=biases), *norm(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes, bias=biases))


def fully_convolutional(channels: int, classes: int, width: int, biases: bool, norm: Norm) -> nn.Module:
    """Gitman and Ginsburg's network; widths are width × (1, 2, 2.5), 128 in the paper.

    Normalised after the third convolution of each of the first two blocks.
    """
    if width % 2:
        raise ExperimentError(f"the fully convolutional network needs an even width, not {width}.")
    layers: list[nn.Module] = []
    for out in (width, 2 * width):
        for position in range(3):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=biases), *(norm(out) if position == 2 else []), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(3, 2))
    for out, kernel in ((5 * width // 2, 3), (5 * width // 2, 1), (classes, 1)):
        layers += [nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=biases), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Block(nn.Module):
    """relu(skip(x) + branch(x)); the skip is a 1 × 1 convolution where the shape changes, or everywhere (type C)."""

    def __init__(self, branch: list[nn.Module], skip: list[nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.skip = nn.Sequential(*skip)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The sum, rectified."""
        return self.relu(self.skip(x) + self.branch(x))


class ResNet(nn.Module):
    """ResNet-18 or 50, with a 3 × 3 stem for images below 64 pixels and ImageNet's stem for others.

    "resnet18c" has learned projections on every residual connection (type C), the others where shapes change.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], classes: int, width: int, biases: bool, norm: Norm) -> None:
        super().__init__()
        wide, everywhere = name == "resnet50", name.endswith("c")
        counts = (3, 4, 6, 3) if wide else (2, 2, 2, 2)

        def convolution(into: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=biases), *norm(out)]

        small = min(shape[1:]) < 64
        stem = convolution(shape[0], width, 3) if small else convolution(shape[0], width, 7, 2)
        self.stem = nn.Sequential(*stem, nn.ReLU(), *([] if small else [nn.MaxPool2d(3, 2, 1)]))
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(counts):
            inner, out = width << stage, (width << stage) * (4 if wide else 1)
            for position in range(count):
                stride = 2 if stage and not position else 1
                if wide:
                    branch = [
                        *convolution(channels, inner, 1),
                        nn.ReLU(),
                        *convolution(inner, inner, 3, stride),
                        nn.ReLU(),
                        *convolution(inner, out, 1),
                    ]
                else:
                    branch = [*convolution(channels, inner, 3, stride), nn.ReLU(), *convolution(inner, out, 3)]
                project = everywhere or stride > 1 or channels != out
                blocks.append(Block(branch, convolution(channels, out, 1, stride) if project else []))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)  # with biases everywhere, as is usual

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.pool(self.blocks(self.stem(x))))

    @torch.no_grad()
    def shrink_branches_(self, factor: float) -> None:
        """Multiply what ends each residual branch: a normalization's gain, or a convolution (De, Smith, 2020)."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.branch[-1].get_parameter("weight").mul_(factor)

    def start_skips_at_identity_(self) -> None:
        """Let each learned skip hand on its channels as they are, in turn where it has more outputs than inputs."""
        for block in self.blocks:
            assert isinstance(block, Block)
            if len(block.skip):
                weight = block.skip[0].get_parameter("weight")
                nn.init.dirac_(weight, groups=weight.size(0) // weight.size(1))

    @torch.no_grad()
    def temper_(self, identity: bool) -> None:
        """Keep the variance of the residual stream bounded in a network that nothing normalises.

        With a learned skip both summands shrink by √2; with an identity skip the branch shrinks by the root of the number of
        blocks.

        Args:
            identity: learned skips start at the identity.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            last = [layer for layer in block.branch if isinstance(layer, nn.Conv2d)][-1]
            if len(block.skip) and not identity:
                for layer in (last, block.skip[0]):
                    layer.get_parameter("weight").mul_(math.sqrt(0.5))
            else:
                last.weight.mul_(len(self.blocks) ** -0.5)
