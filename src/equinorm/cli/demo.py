"""The demonstration: a network trained on digits is unbalanced and balanced, and predicts the same throughout."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equinorm._deviation import deviation
from equinorm._modules import duplicate
from equinorm._symmetries import Symmetries, symmetries
from equinorm.cli.exactness import VERIFYING, balancing
from equinorm.cli.loading import Loaded
from equinorm.cli.records import Balancing, Weights
from equinorm.cli.weights import InputError

WIDTHS = (64, 128, 128, 64, 10)
DECADES = 2.0
"""Neurons are unbalanced by 10^U(−DECADES, DECADES)."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The network at one point of the demonstration."""

    name: str
    accuracy: float
    norm: float
    residual: float
    predictions_changed: int


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Record of `equinorm demo`.

    Attributes:
        network: widths of its layers.
        parameters: how many it has.
        images: how many images were predicted, training and test images together.
        test_images: of how many the accuracy is.
        epochs: of training.
        seconds: of training.
        stages: trained, unbalanced and balanced network; `predictions_changed` against the trained one.
        predictions_unchanged: predictions of the balanced network that are those of the trained one.
        outputs: how many numbers the networks put out on all images.
        outputs_equal: how many are bitwise the same after balancing with powers of two.
        deviation_power_of_two: largest relative deviation with powers of two; 0 is bitwise.
        balancing: record of balancing the unbalanced network, with its deviation over all images.
        report: where the report was written.
    """

    network: str
    parameters: int
    images: int
    test_images: int
    epochs: int
    seconds: float
    stages: tuple[Stage, ...]
    predictions_unchanged: int
    outputs: int
    outputs_equal: int
    deviation_power_of_two: float
    balancing: Balancing
    report: str | None = None


def demonstrate(
    epochs: int = 20, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> tuple[Demonstration, list[Weights]]:
    """Run the demonstration; returns its record and the weights to picture.

    Args:
        epochs: of training.
        seed: of the weights, the order of images and the random scales.
        say: called with what happens next.

    Raises:
        InputError: if scikit-learn is not installed.
    """
    images, labels, held_out = _digits(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        say("training on scikit-learn's digits")
        started = time.perf_counter()
        model = _network()
        _train(model, images[~held_out], labels[~held_out], epochs)
        seconds = time.perf_counter() - started
        say("unbalancing every hidden neuron")
        found = symmetries(model, (images,))
        expected = _predict(model, images)
        stages = [_stage("trained", found, images, labels, held_out, expected)]
        found.rescale_((2 * torch.rand(found.num_free, dtype=torch.float64) - 1) * DECADES * math.log(10))
        stages.append(_stage("unbalanced", found, images, labels, held_out, expected))
    say("balancing")
    unbalanced, twin = duplicate(model, VERIFYING), duplicate(model, VERIFYING)
    record, pictures = balancing(Loaded("digits", model, (images,)), found)
    stages.append(_stage("balanced", found, images, labels, held_out, expected))
    say("balancing by powers of two")
    balancing(Loaded("digits", twin, (images,)), symmetries(twin, (images,)), power_of_two=True)
    with torch.no_grad():
        outputs, exact = unbalanced(images), twin(images)
    return Demonstration(
        network="-".join(map(str, WIDTHS)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        images=len(images),
        test_images=int(held_out.sum()),
        epochs=epochs,
        seconds=seconds,
        stages=tuple(stages),
        predictions_unchanged=int((_predict(model, images) == expected).sum()),
        outputs=outputs.numel(),
        outputs_equal=int((outputs == exact).sum()),
        deviation_power_of_two=deviation(twin, unbalanced, (images,)),
        balancing=record,
    ), pictures


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images in [0, 1], their labels, and which fifth of them is held out for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the demo needs scikit-learn for its images of digits, and it is not installed: pip install 'equinorm[demo]'."
        ) from error
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 16, dtype=torch.float32), torch.tensor(target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[order[: len(images) // 5]] = True
    return images, labels, held_out


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices so small are only slowed down by more
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    optimizer.zero_grad()
    torch.set_num_threads(threads)


def _predict(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def _stage(name: str, found: Symmetries, images: Tensor, labels: Tensor, held_out: Tensor, expected: Tensor) -> Stage:
    predictions = _predict(found.model, images)
    still = found.balance(cycles=0)
    accuracy = float((predictions == labels)[held_out].double().mean())
    return Stage(name, accuracy, still.norm_before, still.residual, int((predictions != expected).sum()))
