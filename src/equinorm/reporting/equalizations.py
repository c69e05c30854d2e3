"""What an `Equalization` draws of itself: two axes, or a page."""

import math
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equinorm._errors import describe
from equinorm.quantization.equalization import ChannelRanges, Equalization
from equinorm.reporting.axes import two_axes
from equinorm.reporting.files import write_report
from equinorm.reporting.pages import Part, page, table
from equinorm.reporting.pictures import BARS, before_and_after
from equinorm.reporting.style import AFTER, BEFORE, FAINT, STYLE, render

_PICTURED = 4
"""So many weights are pictured in a report."""


def plot(found: Equalization, axes: Any = None) -> Any:
    """See `Equalization.plot`."""
    with matplotlib.rc_context(STYLE):
        axes = two_axes(axes, _height(found))
        left, right = axes
        _noise(left, found)
        _ranges(right, found.channel_ranges()[:1])
    return axes


def report(found: Equalization, path: str | os.PathLike[str]) -> None:
    """See `Equalization.report`."""
    write_report(path, lambda target: draw(target, found))


def draw(path: Path, found: Equalization) -> bytes:
    """The report in the format that a path's suffix names."""
    with matplotlib.rc_context(STYLE):
        return _png(found) if path.suffix == ".png" else _page(found).encode("utf-8")


def _height(found: Equalization) -> float:
    rows = len(found.tensors)
    return min(max(3.2, 1.3 + 0.26 * rows), 9.0) if rows <= BARS else 3.6


def _png(found: Equalization) -> bytes:
    figure = Figure(figsize=(10, _height(found) + 0.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{describe(found.model)}, {found.scheme}", x=0.02, ha="left", fontsize=12, weight="bold")
    _noise(left, found)
    _ranges(right, found.channel_ranges()[:1])
    return render(figure)


def _page(found: Equalization) -> str:
    ranges = found.channel_ranges()[:_PICTURED]
    parts: list[Part] = [(_height(found), "Signal over quantization noise, by tensor", lambda f: _noise(f.subplots(), found))]
    if ranges:
        parts.append((3.0, "Ranges of channels before and after", lambda f: _rows(f, ranges)))
    tensors = table("Tensors", ("tensor", "kind", "before, dB", "after, dB"), found.table)
    return page(f"Equalization of {describe(found.model)}", found.facts, parts, tensors)


def _noise(axis: Axes, found: Equalization) -> None:
    """Signal over the noise of every tensor, in dB; short bars cost most."""
    before, after = ([getattr(row, key) for row in found.tensors] for key in ("before", "after"))
    most = max((value for value in before + after if math.isfinite(value)), default=1.0)
    before, after = ([min(value, most) for value in values] for values in (before, after))
    before_and_after(axis, [row.name for row in found.tensors], before, after, "signal over noise, dB")


def _rows(figure: Figure, ranges: list[ChannelRanges]) -> None:
    axes = figure.subplots(1, len(ranges), squeeze=False)[0]
    for axis, one in zip(axes, ranges, strict=True):
        _ranges(axis, [one])


def _ranges(axis: Axes, ranges: list[ChannelRanges]) -> None:
    """Largest weight of every channel, channels in the order in which they were."""
    if not ranges:
        axis.text(0.0, 1.0, "no weight moves", va="top", transform=axis.transAxes)
        axis.set_axis_off()
        return
    (one,) = ranges
    order = np.argsort(one.before)
    places = np.arange(len(order))
    axis.semilogy(places, np.maximum(one.before[order], 1e-30), color=BEFORE, marker=".", markersize=3, linewidth=0.8)
    axis.semilogy(places, np.maximum(one.after[order], 1e-30), color=AFTER, marker=".", markersize=3, linewidth=0.8)
    axis.set_title(one.name)
    axis.set_xlabel("output channel, by its range before")
    axis.set_ylabel("largest |w|")
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
