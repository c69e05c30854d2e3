"""`equinorm demo`: a network for digits is unbalanced and balanced, and predicts the same throughout; then what 8 bits cost."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor, nn

from equinorm._deviation import deviation
from equinorm._symmetries import Symmetries, symmetries
from equinorm.balancing.options import BalanceOptions
from equinorm.cli.exactness import VERIFYING
from equinorm.cli.loading import Loaded
from equinorm.cli.options import Debug, Force, Json, Result
from equinorm.cli.terminal import Steps, run
from equinorm.cli.verified_balance import Balancing, drawn, energies, verified_balance
from equinorm.cli.weights import InputError
from equinorm.modules.copying import duplicate
from equinorm.quantization.equalize import equalize
from equinorm.reporting import words
from equinorm.reporting.files import REPORTS, check_target, write_atomically
from equinorm.reporting.records import Weights
from equinorm.reporting.tables import facts, table

REPORT = Path("equinorm-demo.html")
"""Replaced without asking: every demonstration writes it."""

WIDTHS = (64, 128, 128, 64, 10)
SCHEME = "w8a8-tensor"
"""Weights and activations have 8 bits, and each tensor one step."""

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
class Integers:
    """The unbalanced network with weights and activations rounded, before and after it is equalized.

    Attributes:
        scheme: how it is rounded.
        accuracy_before: on the test images.
        accuracy_after: of the equalized network, rounded in the same way.
        seconds: of equalizing.
    """

    scheme: str
    accuracy_before: float
    accuracy_after: float
    seconds: float


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
        integers: the unbalanced network rounded to 8 bits, and what equalizing makes of it.
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
    integers: Integers
    report: str | None = None


def demo(
    report: Annotated[Path, typer.Option(help="Where to write the report: .html or .png.")] = REPORT,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train, unbalance and balance a small network: every prediction stays. Then round it to 8 bits.

    Needs scikit-learn, no arguments and no network. The default report is replaced if it exists.
    """

    def work(steps: Steps) -> Result:
        replaces = force or report == REPORT
        check_target(report, REPORTS, replaces)
        record, pictures = demonstrate(say=steps.say)
        write_atomically([(report, drawn(report, record.balancing, pictures))], replaces)
        record = replace(record, report=str(report))
        return record, shown(record), int(record.predictions_unchanged < record.images)

    run(work, json, debug)


class _Digits(NamedTuple):
    """Images in [0, 1], their labels, and which of them are held out for testing."""

    images: Tensor
    labels: Tensor
    held_out: Tensor

    def accuracy(self, predictions: Tensor) -> float:
        """On those held out."""
        return float((predictions == self.labels)[self.held_out].double().mean())


def demonstrate(epochs: int = 20, say: Callable[[str], None] = lambda text: None) -> tuple[Demonstration, list[Weights]]:
    """Run the demonstration; returns its record and the weights to picture.

    Args:
        epochs: of training.
        say: called with what happens next.

    Raises:
        InputError: if scikit-learn is not installed.
    """
    digits = _digits()
    images = digits.images
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        say("training on scikit-learn's digits")
        started = time.perf_counter()
        model = _network()
        _train(model, images[~digits.held_out], digits.labels[~digits.held_out], epochs)
        seconds = time.perf_counter() - started
        say("unbalancing every hidden neuron")
        found = symmetries(model, (images,))
        expected = _predict(model, images)
        stages = [_stage("trained", found, digits, expected)]
        found.rescale_((2 * torch.rand(found.num_free, dtype=torch.float64) - 1) * DECADES * math.log(10))
        stages.append(_stage("unbalanced", found, digits, expected))
    say("balancing")
    unbalanced, twin, options = duplicate(model, VERIFYING), duplicate(model, VERIFYING), BalanceOptions(compile=None)
    record, pictures = verified_balance(Loaded("digits", model, (images,)), found, options)
    stages.append(_stage("balanced", found, digits, expected))
    say("balancing by powers of two")
    verified_balance(Loaded("digits", twin, (images,)), symmetries(twin, (images,)), options, power_of_two=True)
    with torch.no_grad():
        outputs, exact = unbalanced(images), twin(images)
    say("rounding to 8 bits")
    integers = _rounded(unbalanced, digits)
    return Demonstration(
        network="-".join(map(str, WIDTHS)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        images=len(images),
        test_images=int(digits.held_out.sum()),
        epochs=epochs,
        seconds=seconds,
        stages=tuple(stages),
        predictions_unchanged=int((_predict(model, images) == expected).sum()),
        outputs=outputs.numel(),
        outputs_equal=int((outputs == exact).sum()),
        deviation_power_of_two=deviation(twin, unbalanced, (images,)),
        balancing=record,
        integers=integers,
    ), pictures


def _rounded(model: nn.Module, digits: _Digits) -> Integers:
    """What one 8-bit step for each tensor makes of a network, and of the equalized one."""
    calibration = [(digits.images[~digits.held_out],)]
    result = equalize(model.eval(), (digits.images,), calibration=calibration, scheme=SCHEME)
    with torch.no_grad():
        before, after = (digits.accuracy(outputs.argmax(1)) for outputs in result.simulated(digits.images))
    return Integers(SCHEME, before, after, sum(result.seconds.values()))


def shown(record: Demonstration) -> RenderableType:
    """What `equinorm demo` prints."""
    done, exact = record.balancing, f"{record.deviation_power_of_two:.1g}"
    proof = facts(
        [
            ("predictions", f"{record.predictions_unchanged:,} of {record.images:,} unchanged"),
            ("deviation", f"{words.deviation(done.deviation)} with real scales; limit {done.limit:g} in {done.dtype}"),
            ("powers of two", f"{record.outputs_equal:,} of {record.outputs:,} outputs bitwise the same, deviation {exact}"),
            ("balanced in", f"{done.cycles} cycles, {done.seconds:.2f} s: {done.reason}"),
            ("in 8 bits", _in_words(record.integers)),
        ]
    )
    return Group(
        facts(
            [
                ("network", f"{record.network} with ReLU, {record.parameters:,} parameters, {done.num_free:,} free classes"),
                ("training", f"{record.epochs} epochs on scikit-learn's digits, {record.seconds:.1f} s"),
            ]
        ),
        Text(),
        _stages(record),
        proof,
        Text(),
        energies(done.energies, done.energy_before, done.energy_after, done.p, done.c),
        facts([("report", record.report)]),
    )


def _stages(record: Demonstration) -> RenderableType:
    """The network as it was trained, unbalanced and balanced."""
    norm = f"{words.norm_name(record.balancing.p)} norm"
    columns = [("", False), *((name, True) for name in ("test accuracy", norm, "residual", "predictions changed"))]
    rows = [
        (
            stage.name,
            words.percent(stage.accuracy, 1),
            words.number(stage.norm),
            f"{stage.residual:.1e}",
            f"{stage.predictions_changed:,} of {record.images:,}",
        )
        for stage in record.stages
    ]
    return table("The same function, three sets of weights", columns, rows)


def _in_words(found: Integers) -> str:
    before, after = (words.percent(value, 1) for value in (found.accuracy_before, found.accuracy_after))
    return f"test accuracy {before} unbalanced, {after} after equinorm.equalize ({found.scheme}, {found.seconds:.2f} s)"


def _digits() -> _Digits:
    """Those of scikit-learn, a fifth of them held out for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the demo needs scikit-learn for its images of digits, and it is not installed. Run pip install scikit-learn."
        ) from error
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 16, dtype=torch.float32), torch.tensor(target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[order[: len(images) // 5]] = True
    return _Digits(images, labels, held_out)


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


def _stage(name: str, found: Symmetries, digits: _Digits, expected: Tensor) -> Stage:
    predictions, still = _predict(found.model, digits.images), found.balance(cycles=0)
    return Stage(name, digits.accuracy(predictions), still.norm_before, still.residual, int((predictions != expected).sum()))
