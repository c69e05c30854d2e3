"""Results put together by what varies: curves over depth, batch size or epochs, with mean and standard deviation over seeds."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from equinorm.experiments.config import DEFAULTS, EXTRAS, METHODS, Run, asymmetry
from equinorm.experiments.results import Result

_SHARED = ("data", "network", "width", "epochs", "augment", "bfloat16")
_APART = (*_SHARED, "method", "depth", "batch", "lr", "held_out", "seed")


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Final runs of one configuration, one for each seed.

    Attributes:
        label: method, with the options in which the experiment's runs differ.
        method: its name in `METHODS`.
        variant: counts the configurations of one method.
        run: of the first seed.
        results: ordered by seed.
        tried: held-out accuracy by learning rate in the longest search; None for a run that diverged.
    """

    label: str
    method: str
    variant: int
    run: Run
    results: tuple[Result, ...]
    tried: dict[float, float | None]

    @property
    def accuracies(self) -> np.ndarray:
        """Test accuracy of each seed in percent."""
        return np.array([100 * result.accuracy for result in self.results])

    def curve(self, name: str) -> np.ndarray:
        """Seeds by epochs of `loss`, `accuracy` (in percent) or `residuals`; after a run diverged chance or NaN."""
        curves = [list(getattr(result.curves, name)) for result in self.results]
        length = max(map(len, curves), default=0)
        rest = [curve[-1] if name == "accuracy" and curve else np.nan for curve in curves]  # diverged: chance for good
        padded = np.array([curve + [last] * (length - len(curve)) for curve, last in zip(curves, rest, strict=True)])
        return 100 * padded if name == "accuracy" else padded


@dataclass(frozen=True, slots=True, eq=False)
class Experiment:
    """Series that may be compared: the same data, network, number of epochs, and dtype of products.

    Attributes:
        name: for file names.
        title: in words.
        series: by depth, batch size and method.
    """

    name: str
    title: str
    series: tuple[Series, ...]

    @property
    def depths(self) -> list[int]:
        """All depths."""
        return sorted({series.run.depth for series in self.series})

    @property
    def batches(self) -> list[int]:
        """All batch sizes."""
        return sorted({series.run.batch for series in self.series})

    def at(self, depth: int, batch: int) -> list[Series]:
        """The methods at one depth and batch size."""
        return [series for series in self.series if (series.run.depth, series.run.batch) == (depth, batch)]


def experiments(results: Iterable[Result]) -> list[Experiment]:
    """Sort results into experiments, in the order in which they first appear.

    Where a configuration has final runs at several learning rates, those that came last count.
    """
    found = list(results)
    grouped: dict[tuple, list[Result]] = {}
    for result in found:
        if not result.run.held_out:
            key = (*(getattr(result.run, name) for name in _SHARED), result.digest)
            grouped.setdefault(key, []).append(result)
    named: dict[str, int] = {}
    made = []
    for final in grouped.values():
        run = final[0].run
        name = f"{run.data}-{run.network}"
        named[name] = named.get(name, 0) + 1
        name += f"-{named[name]}" if named[name] > 1 else ""
        width = f", width {run.width}" if run.width != DEFAULTS["width"] else ""
        title = f"{_DATA[run.data]}, {_NETWORKS[run.network]}{width}, {run.epochs} epochs"
        made.append(Experiment(name, title, tuple(_series(final, found))))
    return made


_DATA = {"digits": "Digits", "cifar10": "CIFAR-10", "images": "Folder of images"}
_NETWORKS = {
    "fc": "fully connected",
    "conv": "fully convolutional",
    "resnet18c": "ResNet-18 type C",
    "resnet18": "ResNet-18, identity skips",
    "resnet50": "ResNet-50, identity skips",
}


def _series(final: Sequence[Result], found: Sequence[Result]) -> list[Series]:
    """Final runs of one experiment by configuration; searches are looked up among all results."""
    cells, searches = _by_configuration(final), _searches(found)
    by_depth = _follows_asymmetry(cells)
    options = {key: _options(replace(key, c=0.0) if key in by_depth else key) for key in cells}
    differ = _differing(options)
    variants: dict[str, list[_Options]] = {}
    for key in cells:
        kinds = variants.setdefault(key.method, [])
        if options[key] not in kinds:
            kinds.append(options[key])
    made = []
    for key, members in cells.items():
        kinds = variants[key.method]
        results = tuple(sorted(members, key=lambda member: member.run.seed))
        label, variant = _label(key.method, options[key], differ), kinds.index(options[key])
        made.append(Series(label, key.method, variant, results[0].run, results, searches.get(replace(key, epochs=0), {})))
    order = list(METHODS)
    return sorted(made, key=lambda s: (s.run.depth, s.run.batch, order.index(s.method), s.variant))


def _by_configuration(final: Sequence[Result]) -> dict[Run, list[Result]]:
    """Final runs of each configuration; those at another learning rate that came last count."""
    cells: dict[Run, list[Result]] = {}
    for result in final:
        key = replace(result.run, lr=0.0, seed=0)
        if key in cells and cells[key][0].run.lr != result.run.lr:
            del cells[key]
        cells.setdefault(key, []).append(result)
    return cells


def _searches(found: Sequence[Result]) -> dict[Run, dict[float, float | None]]:
    """Held-out accuracy by learning rate in the longest search of each configuration; short ones do not compare with it."""
    by_length: dict[Run, dict[int, dict[float, float | None]]] = {}
    for result in found:
        if result.run.held_out:
            key = replace(result.run, lr=0.0, seed=0, held_out=False, epochs=0)
            by_lr = by_length.setdefault(key, {}).setdefault(result.run.epochs, {})
            by_lr[result.run.lr] = None if result.diverged else result.accuracy
    return {key: lengths[max(lengths)] for key, lengths in by_length.items()}


_NAMES = [name for name in DEFAULTS if name not in _APART]
"""Options that tell the variants of one method apart."""

_Options = tuple[Any, ...]
"""Their values."""


def _options(run: Run) -> _Options:
    return tuple(getattr(run, name) for name in _NAMES)


def _differing(options: Mapping[Run, _Options]) -> set[str]:
    """Options in which runs that use them differ, be it from another method's."""
    found: dict[str, set[Any]] = {}
    for run, values in options.items():
        for name in set(_NAMES).difference(run.unused):
            found.setdefault(name, set()).add(values[_NAMES.index(name)])
    return {name for name, values in found.items() if len(values) > 1}


def _label(method: str, options: _Options, differ: Set[str]) -> str:
    """The method's name, and its options among those that `differ`, but for defaults."""
    given = dict(zip(_NAMES, options, strict=True))
    told = {name: value for name, value in given.items() if name in differ and value != DEFAULTS[name]}
    words = []
    if told.keys() & EXTRAS.keys() and EXTRAS.items() <= given.items():
        told = {name: value for name, value in told.items() if name not in EXTRAS}
        words.append("with extras")
    words += ["c by depth" if name == "c" and value == 0 else f"{name}={value:g}" for name, value in told.items()]
    return METHODS[method].label + (" " + ", ".join(words) if words else "")


def _follows_asymmetry(cells: Iterable[Run]) -> set[Run]:
    """Those that differ in c alone, and that as `asymmetry` of their depths: one variant."""
    alike: dict[Run, list[Run]] = {}
    for key in cells:
        alike.setdefault(replace(key, depth=0, batch=0, c=0.0), []).append(key)
    groups = [keys for keys in alike.values() if len({key.c for key in keys}) > 1]
    return {key for keys in groups for key in keys if all(other.c == asymmetry(other.depth) for other in keys)}
