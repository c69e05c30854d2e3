"""What an `Equalization` draws of itself: two axes, or a page."""

import base64
import html
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equinorm._errors import EquinormError, describe
from equinorm.reporting import pictures
from equinorm.reporting.files import check_target, write_atomically
from equinorm.reporting.style import AFTER, BEFORE, FAINT, STYLE, render

if TYPE_CHECKING:
    from equinorm.quantization.equalization import ChannelRanges, Equalization

_BARS, _PICTURED = 28, 4
"""More tensors are drawn as lines; so many weights are pictured in a report."""


def plot(found: "Equalization", axes: Any = None) -> Any:
    """See `Equalization.plot`."""
    with matplotlib.rc_context(STYLE):
        if axes is None:
            _, axes = pyplot.subplots(1, 2, figsize=(10, _height(found)), layout="constrained")
        try:
            left, right = axes
        except (TypeError, ValueError) as error:
            raise EquinormError(f"axes must be two of matplotlib's, not {type(axes).__name__}.") from error
        _noise(left, found)
        _ranges(right, found.channel_ranges()[:1])
    return axes


def report(found: "Equalization", path: str | os.PathLike[str]) -> None:
    """See `Equalization.report`."""
    target = Path(path)
    check_target(target, (".html", ".png"), force=True)
    content = draw(target, found)
    write_atomically([(target, lambda file: file.write_bytes(content))], force=True)


def draw(path: Path, found: "Equalization") -> bytes:
    """The report in the format that a path's suffix names."""
    with matplotlib.rc_context(STYLE):
        return _png(found) if path.suffix == ".png" else _page(found).encode("utf-8")


def _height(found: "Equalization") -> float:
    rows = len(found.tensors)
    return min(max(3.2, 1.3 + 0.26 * rows), 9.0) if rows <= _BARS else 3.6


def _png(found: "Equalization") -> bytes:
    figure = Figure(figsize=(10, _height(found) + 0.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{describe(found.model)}, {found.scheme}", x=0.02, ha="left", fontsize=12, weight="bold")
    _noise(left, found)
    _ranges(right, found.channel_ranges()[:1])
    return render(figure)


def _page(found: "Equalization") -> str:
    escape = html.escape
    ranges = found.channel_ranges()[:_PICTURED]
    parts: list[tuple[float, str, Callable[[Figure], None]]] = [
        (_height(found), "Signal over quantization noise, by tensor", lambda f: _noise(f.subplots(), found)),
    ]
    if ranges:
        parts.append((3.0, "Ranges of channels before and after", lambda f: _rows(f, ranges)))
    sections = []
    for height, title, draw in parts:
        figure = Figure(figsize=(10, height), layout="constrained")
        draw(figure)
        image = base64.b64encode(render(figure)).decode("ascii")
        sections.append(f'<section><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}"></section>')
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in found.facts)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in found.table)
    head = "<tr><th>tensor</th><th>kind</th><th>before, dB</th><th>after, dB</th></tr>"
    title = f"Equalization of {escape(describe(found.model))}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{pictures.PAGE_STYLE}</style></head>\n<body><main><h1>{title}</h1><dl>{facts}</dl>\n"
        + "\n".join(sections)
        + f"\n<section><h2>Tensors</h2><table><thead>{head}</thead><tbody>{rows}</tbody></table></section>\n"
        + "</main></body></html>\n"
    )


def _noise(axis: Axes, found: "Equalization") -> None:
    """Signal over the noise of every tensor, in dB; short bars cost most."""
    before, after = ([getattr(row, key) for row in found.tensors] for key in ("before", "after"))
    finite = [value for value in before + after if math.isfinite(value)]
    most = max(finite, default=1.0)
    before, after = ([min(value, most) for value in values] for values in (before, after))
    places = np.arange(len(before))
    if len(before) <= _BARS:
        axis.barh(places - 0.19, before, 0.36, color=BEFORE, label="before")
        axis.barh(places + 0.19, after, 0.36, color=AFTER, label="after")
        axis.set_yticks(places, [row.name for row in found.tensors])
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.grid(axis="x", color=FAINT, linewidth=0.6)
        axis.set_xlabel("signal over noise, dB")
    else:
        axis.plot(places, before, color=BEFORE, label="before", drawstyle="steps-mid")
        axis.plot(places, after, color=AFTER, label="after", drawstyle="steps-mid")
        axis.grid(axis="y", color=FAINT, linewidth=0.6)
        axis.margins(x=0.01)
        axis.set_xlabel("tensor, in the model's order")
        axis.set_ylabel("signal over noise, dB")
    axis.set_axisbelow(True)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _rows(figure: Figure, ranges: "list[ChannelRanges]") -> None:
    axes = figure.subplots(1, len(ranges), squeeze=False)[0]
    for axis, one in zip(axes, ranges, strict=True):
        _ranges(axis, [one])


def _ranges(axis: Axes, ranges: "list[ChannelRanges]") -> None:
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
