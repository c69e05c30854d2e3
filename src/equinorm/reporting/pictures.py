"""A balance as pictures: weights before and after, energies of tensors, convergence."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from equinorm._scaling import Scaling
from equinorm.reporting import pages
from equinorm.reporting.pages import Part
from equinorm.reporting.records import Balanced, Weights
from equinorm.reporting.style import AFTER, BEFORE, FAINT, GREY, STYLE, render
from equinorm.reporting.words import energy_name, number

_PIXELS = 192
"""Larger matrices are pictured by the rms of blocks."""

_RUN = 5
"""So many weights are pictured at most."""

BARS = 28
"""More tensors than this are drawn as lines over their position."""


def draw(path: Path, record: Balanced, weights: Sequence[Weights]) -> bytes:
    """The report in the format that a path's suffix names."""
    return _png(record, weights) if path.suffix == ".png" else _page(record, weights).encode()


def _png(record: Balanced, weights: Sequence[Weights]) -> bytes:
    """The whole report as one picture."""
    with matplotlib.rc_context(STYLE):
        parts = _parts(record, weights)
        heights = [height for height, _, _ in parts]
        figure = Figure(figsize=(10, sum(heights) + 0.8), layout="constrained")
        top, *rows = figure.subfigures(len(parts) + 1, 1, squeeze=False, height_ratios=[0.8, *heights], hspace=0.02)[:, 0]
        top.text(0.02, 0.8, record.model, fontsize=13, weight="bold", va="center")
        top.text(0.02, 0.38, " · ".join(f"{name} {value}" for name, value in record.facts[:4]), fontsize=9, va="center")
        for (_, title, draw), row in zip(parts, rows, strict=True):
            row.suptitle(title, x=0.02, ha="left", fontsize=10, weight="bold")
            draw(row)
        return render(figure)


def _page(record: Balanced, weights: Sequence[Weights]) -> str:
    """The whole report as one HTML page."""
    rows = [(energy.name, number(energy.before), number(energy.after)) for energy in record.energies]
    total = ("maximum" if math.isinf(record.p) else "total", *map(number, record.totals))
    columns = ("tensor", "before", "after")
    table = pages.table(f"Energies {energy_name(record.p, record.c)}", columns, rows, total) if rows else ""
    return pages.page("Balance report", record.facts, _parts(record, weights), table)


def _parts(record: Balanced, weights: Sequence[Weights]) -> list[Part]:
    """Height in inches, title and painter of every picture."""
    parts: list[Part] = []
    if weights:
        parts.append(
            (5.0, "Weights of consecutive layers, |w| before (above) and after (below)", lambda f: _weights(f, weights))
        )
    if record.energies:
        rows = len(record.energies)
        height = 1.3 + 0.3 * rows if rows <= BARS else 3.4
        parts.append((height, f"Energy of each tensor, {mathematics(record)}", lambda f: energies(f.subplots(), record)))
    if len(record.residuals) > 1:
        parts.append((3.0, "Convergence", lambda f: convergence(f.subplots(), record)))
    return parts


def mathematics(record: Balanced) -> str:
    """The formula of a tensor's energy, for matplotlib to typeset."""
    factor = "" if record.c == 1 else "$c_k$ "
    power = r"$\|W\|_\infty$" if math.isinf(record.p) else rf"$\|W\|_{{{record.p:g}}}^{{{record.p:g}}}$"
    return factor + power


def pictured(scalings: Sequence[Scaling], before: Mapping[str, Tensor], after: Callable[[Scaling], Tensor]) -> list[Weights]:
    """Consecutive weights before and after: all, or the run of `_RUN` of them that changed most."""
    chosen = [s for s in scalings if s.kind == "parameter" and s.role == "weight" and len(s.shape) > 1]
    chosen.sort(key=lambda scaling: scaling.depth)
    found = [Weights(s.name, _matrix(before[s.name]), _matrix(after(s))) for s in chosen]
    if len(found) > _RUN:
        change = [float(((w.after + 1e-300).log() - (w.before + 1e-300).log()).abs().mean()) for w in found]
        start = max(range(len(found) - _RUN + 1), key=lambda i: (sum(change[i : i + _RUN]), -i))
        found = found[start : start + _RUN]
    return found


def _matrix(weight: Tensor) -> Tensor:
    magnitude = weight.detach().to("cpu", torch.float64).abs()
    return magnitude.square().mean(dim=tuple(range(2, weight.dim()))).sqrt() if weight.dim() > 2 else magnitude


def _weights(figure: Figure | SubFigure, weights: Sequence[Weights]) -> None:
    """Heat maps with one logarithmic colour scale for all."""
    images = [[_shrunk(part) for part in (weight.before, weight.after)] for weight in weights]
    values = np.concatenate([image[image > 0] for pair in images for image in pair] or [np.ones(1)])
    values = values if values.size else np.ones(1)
    low, high = np.quantile(values, [0.02, 1.0])
    norm = LogNorm(low if low < high else high / 10, high)
    widths = [min(2.2, max(1.0, math.sqrt(w.before.shape[1] / w.before.shape[0]))) for w in weights]
    axes = figure.subplots(2, len(weights), squeeze=False, width_ratios=widths)
    shown = None
    for column, (weight, pair) in enumerate(zip(weights, images, strict=True)):
        for row, image in enumerate(pair):
            axis = axes[row, column]
            shown = axis.imshow(np.maximum(image, low), norm=norm, cmap="magma", aspect="auto", interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        out, into = weight.before.shape
        name = _short(weight.name.removesuffix(".weight"), 26 if len(weights) < 4 else 18)
        axes[0, column].set_title(f"{name}\n{out} × {into}")
    axes[0, 0].set_ylabel("before")
    axes[1, 0].set_ylabel("after")
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes, shrink=0.8, aspect=30, pad=0.01)
        bar.outline.set_visible(False)


def _shrunk(matrix: Tensor) -> np.ndarray:
    sizes = [min(size, _PIXELS) for size in matrix.shape]
    if sizes != list(matrix.shape):
        matrix = torch.nn.functional.adaptive_avg_pool2d(matrix.square()[None], (sizes[0], sizes[1]))[0].sqrt()
    return matrix.numpy()


def energies(axis: Axes, record: Balanced) -> None:
    """Energy of each tensor before and after."""
    before, after = ([getattr(row, key) for row in record.energies] for key in ("before", "after"))
    positive = [value for value in before + after if value > 0]
    log = bool(positive) and max(positive) > 100 * min(positive)
    are_bars = before_and_after(axis, [_short(row.name, 40) for row in record.energies], before, after)
    if log and are_bars:
        axis.set_xscale("log")
        axis.set_xlim(left=min(positive) / 3)
    elif log:
        axis.set_yscale("log")


def before_and_after(axis: Axes, names: Sequence[str], before: Sequence[float], after: Sequence[float], what: str = "") -> bool:
    """Numbers of every tensor as pairs of bars, or as two lines if there are many; were there bars?"""
    places, are_bars = np.arange(len(names)), len(names) <= BARS
    if are_bars:
        axis.barh(places - 0.19, before, 0.36, color=BEFORE, label="before")
        axis.barh(places + 0.19, after, 0.36, color=AFTER, label="after")
        axis.set_yticks(places, names)
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.set_xlabel(what)
    else:
        axis.plot(places, before, color=BEFORE, label="before", drawstyle="steps-mid")
        axis.plot(places, after, color=AFTER, label="after", drawstyle="steps-mid")
        axis.margins(x=0.01)
        axis.set_xlabel("tensor, in the model's order")
        axis.set_ylabel(what)
    axis.grid(axis="x" if are_bars else "y", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return are_bars


def convergence(axis: Axes, record: Balanced) -> None:
    """Residual by cycle."""
    cycles = np.arange(len(record.residuals))
    residuals = np.array([value if value > 0 else np.nan for value in record.residuals])
    axis.semilogy(cycles, residuals, color=AFTER, marker="o" if len(cycles) <= 60 else None, markersize=4, linewidth=1.4)
    if record.tol > 0:
        axis.axhline(record.tol, color=BEFORE, linewidth=1, linestyle="--")
        axis.annotate("tolerance", (0.01, record.tol), xycoords=("axes fraction", "data"), va="bottom", color=GREY, fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("cycle")
    axis.set_ylabel("residual ρ")
    axis.grid(axis="y", color=FAINT, linewidth=0.6)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[-(most - 1) :]
