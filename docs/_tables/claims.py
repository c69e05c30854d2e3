"""What was measured of the paper's claims: tables of test accuracies, and comparisons of two methods at every depth or batch
size of a preset. Methods are written as for `equinorm train --methods`; of several the held-out images choose.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from spread import mean_and_deviation

from equinorm.experiments.config import METHODS, Run, Sweep
from equinorm.experiments.presets import WITH_EXTRAS, preset
from equinorm.experiments.results import read
from equinorm.experiments.series import Series, experiments

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

MISSING = "not measured yet"

CHANCE = 0.11
"""Accuracy up to which a run on ten classes has learnt nothing."""


def table(file: str, name: str) -> str:
    """Methods by depth (batch size): mean ± standard deviation of the test accuracy in percent, and the learning rate."""
    sweep, series = preset(name), _series(file, preset(name))
    if not series:
        return f"*{MISSING.capitalize()}.*"
    places = list(_places(sweep))
    labels = list(dict.fromkeys(s.label for s in sorted(series, key=lambda s: [*METHODS].index(s.method))))
    rows = [f"| | {' | '.join(_at(sweep, place) for place in places)} |", "| --- |" + " ---: |" * len(places)]
    for label in labels:
        cells = []
        for place in places:
            found = next((s for s in series if s.label == label and (s.run.depth, s.run.batch) == place), None)
            cells.append("" if found is None else f"{_value(found)} <small>lr {found.run.lr:g}</small>")
        rows.append(f"| {label} | {' | '.join(cells)} |")
    seeds = max(len(s.results) for s in series)
    machines = ", ".join(sorted({str(s.results[0].source["processor"]) for s in series}))
    runs = "one seed" if seeds == 1 else f"up to {seeds} seeds"
    note = f"Test accuracy in percent after {sweep.base.epochs} epochs, {runs}; {machines}."
    return "\n".join([*rows, "", note])


def verdict(file: str, name: str, better: str, *worse: str) -> str:
    """Is one method at or above another? A cell for each place. Differences below two standard errors decide nothing.

    Of several variants of the other that counts which the held-out images choose.
    """
    sweep = preset(name)
    series = _series(file, sweep)
    cells = []
    for place in _places(sweep):
        one, two = (_find(series, sweep, method, place) for method in ((better,), worse))
        cells.append(f"*{MISSING}*" if one is None or two is None else _outcome(one, two))
    return " | ".join(cells)


def _outcome(one: Series, two: Series) -> str:
    gap = float(one.accuracies.mean() - two.accuracies.mean())
    error = math.hypot(*(_error(series) for series in (one, two)))
    if _diverged(one) != _diverged(two):  # a run at chance is no spread around the mean
        gap, error = _diverged(two) - _diverged(one), 0.0
    return "no difference" if abs(gap) <= 2 * error else "**holds**" if gap > 0 else "**does not hold**"


def accuracy(file: str, name: str, place: str, *methods: str) -> str:
    """Mean test accuracy in percent at one place of a preset, counted from 0; of several methods the held-out images choose."""
    sweep = preset(name)
    found = _find(_series(file, sweep), sweep, methods, list(_places(sweep))[int(place)])
    return MISSING if found is None else f"{found.accuracies.mean():.1f}"


def _series(file: str, sweep: Sweep) -> list[Series]:
    """Series of a file that belong to a preset's experiment."""
    path = RESULTS / file
    if not path.exists():
        return []
    same = ("data", "network", "width", "epochs", "augment", "bfloat16")
    found = [series for part in experiments(read(path)) for series in part.series]
    return [s for s in found if all(getattr(s.run, key) == getattr(sweep.base, key) for key in same)]


def _places(sweep: Sweep) -> Iterator[tuple[int, int]]:
    for depth in sweep.depths if sweep.base.network == "fc" else (Run().depth,):
        for batch in sweep.batches:
            yield depth, batch


def _at(sweep: Sweep, place: tuple[int, int]) -> str:
    """A place in words: 10 hidden layers, batch 16."""
    depth, batch = place
    return f"{depth + 1} hidden layers" if sweep.base.network == "fc" else f"batch {batch}"


def _find(series: list[Series], sweep: Sweep, methods: Sequence[str], place: tuple[int, int]) -> Series | None:
    """A method's series at one place; of several, if all are measured, the best on the held-out images."""
    found: list[Series] = []
    for method in methods:
        wanted = sweep.cell(method.replace("extras", WITH_EXTRAS), *place)
        own = [s for s in series if replace(s.run, lr=wanted.lr, seed=wanted.seed) == wanted]
        if not own:
            return None
        found += own
    return max(found, key=lambda s: max((value for value in s.tried.values() if value is not None), default=0.0), default=None)


def _value(series: Series) -> str:
    values, diverged = series.accuracies, _diverged(series)
    return mean_and_deviation(values, 2) + (f" ({diverged} of {len(values)} diverged)" if diverged else "")


def _diverged(series: Series) -> int:
    """Runs that ended in NaN, or at chance as when all units have died."""
    return sum(result.diverged or result.accuracy <= CHANCE for result in series.results)


def _error(series: Series) -> float:
    """Standard error of the mean; that of one run is taken as half a percent."""
    values = series.accuracies
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.5


MARKERS = {"results": table, "verdict": verdict, "accuracy": accuracy}
