"""What the pictures of results share: colours, names, limits, legends."""

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from equinorm.experiments.series import Experiment, Series
from equinorm.reporting.style import FAINT

COLORS = {
    "baseline": "#7d8793",
    "bn": "#d9772b",
    "gn": "#4f9d4a",
    "wn": "#b58fc9",
    "wn_bn": "#8a5a44",
    "path_sgd": "#c9a400",
    "pathcond": "#d36b9c",
    "balanced": "#5c6b7a",
    "enorm": "#12507b",
    "enorm_exact": "#3f97d1",
    "enorm_bn": "#a5282c",
    "enorm_gn": "#1f7a68",
}
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
PICTURED = [*dict.fromkeys(("baseline", "enorm", "enorm_exact", "bn", "enorm_bn", "path_sgd", "gn", "pathcond", *COLORS))]
"""Whose weights are pictured first."""

MARKERS = ("o", "s", "^", "D", "v", "P")
PANELS = 6
"""Panels in a row; of more depths or batch sizes some are left out, evenly."""


def panels(experiment: Experiment) -> list[tuple[str, list[Series]]]:
    """One plot for each depth and batch size."""
    places = [(depth, batch) for depth in experiment.depths for batch in experiment.batches if experiment.at(depth, batch)]
    if len(places) > PANELS:
        places = [places[round(i * (len(places) - 1) / (PANELS - 1))] for i in range(PANELS)]
    return [(where(experiment.at(*place)[0]), experiment.at(*place)) for place in places]


def where(series: Series) -> str:
    """Depth and batch size in words."""
    run = series.run
    return (f"{run.hidden_layers} hidden layers, " if run.network == "fc" else "") + f"batch {run.batch}"


def by_label(chosen: Sequence[Series]) -> dict[str, list[Series]]:
    """Series of one label at several depths or batch sizes."""
    found: dict[str, list[Series]] = {}
    for series in chosen:
        found.setdefault(series.label, []).append(series)
    return found


def layers(series: Series) -> list[str]:
    """Names of the weights, from the inputs on."""
    return list(series.results[0].curves.norms)


def pictured(series: Series) -> bool:
    """Whether its first seed kept pictures of weights."""
    return bool(series.results[0].pictures)


def deviation(values: np.ndarray) -> float:
    """Standard deviation over seeds; 0 for one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def look(series: Series) -> dict[str, Any]:
    """How its lines are drawn: colour by method, dashes by variant."""
    ours = bool(series.method.startswith("enorm"))
    dash = _DASHES[series.variant % len(_DASHES)]
    return {"color": COLORS[series.method], "linestyle": dash, "linewidth": 2.0 if ours else 1.4, "zorder": 3 if ours else 2}


def curve(axis: Axes, series: Series, name: str) -> None:
    """Mean and standard deviation over the seeds that have not diverged yet."""
    values = series.curve(name)
    if name == "residuals":
        values = np.maximum(values, 1e-16)
    with warnings.catch_warnings():  # of epochs that no seed reached
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = np.nanmean(values, 0)
        spread = np.nanstd(values, 0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    epochs = np.arange(len(mean)) + (name != "residuals")
    style = look(series)
    axis.plot(epochs, mean, **style)
    if name != "residuals":
        axis.fill_between(epochs, mean - spread, mean + spread, color=style["color"], alpha=0.08, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def limit(axis: Axes, arrays: Sequence[np.ndarray], top: bool) -> None:
    """Cut off what only the first epochs show, and accuracies at chance where others are not."""
    later = np.concatenate([array[:, array.shape[1] // 5 :].ravel() for array in arrays])
    later = later[np.isfinite(later)]
    if not later.size:
        return
    low, high = (later.min(), np.quantile(later, 0.99)) if top else (lowest(later), later.max())
    margin = 0.06 * (high - low) or 1.0
    axis.set_ylim(low - margin, high + margin if top else min(high + margin, 101.0))


def lowest(accuracies: np.ndarray) -> float:
    """The least accuracy that is worth an axis: what is below 60 % of the best has failed."""
    return float(accuracies[accuracies >= 0.6 * accuracies.max()].min())


def grid(axis: Axes) -> None:
    """Faint horizontal lines behind everything."""
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)


def single(experiment: Experiment, width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    heading(figure, experiment)
    return figure, figure.subplots()


def heading(figure: Figure, experiment: Experiment, more: str = "") -> None:
    """What was trained, for how long, with how many seeds."""
    seeds = {len(series.results) for series in experiment.series}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    text = f"{experiment.title}, {count} seed" + ("" if count == "1" else "s")
    figure.suptitle(text + (f"\n{more}" if more else ""), x=0.01, ha="left", fontsize=10, weight="bold")


def handles(members: Sequence[Series]) -> tuple[list[Any], list[str]]:
    """Lines and names for a legend, each method once."""
    unique = {series.label: series for series in sorted(members, key=lambda s: (list(COLORS).index(s.method), s.variant))}
    lines = []
    for series in unique.values():
        style = look(series)
        lines.append(Line2D([], [], color=style["color"], linestyle=style["linestyle"], linewidth=style["linewidth"]))
    return lines, list(unique)


def legend(figure: Figure, members: Sequence[Series]) -> None:
    """One legend below all plots, in as many columns as fit; the figure grows by what it takes."""
    lines, labels = handles(members)
    labels = [textwrap.fill(label, 46) for label in labels]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    columns = max(1, min(6, len(labels), int(figure.get_figwidth() / (0.075 * longest + 0.6))))
    rows = sum(max(label.count("\n") + 1 for label in labels[i : i + columns]) for i in range(0, len(labels), columns))
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, rows - 2))
    figure.legend(lines, labels, loc="outside lower center", ncols=columns)


def name_ends(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the last points, moved apart where they would overlap; what lies below the axis says so."""
    low, high = axis.get_ylim()
    ends = sorted(((x, value, textwrap.fill(label, 34), color) for x, value, label, color in ends), key=lambda end: end[1])
    halves = [0.025 * (high - low) * (1 + 0.75 * label.count("\n")) for _, _, label, _ in ends]
    places = [max(value, low + half) for (_, value, _, _), half in zip(ends, halves, strict=True)]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + halves[i - 1] + halves[i])
    for i in reversed(range(len(places))):
        top = high if i == len(places) - 1 else places[i + 1] - halves[i + 1]
        places[i] = min(places[i], top - halves[i])
    for (x, value, label, color), place in zip(ends, places, strict=True):
        below = value < low
        arrow = {"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        axis.annotate(
            f"{label} ({value:.1f} ↓)" if below else label,
            (x, value),
            xytext=(1.03, place),
            textcoords=("axes fraction", "data"),
            color=color,
            va="center",
            fontsize=8.5,
            arrowprops=None if below else arrow,
            annotation_clip=False,
        )
