"""Results as pictures. Renders to bytes; touches no files."""

import textwrap
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from equinorm.experiments.plot_parts import (
    COLORS,
    MARKERS,
    PANELS,
    PICTURED,
    by_label,
    curve,
    deviation,
    grid,
    handles,
    heading,
    layers,
    legend,
    limit,
    look,
    name_ends,
    panels,
    pictured,
    single,
    where,
)
from equinorm.experiments.series import Experiment, Series
from equinorm.experiments.thumbnails import decode
from equinorm.reporting.style import FAINT, INK, STYLE, render


def pictures(experiment: Experiment) -> dict[str, bytes]:
    """Every picture that the results allow, by name."""
    makers: dict[str, tuple[bool, Callable[[Experiment], Figure]]] = {
        "accuracy-depth": (len(experiment.depths) > 1, depths),
        "accuracy-batch": (len(experiment.batches) > 1, batches),
        "accuracy": (len(experiment.depths) == len(experiment.batches) == 1, overview),
        "learning-curves": (True, curves),
        "learning-rates": (any(series.tried for series in experiment.series), rates),
        "norms": (True, norms),
        "weights": (any(pictured(series) for series in experiment.series), weights),
    }
    with matplotlib.rc_context(STYLE):
        return {name: render(make(experiment)) for name, (possible, make) in makers.items() if possible}


def overview_png(experiment: Experiment) -> bytes:
    """The one picture of `equinorm train`."""
    with matplotlib.rc_context(STYLE):
        if len(experiment.depths) > 1:
            return render(depths(experiment))
        return render(batches(experiment) if len(experiment.batches) > 1 else overview(experiment))


# ---------------------------------------------------------------------------------------------------------------- accuracy


def depths(experiment: Experiment) -> Figure:
    """Test accuracy against depth."""
    batch = experiment.batches[-1]
    chosen = [series for series in experiment.series if series.run.batch == batch]
    return _against(experiment, chosen, lambda series: series.run.hidden_layers, "hidden layers", log=False)


def batches(experiment: Experiment) -> Figure:
    """Test accuracy against batch size."""
    depth = experiment.depths[-1]
    chosen = [series for series in experiment.series if series.run.depth == depth]
    return _against(experiment, chosen, lambda series: series.run.batch, "batch size", log=True)


def _against(experiment: Experiment, chosen: Sequence[Series], x: Callable[[Series], int], title: str, log: bool) -> Figure:
    figure, axis = single(experiment, 8.4, 4.8)
    ends, shown = [], [np.zeros(0)]
    for label, members in by_label(chosen).items():
        members = sorted(members, key=x)
        places = np.array([x(series) for series in members], float)
        means = np.array([series.accuracies.mean() for series in members])
        spread = np.array([deviation(series.accuracies) for series in members])
        style = look(members[0])
        stable = np.array([not any(result.diverged for result in series.results) for series in members])
        axis.fill_between(places, means - spread, means + spread, stable, color=style["color"], alpha=0.08, linewidth=0)
        axis.plot(places, means, marker=MARKERS[members[0].variant % len(MARKERS)], markersize=4.5, **style)
        ends.append((places[-1], means[-1], label, style["color"]))
        shown += [(means + spread)[stable], (means - spread)[stable]]
    ticks = sorted({x(series) for series in chosen})
    if log:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel(title)
    axis.set_ylabel("test accuracy (%)")
    grid(axis)
    axis.margins(x=0.02)
    limit(axis, [np.concatenate(shown)[:, None]], top=False)
    name_ends(axis, ends)
    return figure


def overview(experiment: Experiment) -> Figure:
    """One depth and batch size: accuracy after each epoch, and of the final weights of every seed."""
    figure = Figure(figsize=(10, 0.9 + max(3.4, 0.34 * len(experiment.series))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    heading(figure, experiment)
    for series in experiment.series:
        curve(left, series, "accuracy")
    left.set_xlabel("epoch")
    left.set_ylabel("test accuracy (%)")
    left.set_title("while training")
    grid(left)
    limit(left, [series.curve("accuracy") for series in experiment.series], top=False)
    ranked = sorted(experiment.series, key=lambda series: series.accuracies.mean())
    for place, series in enumerate(ranked):
        color, values = COLORS[series.method], series.accuracies
        right.plot(values, np.full(len(values), place), "o", color=color, markersize=4.5, alpha=0.45, markeredgewidth=0)
        right.errorbar(values.mean(), place, xerr=deviation(values), color=color, fmt="D", markersize=5.5, capsize=3, lw=1.4)
        text = f"{values.mean():.2f}" + (f" ± {deviation(values):.2f}" if len(values) > 1 else "")
        right.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=INK)
    right.set_yticks(range(len(ranked)), [series.label for series in ranked])
    right.tick_params(axis="y", length=0)
    right.set_ylim(-0.6, len(ranked) - 0.4)
    right.set_xlabel("test accuracy (%)")
    right.set_title("final weights: each seed, mean ± standard deviation")
    right.grid(axis="x", color=FAINT, linewidth=0.6)
    right.set_axisbelow(True)
    return figure


# ------------------------------------------------------------------------------------------------------------- by epoch


def curves(experiment: Experiment) -> Figure:
    """Test accuracy and training loss after every epoch."""
    parts = panels(experiment)
    figure = Figure(figsize=(max(7.0, 3.1 * len(parts) + 1.2), 6.2), layout="constrained")
    heading(figure, experiment)
    axes = figure.subplots(2, len(parts), squeeze=False, sharey="row", sharex=True)
    for column, (title, members) in enumerate(parts):
        for row, name in enumerate(("accuracy", "loss")):
            for series in members:
                curve(axes[row, column], series, name)
            grid(axes[row, column])
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("training loss")
    limit(axes[0, 0], [s.curve("accuracy") for s in experiment.series], top=False)
    limit(axes[1, 0], [s.curve("loss") for s in experiment.series], top=True)
    legend(figure, experiment.series)
    return figure


def norms(experiment: Experiment) -> Figure:
    """ℓ2 norm of each weight and imbalance ρ while training, at the greatest depth and the last batch size.

    Imbalance is that of a run's own p and c; a run for which another one was measured has no curve.
    """
    members = experiment.at(experiment.depths[-1], experiment.batches[-1])
    if not members:
        members = [series for series in experiment.series if series.run.depth == experiment.depths[-1]]
    columns = min(len(members), PANELS)
    rows = -(-len(members) // columns)
    figure = Figure(figsize=(max(8.0, 1.9 * columns), 2.1 * rows + 3.6), layout="constrained")
    heading(figure, experiment, where(members[0]))
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.1 * rows, 2.6], squeeze=False)[:, 0]
    _norms_by_layer(upper, upper.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel(), members)
    _imbalance(lower.subplots(), members)
    return figure


def _norms_by_layer(figure: SubFigure, axes: np.ndarray, members: Sequence[Series]) -> None:
    """A panel for each series, a line for each layer."""
    depth = max(len(layers(series)) for series in members)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, max(depth, 2)))
    for axis, series in zip(axes, members, strict=False):
        names = layers(series)
        for position, name in enumerate(names):
            values = np.array(series.results[0].curves.norms[name])
            shade = shades[round(position * (len(shades) - 1) / max(len(names) - 1, 1))]
            axis.plot(range(len(values)), np.where(values > 0, values, np.nan), color=shade, linewidth=1.1)
        axis.set_title(textwrap.fill(series.label, 22, break_long_words=False), color=COLORS[series.method])
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        grid(axis)
    for axis in axes[len(members) :]:
        axis.set_visible(False)
    figure.supylabel(r"$\|W_k\|_2$", fontsize=9)
    shown = ScalarMappable(cmap=ListedColormap(shades))
    bar = figure.colorbar(shown, ax=list(axes), shrink=0.7, aspect=25, pad=0.01, ticks=[0.03, 0.97])
    bar.ax.set_yticklabels(["first", "last layer"])
    bar.outline.set_visible(False)


def _imbalance(axis: Axes, members: Sequence[Series]) -> None:
    """A line for each series whose imbalance was measured at its own p and c."""
    measured = [series for series in members if series.curve("residuals").size]
    shown_here = [series for series in measured if series.results[0].curves.residuals_at == (series.run.p, series.run.c)]
    for series in shown_here:
        curve(axis, series, "residuals")
    axis.set_yscale("log")
    left_out = "; runs whose imbalance was measured at another c are left out"
    axis.set_xlabel("epoch" if shown_here == measured else f"epoch{left_out}")
    axis.set_ylabel("imbalance ρ")
    grid(axis)
    if shown_here:
        axis.legend(*handles(shown_here), loc="center left", bbox_to_anchor=(1.0, 0.5))


# ----------------------------------------------------------------------------------------------------- rates and weights


def rates(experiment: Experiment) -> Figure:
    """Held-out accuracy against the learning rate; what was chosen is marked."""
    parts = panels(experiment)
    figure = Figure(figsize=(max(7.0, 3.1 * len(parts) + 1.2), 3.9), layout="constrained")
    heading(figure, experiment, "held-out images choose the learning rate (large marker); crosses diverged")
    axes = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axis, (title, members) in zip(axes, parts, strict=True):
        for series in members:
            tried = sorted(series.tried.items())
            style = look(series)
            known = [(rate, 100 * accuracy) for rate, accuracy in tried if accuracy is not None]
            lost = [rate for rate, accuracy in tried if accuracy is None]
            axis.plot(*zip(*known, strict=True) if known else ([], []), marker="o", markersize=3, **style)
            axis.plot(lost, [0.02] * len(lost), "x", color=style["color"], markersize=5, transform=axis.get_xaxis_transform())
            best = series.tried.get(series.run.lr)
            if best is not None:
                axis.plot(series.run.lr, 100 * best, "o", color=style["color"], markersize=7.5)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title)
        axis.set_xlabel("learning rate")
        grid(axis)
    every = [100 * a for s in experiment.series for a in s.tried.values() if a is not None]
    if every:
        axes[0].set_ylim(bottom=max(min(every), 0.5 * max(every)) - 2)
    axes[0].set_ylabel("held-out accuracy (%)")
    legend(figure, experiment.series)
    return figure


def weights(experiment: Experiment) -> Figure:
    """Magnitudes of three weights before and after training, at the greatest depth."""
    members = [series for series in experiment.at(experiment.depths[-1], experiment.batches[-1]) if pictured(series)]
    members = members or [series for series in experiment.series if pictured(series)][:1]
    members = sorted(members, key=lambda series: PICTURED.index(series.method))[: PANELS + 1]
    members.sort(key=lambda series: list(COLORS).index(series.method))
    names = list(members[0].results[0].pictures)
    first = [decode(before) for before, _ in members[0].results[0].pictures.values()]
    columns = [("before training", INK, first)]
    for series in members:
        columns.append(
            (series.label, COLORS[series.method], [decode(after) for _, after in series.results[0].pictures.values()])
        )
    figure = Figure(figsize=(1.45 * len(columns) + 1.6, 5.6), layout="constrained")
    heading(figure, experiment, f"magnitudes of weights (root mean squares of blocks); {where(members[0])}")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for row in range(len(names)):
        images = [images[row] for _, _, images in columns]
        values = np.concatenate([image[image > 0] for image in images])
        low, high = np.quantile(values, [0.01, 0.98])
        norm = LogNorm(low if low < high else high / 10, high)
        for axis, image in zip(axes[row], images, strict=True):
            axis.imshow(np.maximum(image, low), norm=norm, cmap="magma", aspect="auto", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(("first", "middle", "last")[row] + " layer")
        ticks = np.geomspace(norm.vmin or low, norm.vmax or high, 3)
        bar = figure.colorbar(ScalarMappable(norm, "magma"), ax=list(axes[row]), shrink=0.85, aspect=18, pad=0.01, ticks=ticks)
        bar.ax.minorticks_off()
        bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
        bar.outline.set_visible(False)
    for axis, (label, color, _) in zip(axes[0], columns, strict=True):
        axis.set_title(textwrap.fill(label, 20, break_long_words=False), color=color)
    return figure
